"""Norms on JAX where faults were met: without jit, with its checks, and in Taylor mode."""

import keras
import numpy as np
import pytest
from frameworks import assert_within, to_numpy
from norms import every_norm, samples

if keras.backend.backend() != "jax":
    pytest.skip("JAX's situations", allow_module_level=True)

import jax
import jax.numpy as jnp
from jax.experimental import checkify, jet

from normwise import ops


@every_norm
def test_without_jit(norm):
    x = samples()

    def loss(x):
        return jnp.sin(norm.op(x, **norm.options)).sum()

    y, slope = norm.op(x, **norm.options), jax.grad(loss)(x)
    with jax.disable_jit():
        assert_within(to_numpy(norm.op(x, **norm.options)), to_numpy(y), 1e-5)
        assert_within(to_numpy(jax.grad(loss)(x)), to_numpy(slope), 1e-5)


def spoilt():
    x = samples()
    x[0, 0, 0] = np.inf
    return x


@every_norm
def test_a_nan_is_an_error_where_it_is_sought(norm):
    with jax.debug_nans(True):
        norm.op(jnp.asarray(samples()), **norm.options)
        with pytest.raises(FloatingPointError):
            norm.op(jnp.asarray(spoilt()), **norm.options)


@every_norm
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_strict_promotion(norm, dtype):
    x = jnp.asarray(samples(), dtype)
    want = norm.op(x, activation="gelu", **norm.options)
    with jax.numpy_dtype_promotion("strict"):
        found = norm.op(x, activation="gelu", **norm.options)
        jax.grad(lambda x: norm.op(x, **norm.options).sum())(x)
    assert found.dtype == x.dtype
    assert_within(to_numpy(found), to_numpy(want), 0)


def test_checkify_sees_a_nan():
    checked = checkify.checkify(jax.jit(ops.layer_norm), errors=checkify.float_checks)
    error, _ = checked(jnp.asarray(samples()))
    assert error.get() is None
    error, _ = checked(jnp.asarray(spoilt()))
    assert "nan generated" in error.get()


def test_taylor_mode():
    x, v = jnp.asarray(samples((2, 3, 8))), jnp.asarray(samples((2, 3, 8), seed=1))
    y, (first, second) = jet.jet(ops.layer_norm, (x,), ((v, jnp.zeros_like(v)),))
    assert_within(to_numpy(y), to_numpy(ops.layer_norm(x)), 1e-5)

    def along(x):
        return jax.jvp(ops.layer_norm, (x,), (v,))[1]

    assert_within(to_numpy(first), to_numpy(along(x)), 1e-4)
    assert_within(to_numpy(second), to_numpy(jax.jvp(along, (x,), (v,))[1]), 1e-3)
