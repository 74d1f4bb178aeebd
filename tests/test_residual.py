"""Layers called with a residual: (y, sum), where y is the norm of the sum; alone and in models."""

import re

import keras
import numpy as np
import pytest
from frameworks import (
    BACKEND,
    allow_torch_compile,
    assert_within,
    float64_enabled,
    gradients,
    in_one_graph,
    to_numpy,
)
from norms import NORMS, Case, expected, randomize, samples
from reference import EPS

import normwise
from normwise import keras_private, layers, ops

CASES = {
    **NORMS,
    "response": Case(layers.FilterResponseNormalization, ops.filter_response_norm, {"axis": [1]}),
}
KEEP = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]], bool)

every_norm = pytest.mark.parametrize("norm", CASES.values(), ids=CASES.keys())


def built(norm, **options):
    layer = norm.make(**options)
    layer.build((None, 5, 6))
    return randomize(layer)


def both(seed=0, dtype="float32"):
    """An input and a residual."""
    return samples(seed=seed, dtype=dtype), samples(seed=seed + 5, dtype=dtype)


@every_norm
@pytest.mark.parametrize("mask", [None, KEEP], ids=["", "mask"])
def test_values_and_gradients(norm, mask):
    """By x and the residual they are that of y, and what comes through the sum itself.

    y and the sum are one tensor here, one on top of the other. The sum is rounded once.
    """
    layer, (x, residual) = built(norm), both()
    values = [to_numpy(w) for w in layer.weights]
    dy = samples((4, 5, 6), seed=9)

    def function(x, residual, *weights):
        outputs, _ = layer.stateless_call(weights, [], x, mask=mask, residual=residual)
        return keras.ops.concatenate(outputs)

    y, (dx, dr, *dw) = gradients(function, [x, residual, *values], dy)
    keep = None if mask is None else mask[..., None]
    right = expected(layer, x + residual, keep)
    eps = EPS["float32"]
    assert_within(y[:2], right.y, right.y_tolerance(2 * eps), "y")
    np.testing.assert_array_equal(y[2:], x + residual)
    wanted = right.gradients(dy[:2])
    allowed = right.gradient_tolerances(dy[:2], 2 * eps)
    for name, found in (("dx", dx), ("dresidual", dr)):
        assert_within(found, wanted[0] + dy[2:], allowed[0] + 2 * eps * abs(dy[2:]), name)
    for w, found, want, allow in zip(norm.weights, dw, wanted[1:], allowed[1:], strict=False):
        assert_within(found.reshape(-1), want, allow, f"d{w}")


@every_norm
def test_the_second_positional_argument_is_the_mask_as_before(norm):
    layer, x = built(norm), samples()
    mask = keras.ops.convert_to_tensor(KEEP)
    right = expected(layer, x, KEEP[..., None])
    found = layer(keras.ops.convert_to_tensor(x), mask)
    assert_within(to_numpy(found), right.y, right.y_tolerance(EPS["float32"]))


@every_norm
@pytest.mark.parametrize("given", ["float32", "float16", "bfloat16", "int32"])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16", "float64"])
def test_dtypes(norm, given, policy):
    """The sum has the input's dtype, or the layer's for integers, symbolically too."""
    with float64_enabled():
        layer = built(norm, dtype=policy)
        x, residual = (keras.ops.cast(each, given) for each in both())
        y, total = layer(x, residual=residual)
        result = layer.compute_dtype
        of_sum = given if "float" in given else result
        for each, dtype in ((y, result), (total, of_sum)):
            assert keras.backend.standardize_dtype(each.dtype) == dtype
        symbols = [keras.Input((5, 6), dtype=given) for _ in range(2)]
        symbolic = layer(symbols[0], residual=symbols[1])
        assert [s.dtype for s in symbolic] == [result, of_sum]
        wanted = np.float64(to_numpy(x)) + to_numpy(residual)
        assert_within(to_numpy(total), wanted, EPS[of_sum] * abs(wanted), "sum")
        right = expected(layer, np.float64(to_numpy(total)))
        arithmetic = "float64" if "float64" in (of_sum, result) else "float32"
        tolerance = right.y_tolerance(EPS[arithmetic]) + 2 * EPS[result] * abs(right.y)
        assert_within(to_numpy(y), right.y, tolerance, "y")


def model_of(norm):
    """Tokens with a mask, a norm of their sum with a residual, another norm of that."""
    tokens = keras.Input((None,), dtype="int32")
    residual = keras.Input((None, 6))
    x = keras.layers.Embedding(4, 6, mask_zero=True)(tokens)
    y, total = norm.make(activation="tanh", name="first")(x, residual=residual)
    z = norm.make(name="second")(total)
    return keras.Model([tokens, residual], [x, y, total, z])


TOKENS = np.array([[3, 1, 2, 0, 0], [1, 0, 2, 1, 0]])


@every_norm
def test_a_model_with_a_mask_saves_and_loads(norm, tmp_path):
    """The mask of the input stays out of the statistics of y, and goes on with the sum."""
    model = model_of(norm)
    assert [tensor.shape for tensor in model.outputs] == [(None, None, 6)] * 4
    assert {keras_private.mask_of(symbol).shape for symbol in model.outputs} == {(None, None)}
    first, second = (randomize(model.get_layer(name)) for name in ("first", "second"))
    inputs = [keras.ops.convert_to_tensor(each) for each in (TOKENS, samples(seed=5))]
    outputs = model(inputs)
    for each in outputs:
        np.testing.assert_array_equal(to_numpy(keras_private.mask_of(each)), KEEP)
    x, y, total, z = map(to_numpy, outputs)
    np.testing.assert_array_equal(total, x + samples(seed=5))
    right = expected(first, total, KEEP[..., None])
    assert_within(y, np.tanh(right.y), right.y_tolerance(EPS["float32"]) + EPS["float32"])
    right = expected(second, total, KEEP[..., None])
    assert_within(z, right.y, right.y_tolerance(EPS["float32"]))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for found, want in zip(loaded(inputs), (x, y, total, z), strict=True):
        np.testing.assert_array_equal(to_numpy(found), want)


@every_norm
def test_output_shapes(norm):
    layer = norm.make()
    shape = (None, 5, 6)
    assert layer.compute_output_shape(shape) == shape
    assert layer.compute_output_shape(shape, shape) == (shape, shape)


@every_norm
def test_a_residual_of_another_shape(norm):
    text = "residual has shape (2, 1, 6), but it is added to x of shape (2, 5, 6); pass a tensor "
    text += "of that shape"
    x, residual = samples(), samples((2, 1, 6))
    layer = norm.make()
    with pytest.raises(ValueError, match=re.escape(text)):
        layer(x, residual=residual)
    symbols = [keras.Input(batch_shape=each.shape) for each in (x, residual)]
    with pytest.raises(ValueError, match=re.escape(text)):
        layer(symbols[0], residual=symbols[1])


@pytest.mark.filterwarnings("ignore:.*rms_scaling:UserWarning")
@pytest.mark.parametrize("given", ["float32", "bfloat16", "int32"])
def test_rms_scaling(given):
    layer = layers.LayerNormalization(rms_scaling=True)
    layer.build((None, 5, 6))
    randomize(layer)
    x, residual = (keras.ops.cast(each, given) for each in both())
    y, total = layer(x, mask=KEEP, residual=residual)
    want = layer(total, mask=KEEP)
    of_sum = "float32" if given == "int32" else given
    assert keras.backend.standardize_dtype(total.dtype) == of_sum
    exact = np.float64(to_numpy(x)) + to_numpy(residual)
    assert_within(to_numpy(total), exact, EPS[of_sum] * abs(exact))
    np.testing.assert_array_equal(to_numpy(y), to_numpy(want))
    with pytest.raises(ValueError, match=r"residual has shape \(2, 1, 6\), but it is added to x"):
        layer(samples(), residual=samples((2, 1, 6)))


@pytest.mark.parametrize("jit_compile", [True, False])
def test_fit_moves_every_weight(jit_compile):
    allow_torch_compile(jit_compile)
    inputs = keras.Input((5, 6))
    y = total = inputs
    for norm in CASES.values():
        y, total = norm.make()(keras.layers.Dense(6)(y), residual=total)
    model = keras.Model(inputs, keras.layers.Dense(1)(y + total))
    model.compile("adam", "mse", jit_compile=jit_compile)
    before = model.get_weights()
    model.fit(samples((4, 5, 6)), np.ones((4, 5, 1)), verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.isfinite(new).all()
        assert not np.array_equal(old, new)


@pytest.mark.skipif(BACKEND != "torch", reason="torch.compile")
def test_one_graph_of_torch_compile():
    import torch

    layer = built(NORMS["layer"])
    x, residual = map(torch.tensor, both())
    function = in_one_graph(lambda x, residual: layer(x, residual=residual))
    for found, want in zip(function(x, residual), layer(x, residual=residual), strict=True):
        assert_within(to_numpy(found), to_numpy(want), 1e-5)


@every_norm
def test_explain(norm):
    layer, shape = norm.make(gamma_offset=1.0), (2, 5, 6)
    assert normwise.explain(layer, shape) == normwise.explain(norm.make(), shape)
