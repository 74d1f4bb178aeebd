"""AdaptiveInstanceNormalization against its formula in float64, in models, files and errors."""

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
    to_numpy,
)
from keras import ops
from norms import samples
from reference import EPS, Norm, group_labels

import normwise
from normwise.layers import AdaptiveInstanceNormalization

KEEP = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]], bool)
STYLE_KEEP = np.array([[1, 0, 1, 1], [0, 0, 1, 1]], bool)


def instance(x, axis=-1, epsilon=1e-5, keep=None):
    """The reference's instance norm of x."""
    labels = group_labels(x.shape, axis, x.shape[axis])
    return Norm(x, None, None, labels, (axis,), epsilon, keep=keep)


def of_each_channel(values, axis):
    """(batch, channels) of values that all positions of a channel share."""
    flat = np.moveaxis(values, axis, 1)
    return flat.reshape(*flat.shape[:2], -1)[:, :, 0]


def assert_right(y, content, style, axis=-1, keep=None, style_keep=None, rounding=0.0):
    """Of y: the content's error times the style's deviation, and the error of the latter's own.

    The mean of n elements may be off by eps * sqrt(n) of the largest, a deviation of that too.
    """
    norm, of_style = instance(content, axis, keep=keep), instance(style, axis, keep=style_keep)
    spread = [1] * content.ndim
    spread[0], spread[axis] = style.shape[0], style.shape[axis]
    mean, deviation = (
        of_each_channel(each, axis).reshape(spread)
        for each in (of_style.mean, 1 / of_style.inv_std)
    )
    want = deviation * norm.y + mean
    eps, size = EPS["float32"], style.size / style.shape[axis]
    of_statistics = eps * np.sqrt(size) * 4 * (abs(mean) + deviation)
    allowed = deviation * norm.y_tolerance(eps) + of_statistics * (1 + abs(norm.y))
    assert_within(to_numpy(y), want, allowed + rounding * abs(want))


@pytest.mark.parametrize(
    ("shape", "style", "axis"),
    [
        ((2, 5, 6), (2, 5, 6), -1),
        ((2, 4, 3, 6), (2, 7, 1, 6), [3]),
        ((2, 6, 4, 3), (2, 6, 5, 5), 1),
        ((2, 5, 6), (2, 4, 3, 6), -1),
        ((2, 4, 3, 6), (1, 5, 3, 6), -1),
    ],
    ids=["time", "other positions", "channels first", "another rank", "one style"],
)
def test_values(shape, style, axis):
    layer = AdaptiveInstanceNormalization(axis)
    content, style = samples(shape), samples(style, seed=7) * np.float32(3)
    y = layer(content, style)
    assert_right(y, content, style, layer.axis)
    assert layer.compute_output_shape(shape, style.shape) == shape
    assert layer.weights == []


def published(content, style):
    """sigma(style) * (content - mu(content)) / sigma(content) + mu(style), sigma with epsilon."""

    def mean_and_deviation(x):
        mean, variance = (f(x, axis=[1, 2], keepdims=True) for f in (ops.mean, ops.var))
        return mean, ops.sqrt(variance + 1e-5)

    mean, deviation = mean_and_deviation(content)
    style_mean, style_deviation = mean_and_deviation(style)
    return style_deviation * (content - mean) / deviation + style_mean


def test_gradients_of_content_and_style():
    """Against the published formula in float64.

    A gradient is a sum of a few products for each element of an image: it may be off by
    eps * sqrt(elements) of the largest, times a few for the condition 1 + |mean| / std of 2.5.
    """
    content, style = samples((2, 4, 3, 6)), samples((2, 5, 2, 6), seed=7)
    dy = samples((2, 4, 3, 6), seed=9)
    y, found = gradients(AdaptiveInstanceNormalization(), [content, style], dy)
    with float64_enabled():
        wide = [np.float64(each) for each in (content, style)]
        want_y, wanted = gradients(published, wide, np.float64(dy))
    for name, each, want in zip(
        ("y", "dcontent", "dstyle"), (y, *found), (want_y, *wanted), strict=True
    ):
        allowed = 32 * EPS["float32"] * np.sqrt(12) * np.abs(want).max()
        assert_within(each, want, allowed, name)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "float32"])
@pytest.mark.parametrize("given", ["float32", "float16", "int32"])
def test_dtypes(policy, given):
    content, style = samples().astype(given), samples((2, 4, 6), seed=7).astype(given)
    layer = AdaptiveInstanceNormalization(dtype=policy)
    y = layer(content, style)
    symbol = layer(keras.Input((5, 6), dtype=given), keras.Input((4, 6), dtype=given))
    assert keras.backend.standardize_dtype(y.dtype) == symbol.dtype == layer.compute_dtype
    rounding = 2 * EPS[layer.compute_dtype]
    assert_right(y, content.astype("float64"), style.astype("float64"), rounding=rounding)


def test_masks_of_both():
    y = AdaptiveInstanceNormalization()(
        samples(), samples((2, 4, 6), seed=7), content_mask=KEEP, style_mask=STYLE_KEEP
    )
    masks = {"keep": KEEP[..., None], "style_keep": STYLE_KEEP[..., None]}
    assert_right(y, samples(), samples((2, 4, 6), seed=7), **masks)


def test_a_model_with_masks_saves_and_loads(tmp_path):
    """Keras passes the masks of both; that of the content goes on."""
    tokens = [keras.Input((None,), dtype="int32") for _ in range(2)]
    embed = keras.layers.Embedding(4, 6, mask_zero=True)
    content, style = map(embed, tokens)
    y = AdaptiveInstanceNormalization(axis=2, name="norm")(content, style)
    assert y.shape == (None, None, 6)
    model = keras.Model(tokens, [content, style, y])
    embed.set_weights([samples((4, 6))])
    given = (
        np.where(KEEP, 1 + np.arange(10).reshape(2, 5) % 3, 0),
        np.where(STYLE_KEEP, [1, 3, 2, 1], 0),
    )
    content, style, y = model([ops.convert_to_tensor(each) for each in given])
    np.testing.assert_array_equal(to_numpy(normwise.keras_private.mask_of(y)), KEEP)
    masks = {"keep": KEEP[..., None], "style_keep": STYLE_KEEP[..., None]}
    assert_right(y, to_numpy(content), to_numpy(style), **masks)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(loaded(list(given))[-1]), to_numpy(y))
    config = loaded.get_layer("norm").get_config()
    assert (config["axis"], config["epsilon"]) == (2, 1e-5)
    registered = keras.saving.serialize_keras_object(loaded.get_layer("norm"))["registered_name"]
    assert registered == "normwise>AdaptiveInstanceNormalization"


@pytest.mark.parametrize("jit_compile", [True, False])
def test_fit_through_content_and_style(jit_compile):
    allow_torch_compile(jit_compile)
    content, style = keras.Input((4, 4, 3)), keras.Input((5, 5, 3))
    convolutions = [keras.layers.Conv2D(6, 3), keras.layers.Conv2D(6, 3)]
    y = AdaptiveInstanceNormalization()(convolutions[0](content), convolutions[1](style))
    model = keras.Model([content, style], keras.layers.Dense(1)(y))
    model.compile("adam", "mse", jit_compile=jit_compile)
    before = [convolution.get_weights() for convolution in convolutions]
    images = [samples((4, 4, 4, 3)), samples((4, 5, 5, 3))]
    model.fit(images, samples((4, 2, 2, 1)), verbose=0)
    for convolution, (kernel, _) in zip(convolutions, before, strict=True):
        moved = convolution.get_weights()[0] - kernel
        assert np.isfinite(moved).all()
        assert abs(moved).max() > 1e-5


@pytest.mark.skipif(BACKEND != "tensorflow", reason="extents unknown to the graph")
def test_tensorflow_graph_of_unknown_extents():
    import tensorflow as tf

    content, style = samples((2, 4, 3, 6)), samples((2, 5, 2, 6), seed=7)
    spec = [tf.TensorSpec([None, None, None, 6])] * 2
    y = tf.function(AdaptiveInstanceNormalization(), input_signature=spec)(content, style)
    assert_right(y, content, style)


def test_a_style_without_variance_gives_its_mean():
    style = np.full((2, 4, 6), 7.0, "float32")
    y = AdaptiveInstanceNormalization(epsilon=0.0)(samples(), style)
    np.testing.assert_array_equal(to_numpy(y), np.full((2, 5, 6), 7.0))


def raises(error, text):
    return pytest.raises(error, match=rf"(^|\x1b\[1m){re.escape(text)}($|\x1b\[0m)")


MISFITS = [
    (
        (2, 4, 5),
        "style of shape (2, 4, 5) has 5 channels on axis -1, but content of shape (2, 5, 6) has 6; "
        "pass one with as many",
    ),
    (
        (3, 4, 6),
        "style of shape (3, 4, 6) has 3 samples, but content of shape (2, 5, 6) has 2; pass a "
        "style for each, or one for all",
    ),
]


@pytest.mark.parametrize(("shape", "text"), MISFITS, ids=["channels", "batch"])
def test_a_style_that_does_not_fit(shape, text):
    layer = AdaptiveInstanceNormalization()
    with raises(ValueError, text):
        layer(samples(), samples(shape))
    with raises(ValueError, text):
        layer(*(keras.Input(batch_shape=each) for each in ((2, 5, 6), shape)))
    with raises(ValueError, text):
        layer.compute_output_shape((2, 5, 6), shape)


def test_arguments_and_inputs_of_instance_norm():
    with pytest.raises(ValueError, match="axis=0 is the batch axis, and group and instance norm"):
        AdaptiveInstanceNormalization(axis=0)
    with pytest.raises(ValueError, match="epsilon=-1 cannot be added to a variance"):
        AdaptiveInstanceNormalization(epsilon=-1)
    layer = AdaptiveInstanceNormalization()
    with pytest.raises(ValueError, match=r"mask has shape \(2, 4\), which does not fit x"):
        layer(samples(), samples(), style_mask=np.ones((2, 4), bool))
    x = samples().astype("complex64")
    for pair in (
        (samples(), x),
        (x, samples()),
        (keras.Input((5, 6)), keras.Input((5, 6), dtype="complex64")),
    ):
        with pytest.raises(TypeError, match="x has dtype complex64, and no norm is defined"):
            layer(*pair)
