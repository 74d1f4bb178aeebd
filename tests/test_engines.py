"""An engine that somebody adds: chosen, explained, differentiated, exported, and taken back."""

import re

import keras
import numpy as np
import pytest
from frameworks import (
    BACKEND,
    assert_within,
    compiled,
    gradients,
    second_gradients,
    skip_newer_stablehlo,
    to_numpy,
)
from norms import NORMS, every_norm, samples

import normwise
from normwise import activations, kernels, ops

calls = []


def why_not(norm):
    if norm.activation != activations.IDENTITY or norm.geometry.permutation or norm.operands.mask:
        return "the engine in NumPy knows plain norms only"
    return None


def normalized(norm, x):
    """x less its mean over 1 / deviation, and the latter, of the norm's own shape."""
    geometry = norm.geometry
    parts = x.reshape(*geometry.extents)
    names = ("outer", "before", "groups", "members", "after")
    inside = tuple(axis for axis, name in enumerate(names) if name not in geometry.per)
    centred = parts - parts.mean(inside, keepdims=True) if norm.subtract_mean else parts
    inv_std = 1 / np.sqrt(np.square(centred).mean(inside, keepdims=True) + norm.epsilon)
    return centred * inv_std, inv_std, inside


def scaled(parts, gamma):
    return parts if gamma is None else parts * gamma.reshape(parts.shape[2:4])[..., None]


def forward(norm, x, gamma, beta, y, statistics):
    calls.append("forward")
    parts, _, _ = normalized(norm, x)
    shift = 0 if beta is None else beta.reshape(parts.shape[2:4])[..., None]
    y[...] = (scaled(parts, gamma) + shift).reshape(x.shape)


def backward(norm, x, gamma, beta, statistics, dy, dx, dgamma, dbeta):
    calls.append("backward")
    parts, inv_std, inside = normalized(norm, x)
    g = dy.reshape(parts.shape)
    for gradient, terms in ((dgamma, g * parts), (dbeta, g)):
        if gradient is not None:
            gradient[...] = terms.sum((0, 1, 4)).reshape(gradient.shape)
    g = scaled(g, gamma)
    pulled = g - parts * (g * parts).mean(inside, keepdims=True)
    if norm.subtract_mean:
        pulled = pulled - g.mean(inside, keepdims=True)
    dx[...] = (pulled * inv_std).reshape(x.shape)


@pytest.fixture(autouse=True)
def _engine():
    with normwise.use_kernels("auto"):
        kernels.add(kernels.Engine("numpy", why_not, forward, backward))
        calls.clear()
        yield
        if kernels.listed()[0].name == "numpy":
            kernels.remove("numpy")


@every_norm
def test_it_is_chosen_and_explained(norm):
    choice = normwise.explain(norm.op, (2, 5, 6), **norm.options)
    assert (choice.kernel, choice.reason) == ("numpy", "the numpy kernels can take it")
    assert str(choice) == "numpy: yes, the numpy kernels can take it"
    y = norm.op(samples(), **norm.options)
    assert calls == ["forward"]
    with normwise.use_kernels("composite"):
        want = to_numpy(norm.op(samples(), **norm.options))
    assert_within(to_numpy(y), want, 1e-5)


def test_a_kernel_after_it_is_explained_with_its_reason():
    choice = normwise.explain(ops.layer_norm, (2, 4, 5, 6), axis=(1, 3))
    reason = "the engine in NumPy knows plain norms only"
    assert choice.against[0] == ("numpy", reason)
    assert f"numpy: no, {reason}" in str(choice).splitlines()
    assert str(choice).splitlines()[-1] == "composite: yes"
    with normwise.use_kernels("composite"):
        assert normwise.explain(ops.layer_norm, (2, 6)).kernel in ("composite", "torch")
    with normwise.use_kernels("native"), pytest.raises(RuntimeError, match=re.escape(reason)):
        normwise.explain(ops.layer_norm, (2, 4, 5, 6), axis=(1, 3))


@every_norm
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("present", [True, False])
def test_it_is_differentiated(norm, axis, present):
    x = samples((2, 6, 6))
    parameters = list(np.random.default_rng(1).uniform(0.5, 1.5, (2, 6)).astype("float32"))

    def function(*arrays):
        return norm.op(*arrays, axis=axis, **norm.options)

    arrays = [x, *parameters] if present else [x]
    found = gradients(function, arrays, np.cos(x))[1]
    assert {"forward", "backward"} == set(calls)
    second = second_gradients(function, arrays, np.cos(x), np.sin(x))
    with normwise.use_kernels("composite"):
        want = gradients(function, arrays, np.cos(x))[1]
        want_second = second_gradients(function, arrays, np.cos(x), np.sin(x))
    for f, w in zip([*found, *second], [*want, *want_second], strict=True):
        assert_within(f, w, 1e-4 * (1 + np.abs(w).max()))


def test_it_trains_a_model():
    x = samples((8, 5, 6))

    def trained():
        keras.utils.set_random_seed(0)
        layers = [keras.Input((5, 6)), NORMS["group"].make(), keras.layers.Dense(2)]
        model = keras.Sequential(layers)
        model.compile("sgd", "mse", jit_compile=False)
        model.fit(x, x[..., :2], epochs=2, batch_size=4, shuffle=False, verbose=0)
        return model.get_weights()

    found = trained()
    assert {"forward", "backward"} == set(calls)
    with normwise.use_kernels("composite"):
        want = trained()
    for f, w in zip(found, want, strict=True):
        assert_within(f, w, 1e-5)


# Of Keras's call of jax2tf.
@pytest.mark.filterwarnings("ignore:The `native_serialization:DeprecationWarning")
def test_what_is_exported_does_without_it(tmp_path):
    x = samples((2, 5, 6))
    model = keras.Sequential([keras.Input((5, 6)), NORMS["group"].make()])
    want = to_numpy(compiled(lambda x: model(x))(keras.ops.convert_to_tensor(x)))
    assert calls
    calls.clear()
    if BACKEND == "torch":
        import torch

        program = torch.export.export(model, (torch.tensor(x),))
        found = program.module()(torch.tensor(x))
    else:
        import tensorflow as tf

        model.export(tmp_path / "model", verbose=False)
        loaded = tf.saved_model.load(tmp_path / "model")
        try:
            found = loaded.serve(x)
        except tf.errors.InvalidArgumentError as error:
            skip_newer_stablehlo(str(error))
            raise
    assert_within(to_numpy(keras.ops.convert_to_tensor(found)), want, 1e-5)
    assert not calls


def test_it_is_taken_back():
    kernels.remove("numpy")
    assert normwise.explain(ops.layer_norm, (2, 6)).kernel != "numpy"
    ops.layer_norm(samples())
    assert not calls
    with pytest.raises(ValueError, match=r"engine 'numpy' was not added; those that were are \[\]"):
        kernels.remove("numpy")


def test_a_name_is_given_once():
    taken = kernels.Engine("composite", why_not, forward, backward)
    with pytest.raises(ValueError, match="'composite' has the name of another kernel; remove that"):
        kernels.add(taken)
