"""LayerNormalization(rms_scaling=True): y = activation(gamma * x / sqrt(var + epsilon))."""

import keras
import numpy as np
import pytest
from frameworks import BACKEND, assert_within, gradients, to_numpy
from norms import expected, randomize, samples
from reference import EPS

from normwise import layers

pytestmark = pytest.mark.filterwarnings("ignore:.*rms_scaling:UserWarning")

KEEP = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]], bool)
MASKS = {
    "none": None,
    "time": KEEP,
    "channel of one": KEEP[..., None],
    "whole": np.random.default_rng(5).random((2, 5, 6)) > 0.4,
    "all masked": np.zeros((2, 5), bool),
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


def built(axis=-1, **options):
    layer = layers.LayerNormalization(axis=axis, rms_scaling=True, **options)
    layer.build((None, 5, 6))
    return randomize(layer)


def right(layer, x, mask, dy):
    """y and its gradients by x and gamma from the reference's statistics, and what they may be off.

    With h = dy * gamma, s = 1 / sqrt(var + epsilon), n elements in the set and k = 1 for those:

        dx = s * (h - k/n * s * (x - mean) * sum(h * s * x))
    """
    keep = mask if mask is None or mask.ndim == 3 else mask[..., None]
    norm = expected(layer, x, keep)
    scaled, h = norm.x * norm.inv_std, dy * norm.scale
    share = np.where(norm.some, norm.keep / norm.count, 0)
    dx = norm.inv_std * (h - share * norm.normalized * norm.sums(h * scaled))
    # Of the reference's own terms, with x in the place of its deviation.
    terms = abs(h) + norm.sums(abs(h)) / norm.count
    terms += abs(norm.normalized) * norm.sums(abs(h * scaled)) / norm.count
    eps = EPS["float32"]
    allowed = 32 * eps * np.sqrt(norm.count) * norm.ratio() * norm.inv_std * terms
    weight = norm.gather(32 * eps * norm.ratio() * abs(dy) * (1 + abs(norm.normalized)))
    return [
        (scaled * norm.scale, norm.y_tolerance(eps)),
        (dx, allowed),
        (norm.gather(dy * scaled), weight),
    ]


def assert_right(layer, x, mask):
    dy = samples(seed=9)

    def function(x, gamma):
        return layer.stateless_call([gamma], [], x, mask=mask)[0]

    y, found = gradients(function, [x, to_numpy(layer.gamma)], dy)
    checked = zip(("y", "dx", "dgamma"), [y, *found], right(layer, x, mask, dy), strict=True)
    for name, value, (wanted, allowed) in checked:
        assert_within(value, wanted, allowed, name)


@every_mask
@pytest.mark.parametrize("axis", [-1, 1, [1, 2], [2, 1]])
def test_values_and_gradients(axis, mask):
    assert_right(built(axis), samples(), mask)


@every_mask
def test_at_a_mean_of_10000(mask):
    assert_right(built([1, 2], epsilon=1e-6), samples() + np.float32(1e4), mask)


def test_gamma_offset():
    layer, x = built([1, 2], gamma_offset=-1.0), samples()
    found = to_numpy(layer(x))
    layer.gamma.assign(to_numpy(layer.gamma) - 1)
    (wanted, allowed), *_ = right(layer, x, None, samples())
    assert_within(found, wanted, allowed)


def test_masked_nans_and_infinities_reach_nothing_that_is_kept():
    layer, x = built([1, 2]), samples()
    poisoned = x.copy()
    poisoned[~KEEP] = np.float32([[np.nan], [np.inf], [1e30], [-np.inf]])
    dy = np.where(KEEP[..., None], samples(seed=9), 0)

    def function(x, gamma):
        return layer.stateless_call([gamma], [], x, mask=KEEP)[0]

    gamma = to_numpy(layer.gamma)
    y, found = gradients(function, [poisoned, gamma], dy)
    wanted_y, wanted = gradients(function, [np.where(KEEP[..., None], x, 0), gamma], dy)
    assert_within(y[KEEP], wanted_y[KEEP], 1e-6, "y")
    for value, each in zip(found, wanted, strict=True):
        assert_within(value, each, 1e-5)


def test_equal_elements_have_finite_gradients():
    layer, x = built(), np.full((2, 5, 6), 3, "float32")
    assert_right(layer, x, KEEP)


def test_a_mask_that_does_not_fit():
    with pytest.raises(ValueError, match=r"mask has shape \(2, 4\), which does not fit x of shape"):
        built()(samples(), mask=np.ones((2, 4), bool))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_dtype_policies(policy):
    layer, x = built([1, 2], dtype=policy), samples() * np.float32(1e5)
    y = layer(x, mask=KEEP)
    assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
    (wanted, allowed), *_ = right(layer, x, KEEP, samples())
    rounding = EPS[layer.compute_dtype] * abs(wanted)
    assert_within(to_numpy(y), wanted, allowed + rounding)


def test_masking_layer_in_a_model():
    x = samples()
    x[~KEEP] = 0
    layer = layers.LayerNormalization(rms_scaling=True, axis=[-1], activation="relu")
    model = keras.Sequential([keras.Input((None, 6)), keras.layers.Masking(), layer])
    randomize(layer)
    (wanted, allowed), *_ = right(layer, x, KEEP, samples())
    assert_within(to_numpy(model(x)), np.maximum(wanted, 0), allowed)


def test_warning_config_and_the_result_of_keras():
    with pytest.warns(UserWarning, match="rms_scaling=True divides by the standard deviation"):
        layer = layers.LayerNormalization(rms_scaling=True, activation="relu")
    theirs = keras.layers.LayerNormalization(rms_scaling=True)
    y = to_numpy(layer(samples()))
    assert [w.name for w in layer.weights] == ["gamma"]
    assert_within(y, np.maximum(to_numpy(theirs(samples())), 0), 1e-5)
    with pytest.warns(UserWarning, match="rms_scaling"):
        again = layers.LayerNormalization.from_config(layer.get_config())
    np.testing.assert_array_equal(to_numpy(again(samples())), y)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="extents unknown to the graph")
def test_axes_unknown_to_the_graph():
    import tensorflow as tf

    layer = layers.LayerNormalization(rms_scaling=True)
    layer.build((2, 6))
    function = tf.function(layer, input_signature=[tf.TensorSpec([None, None])])
    x = samples((2, 6))
    np.testing.assert_allclose(function(x), layer(x), rtol=1e-6)
