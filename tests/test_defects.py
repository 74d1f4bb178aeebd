"""Defects of Keras 3.15.1 and TensorFlow Addons, each absent here.

One body runs on our layer, where it must pass, and on Keras's, where it must fail: so a test that
says nothing is found out.
"""

import keras
import numpy as np
import pytest
from frameworks import BACKEND, assert_within, to_numpy
from norms import expected
from reference import Norm, group_labels

from normwise import layers

EPS = np.finfo(np.float32).eps
EVERYWHERE = ("jax", "tensorflow", "torch")


def values(shape, mean=3.0):
    return np.random.default_rng(0).normal(mean, 1.0, shape).astype("float32")


def assert_normalizes(layer, x, right):
    assert_within(to_numpy(layer(x)), right.y, right.y_tolerance(EPS))


def large_mean(channels):
    """NaN from E[x^2] - E[x]^2 less than -epsilon."""

    def body(make):
        x = values((2, 16, 16, channels), mean=3000.0)
        right = expected(built(layers.GroupNormalization(groups=2), x), x)
        assert_normalizes(make("GroupNormalization", groups=2), x, right)

    return body


def middle_axis(make):
    x = values((2, 3, 4, 5))
    right = expected(built(layers.LayerNormalization(axis=1), x), x)
    assert_normalizes(make("LayerNormalization", axis=1), x, right)


def middle_axis_of_a_square(make):
    """Silently wrong where the channels are as many as the last axis."""
    x = values((2, 4, 3, 4))
    gamma = np.arange(1.0, 5.0, dtype="float32")
    layer = make("LayerNormalization", axis=1)
    layer.build(x.shape)
    layer.gamma.assign(gamma)
    ours = built(layers.LayerNormalization(axis=1), x)
    ours.gamma.assign(gamma)
    assert_normalizes(layer, x, expected(ours, x))


def rms_of_a_middle_axis(make):
    x = values((2, 3, 4, 5))
    right = expected(built(layers.RMSNormalization(axis=1), x), x)
    assert_normalizes(make("RMSNormalization", axis=1), x, right)


def integers(name):
    def body(make):
        x = np.arange(24, dtype="int32").reshape(2, 3, 4)
        options = {"groups": 2} if name == "GroupNormalization" else {}
        right = expected(built(getattr(layers, name)(**options), x), x.astype("float64"))
        assert_normalizes(make(name, **options), x, right)

    return body


def list_axis(make):
    x = values((2, 3, 4))
    right = expected(built(layers.GroupNormalization(groups=2), x), x)
    assert_normalizes(make("GroupNormalization", groups=2, axis=[-1]), x, right)


def batch_axis(make):
    with pytest.raises(ValueError, match="axis"):
        make("GroupNormalization", groups=2, axis=0)(values((2, 3, 4)))


def minus_one_groups(make):
    layer = make("GroupNormalization", groups=-1)
    layer.build((None, 3, 4))
    wider = type(layer).from_config(layer.get_config())
    x = values((2, 3, 8))
    right = expected(built(layers.InstanceNormalization(), x), x)
    assert_normalizes(wider, x, right)


def empty_extent(make):
    layer = make("GroupNormalization", groups=2)
    assert to_numpy(layer(values((2, 0, 4)))).shape == (2, 0, 4)


def mask(make):
    """Padding that a Masking layer has marked, but that still moves the statistics."""
    x = values((2, 6, 4))
    x[:, 4:] = 0
    keep = np.broadcast_to(x.any(axis=-1, keepdims=True), x.shape)
    right = expected(built(layers.GroupNormalization(groups=2), x), x, keep)
    layer = make("GroupNormalization", groups=2)
    assert_normalizes(keras.Sequential([keras.layers.Masking(), layer]), x, right)


def built(layer, x):
    layer.build(x.shape)
    return layer


OFF = "elements are off"

# The body, the backends on which Keras's layer has the defect, and how it shows.
DEFECTS = {
    "group norm at mean 3000": (large_mean(8), ("torch",), OFF),
    "group norm at mean 3000, many channels": (large_mean(64), ("torch",), OFF),
    "layer norm over a middle axis": (middle_axis, ("torch",), "normalized_shape"),
    "layer norm over a middle axis, C == W": (middle_axis_of_a_square, ("torch",), OFF),
    "RMS norm over a middle axis": (rms_of_a_middle_axis, EVERYWHERE, "[Ss]hape"),
    "integers, group norm": (integers("GroupNormalization"), EVERYWHERE, OFF),
    "integers, layer norm": (integers("LayerNormalization"), EVERYWHERE, OFF),
    "a list axis for group norm": (list_axis, EVERYWHERE, "must be integers"),
    "the batch axis for group norm": (batch_axis, EVERYWHERE, "DID NOT RAISE"),
    "groups=-1 after build": (minus_one_groups, EVERYWHERE, OFF),
    "a mask, group norm": (mask, EVERYWHERE, OFF),
    "an empty extent": (empty_extent, ("jax", "torch"), "by zero|0 elements"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_defect_is_absent_here(defect):
    body, *_ = DEFECTS[defect]
    body(lambda name, **options: getattr(layers, name)(**options))


@pytest.mark.skipif(keras.__version__ != "3.15.1", reason="the defects are those of Keras 3.15.1")
@pytest.mark.parametrize(
    "defect", [name for name, (_, backends, _) in DEFECTS.items() if BACKEND in backends]
)
def test_the_same_body_fails_on_keras(defect):
    body, _, symptom = DEFECTS[defect]
    with pytest.raises((Exception, pytest.fail.Exception), match=symptom):
        body(lambda name, **options: getattr(keras.layers, name)(**options))


def addons_instance_norm(x, axis):
    """What TensorFlow Addons 0.23 calculates: it counts `axis` back from one place too far."""
    reduced = list(range(1, x.ndim))
    reduced.pop(axis if axis == -1 else axis - 1)
    x = x.astype("float64")
    mean, variance = x.mean(tuple(reduced), keepdims=True), x.var(tuple(reduced), keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-3)


@pytest.mark.parametrize(
    ("axis", "addons_is_right"), [(-1, True), (1, True), (2, True), (-2, False)]
)
def test_instance_norm_over_an_axis_counted_from_the_end(axis, addons_is_right):
    x = values((2, 3, 4, 5))
    right = Norm(x, None, None, group_labels(x.shape, axis, x.shape[axis]), (axis,))
    assert_normalizes(layers.InstanceNormalization(axis=axis), x, right)
    assert np.allclose(addons_instance_norm(x, axis), right.y, atol=1e-6) == addons_is_right
