"""Masks: what they mask stays out of the statistics, of layers and of ops alike."""

import keras
import numpy as np
import pytest
from frameworks import assert_within, gradients, to_numpy
from norms import every_norm, expected, randomize, samples

EPS = np.finfo(np.float32).eps
KEEP = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]], bool)


def built(norm):
    layer = norm.make()
    layer.build((None, 5, 6))
    return randomize(layer)


@every_norm
@pytest.mark.parametrize(
    "mask",
    [KEEP, KEEP[..., None], np.broadcast_to(KEEP[..., None], (2, 5, 6)), KEEP[:1], KEEP[:, :1]],
    ids=["time", "channel of one", "whole", "batch of one", "time of one"],
)
def test_mask_of_every_shape_that_fits(norm, mask):
    layer, x = built(norm), samples()
    keep = mask if mask.ndim == 3 else mask[..., None]
    right = expected(layer, x, keep)
    assert_within(to_numpy(layer(x, mask=mask)), right.y, right.y_tolerance(EPS))


@every_norm
def test_mask_of_whole_samples(norm):
    layer, x = built(norm), samples()
    right = expected(layer, x, np.array([True, False]).reshape(2, 1, 1))
    found = to_numpy(layer(x, mask=np.array([True, False])))
    assert_within(found, right.y, right.y_tolerance(EPS))


@every_norm
def test_gradients_under_a_mask(norm):
    x, dy = samples(), samples(seed=9)
    layer = built(norm)
    right = expected(layer, x, KEEP[..., None])
    values = [to_numpy(w) for w in layer.weights]

    def function(x, *weights):
        return norm.op(x, *weights, mask=KEEP, **norm.options)

    _, found = gradients(function, [x, *values], dy)
    wanted, allowed = right.gradients(dy), right.gradient_tolerances(dy, EPS)
    for name, g, want, allow in zip(("x", *norm.weights), found, wanted, allowed, strict=False):
        assert_within(g, want, allow, f"d{name}")


@every_norm
def test_masked_values_reach_nothing_that_is_kept(norm):
    x = samples()
    poisoned = x.copy()
    # One each for the four positions masked, in both samples an infinity.
    poisoned[~KEEP] = np.float32([[np.nan], [np.inf], [1e30], [-np.inf]])
    clean = np.where(KEEP[..., None], x, 0)
    dy = np.where(KEEP[..., None], samples(seed=9), 0)
    values = [to_numpy(w) for w in built(norm).weights]

    def function(x, *weights):
        return norm.op(x, *weights, mask=KEEP, **norm.options)

    y, (dx, *dw) = gradients(function, [poisoned, *values], dy)
    wanted_y, (wanted_dx, *wanted_dw) = gradients(function, [clean, *values], dy)
    assert_within(y[KEEP], wanted_y[KEEP], 1e-6, "y")
    assert_within(dx, wanted_dx, 1e-6, "dx")
    for found, wanted in zip(dw, wanted_dw, strict=True):
        assert_within(found, wanted, 1e-5, "dw")


@every_norm
def test_a_set_masked_as_a_whole_has_mean_0_and_variance_1(norm):
    layer, x = built(norm), samples()
    found = to_numpy(layer(x, mask=np.zeros((2, 5), bool)))
    gamma = to_numpy(layer.gamma)
    beta = 0 if layer.beta is None else to_numpy(layer.beta)
    assert_within(found, gamma * x / np.sqrt(1 + layer.epsilon) + beta, 1e-5)


@every_norm
def test_a_mask_that_keeps_all_changes_nothing(norm):
    layer, x = built(norm), samples()
    right = expected(layer, x)
    found = to_numpy(layer(x, mask=np.ones((2, 5), bool)))
    assert_within(found, right.y, right.y_tolerance(EPS))


@every_norm
def test_masking_layer_in_a_model(norm):
    x = samples()
    x[~KEEP] = 0
    model = keras.Sequential([keras.Input((None, 6)), keras.layers.Masking(), norm.make()])
    randomize(model.layers[-1])
    right = expected(model.layers[-1], x, KEEP[..., None])
    assert_within(to_numpy(model(x)), right.y, right.y_tolerance(EPS))


@every_norm
def test_the_mask_passes_on(norm):
    tokens = np.array([[3, 1, 2, 0, 0], [1, 1, 0, 0, 0]])
    inputs = keras.Input((None,), dtype="int32")
    embedded = keras.layers.Embedding(4, 6, mask_zero=True)(inputs)
    normed = norm.make()(embedded)
    pooled = keras.layers.GlobalAveragePooling1D()(normed)
    model = keras.Model(inputs, [embedded, normed, pooled])
    values, y, mean = map(to_numpy, model(tokens))
    keep = tokens > 0
    right = expected(model.layers[2], values, keep[..., None])
    assert_within(y, right.y, right.y_tolerance(EPS))
    assert_within(mean, [y[i][keep[i]].mean(axis=0) for i in range(2)], 1e-5)


@every_norm
def test_a_symbolic_mask(norm):
    x, mask = keras.Input((None, 6)), keras.Input((None,), dtype="bool")
    layer = norm.make()
    model = keras.Model([x, mask], layer(x, mask=mask))
    right = expected(layer, samples(), KEEP[..., None])
    found = model([keras.ops.convert_to_tensor(samples()), keras.ops.convert_to_tensor(KEEP)])
    assert_within(to_numpy(found), right.y, right.y_tolerance(EPS))
