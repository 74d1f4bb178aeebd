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


def modulated(x, residual, gamma):
    """A residual, a gamma for each sample and the statistics, in one array."""
    results = ops.group_norm(x, gamma, groups=3, residual=residual, return_statistics=True)
    return jnp.concatenate([each.ravel() for each in results])


def three(leading=()):
    """x, a residual and a gamma for each sample."""
    shapes = (2, 5, 6), (2, 5, 6), (2, 6)
    arrays = [samples((*leading, *shape), seed) for seed, shape in enumerate(shapes)]
    return [jnp.asarray(array) for array in arrays]


def test_operands_without_jit():
    arrays = three()

    def slopes(*arrays):
        return jax.grad(lambda *arrays: jnp.sin(modulated(*arrays)).sum(), (0, 1, 2))(*arrays)

    found, want = modulated(*arrays), slopes(*arrays)
    with jax.disable_jit():
        assert_within(to_numpy(modulated(*arrays)), to_numpy(found), 1e-5)
        for f, w in zip(slopes(*arrays), want, strict=True):
            assert_within(to_numpy(f), to_numpy(w), 1e-5)


@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0)])
def test_vmap_over_operands(axes):
    arrays = [a if axis == 0 else a[0] for a, axis in zip(three((3,)), axes, strict=True)]

    def loss(*arrays):
        return jnp.sin(modulated(*arrays)).sum()

    for function in (modulated, jax.grad(loss, (0, 1, 2))):
        found = jax.tree.leaves(jax.jit(jax.vmap(function, axes))(*arrays))
        function = jax.jit(function)
        for i in range(3):
            one = [a[i] if axis == 0 else a for a, axis in zip(arrays, axes, strict=True)]
            for f, w in zip(found, jax.tree.leaves(function(*one)), strict=True):
                assert_within(to_numpy(f[i]), to_numpy(w), 1e-4)


def test_forward_mode_of_operands():
    arrays, directions = tuple(three()), tuple(jnp.cos(a) for a in three())
    _, tangent = jax.jvp(modulated, arrays, directions)
    y, pull = jax.vjp(modulated, *arrays)
    cotangent = jnp.cos(y)
    pairs = zip(pull(cotangent), directions, strict=True)
    # <dy, J dx> = <J^T dy, dx>
    assert_within(jnp.vdot(tangent, cotangent), float(sum(jnp.vdot(*p) for p in pairs)), 1e-3)

    def along(*arrays):
        return jax.jvp(modulated, arrays, directions)[1]

    series = [(d, jnp.zeros_like(d)) for d in directions]
    y, (first, second) = jet.jet(jax.jit(modulated), arrays, series)
    assert_within(to_numpy(first), to_numpy(tangent), 1e-4)
    assert_within(to_numpy(second), to_numpy(jax.jvp(along, arrays, directions)[1]), 1e-3)


def test_checkify_sees_a_nan_in_a_residual():
    checked = checkify.checkify(jax.jit(modulated), errors=checkify.float_checks)
    x, residual, gamma = three()
    assert checked(x, residual, gamma)[0].get() is None
    assert "nan generated" in checked(x, jnp.asarray(spoilt()), gamma)[0].get()


def test_operands_of_an_exported_program():
    arrays = three()
    symbols = jax.export.symbolic_shape("n, 5, 6")
    specs = [jax.ShapeDtypeStruct(s, "float32") for s in (symbols, symbols, (symbols[0], 6))]
    exported = jax.export.export(jax.jit(modulated))(*specs)
    assert "normwise_jax" not in exported.mlir_module()
    assert_within(to_numpy(exported.call(*arrays)), to_numpy(modulated(*arrays)), 1e-5)
