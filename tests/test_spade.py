"""SPADE against its published definition in float64, in models, files and errors."""

import json
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
from norms import expected, randomize, samples
from reference import EPS

from normwise import keras_private, layers
from normwise.layers import SPADE

IMAGES, MAPS = (2, 6, 5, 4), (2, 4, 7, 3)


def maps(shape=MAPS, dtype="float32"):
    return np.random.default_rng(4).random(shape).astype(dtype)


def built(shape=IMAGES, of_maps=MAPS, **options):
    """A layer with biases that no initializer gives."""
    layer = SPADE(filters=8, **{"data_format": "channels_last", **options})
    layer.build(shape, of_maps)
    rng = np.random.default_rng(1)
    layer.set_weights([rng.normal(0, 0.3, w.shape) for w in layer.weights])
    return layer


def published(x, segmentation, kernel, bias, last_kernel, last_bias):
    """normalized * (1 + gamma) + beta of Park et al. 2019, all channels last.

    The map is resized as PyTorch's `interpolate` does by default: position i of n is that of the
    map at floor(i * m / n) of m. Their two last convolutions are the halves of one here.
    """
    for axis in (1, 2):
        n, m = x.shape[axis], segmentation.shape[axis]
        positions = np.array([int(np.floor(i * m / n)) for i in range(n)])
        segmentation = ops.take(segmentation, positions, axis=axis)
    hidden = ops.relu(ops.conv(segmentation, kernel, padding="same") + bias)
    gamma, beta = ops.split(ops.conv(hidden, last_kernel, padding="same") + last_bias, 2, axis=-1)
    mean, variance = (f(x, axis=[1, 2], keepdims=True) for f in (ops.mean, ops.var))
    return (x - mean) / ops.sqrt(variance + 1e-5) * (1 + gamma) + beta


def right_of(layer, x, segmentation, dy=None):
    """The definition's result in float64, and gradients, for a layer with channels last."""
    weights = [np.float64(to_numpy(w)) for w in layer.weights]
    with float64_enabled():
        arrays = [np.float64(x), np.float64(segmentation), *weights]
        return gradients(published, arrays, np.ones(x.shape) if dy is None else np.float64(dy))


@pytest.mark.parametrize("of_maps", [MAPS, (2, 6, 5, 3), (2, 12, 10, 3), (2, 1, 1, 3)])
def test_published_definition(of_maps):
    """Results and gradients, through three layers of sums of up to 9 * 8 products.

    Each sum may be off by eps * sqrt(72) of as large a number as there is, here a few times the
    largest.
    """
    layer, x, segmentation = built(of_maps=of_maps), samples(IMAGES), maps(of_maps)
    dy = samples(IMAGES, seed=9)

    def ours(x, segmentation, *weights):
        return layer.stateless_call(weights, [], x, segmentation)[0]

    arrays = [x, segmentation, *map(to_numpy, layer.weights)]
    y, found = gradients(ours, arrays, dy)
    want_y, wanted = right_of(layer, x, segmentation, dy)
    names = ("y", "dx", "dsegmentation", "dkernel", "dbias", "dlast_kernel", "dlast_bias")
    for name, each, want in zip(names, (y, *found), (want_y, *wanted), strict=True):
        allowed = 16 * EPS["float32"] * np.sqrt(72) * np.abs(want).max()
        assert_within(each, want, allowed, name)


def test_channels_first():
    layer = built()
    first = SPADE(filters=8, data_format="channels_first")
    x, segmentation = samples(IMAGES), maps()
    moved = [np.moveaxis(each, -1, 1) for each in (x, segmentation)]
    first.build(*(each.shape for each in moved))
    first.set_weights(layer.get_weights())
    want, _ = right_of(layer, x, segmentation)
    assert_within(np.moveaxis(to_numpy(first(*moved)), 1, -1), want, 1e-5)


def test_data_format_of_the_configuration():
    before = keras.config.image_data_format()
    try:
        for data_format, axis in (("channels_first", 1), ("channels_last", -1)):
            keras.config.set_image_data_format(data_format)
            layer = SPADE()
            assert (layer.data_format, layer.norm.axis) == (data_format, axis)
    finally:
        keras.config.set_image_data_format(before)


NORMS = {
    "group": lambda: layers.GroupNormalization(2, activation="relu"),
    "pixels": lambda: layers.LayerNormalization(),
    "whole": lambda: layers.LayerNormalization(axis=[1, 2, 3], gamma_offset=0.5),
    "rms": lambda: layers.RMSNormalization(activation="relu"),
    "response": lambda: layers.FilterResponseNormalization(),
}


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS.keys())
def test_every_norm_with_a_gamma_and_a_beta_of_its_own(make):
    layer, x, segmentation = SPADE(make(), filters=8), samples(IMAGES), maps()
    y = layer(x, segmentation)
    randomize(layer.norm)
    function, layer.norm.activation = layer.norm.activation, keras.activations.linear
    normed = np.float64(to_numpy(layer.norm(x)))
    layer.norm.activation = function
    resized = segmentation[:, [0, 0, 1, 2, 2, 3]][:, :, [0, 1, 2, 4, 5]]
    made = layer.modulation(layer.hidden(ops.convert_to_tensor(resized)))
    scale, shift = np.split(np.float64(to_numpy(made)), 2, axis=-1)
    want = normed * (1 + scale) + shift
    want = np.maximum(want, 0) if function is keras.activations.relu else want
    assert_within(to_numpy(layer(x, segmentation)), want, 2e-5)
    assert tuple(y.shape) == IMAGES


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("given", ["float32", "int32"])
def test_dtype_policies(policy, given):
    """The scale and the shift are rounded once by each convolution, y once."""
    layer = built(dtype=policy)
    x, segmentation = samples(IMAGES).astype(given), (maps() > 0.5).astype(given)
    y = layer(x, segmentation)
    symbol = layer(*(keras.Input(each.shape[1:], dtype=given) for each in (x, segmentation)))
    assert keras.backend.standardize_dtype(y.dtype) == symbol.dtype == layer.compute_dtype
    assert {w.dtype for w in layer.weights} == {"float32"}
    want, _ = right_of(layer, x, segmentation)
    normed = np.abs(expected(layer.norm, x.astype("float64")).y)
    allowed = 16 * EPS[layer.compute_dtype] * (1 + normed + abs(want))
    assert_within(to_numpy(y), want, allowed)


def test_a_model_of_any_extents_saves_and_loads(tmp_path):
    x, segmentation = keras.Input((None, None, 4)), keras.Input((None, None, 3))
    layer = SPADE(filters=8, name="spade")
    model = keras.Model([x, segmentation], layer(x, segmentation))
    assert model.output_shape == (None, None, None, 4)
    randomize(layer)
    for shape, of_maps in ((IMAGES, MAPS), ((2, 3, 8, 4), (2, 6, 2, 3))):
        arrays = [samples(shape), maps(of_maps)]
        want, _ = right_of(layer, *arrays)
        # Of weights between 0.5 and 1.5, and so of results of some hundreds.
        assert_within(to_numpy(model(arrays)), want, 1e-5 * np.abs(want).max())
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(loaded(arrays)), to_numpy(model(arrays)))


def test_a_mask_leaves_positions_out_of_the_statistics():
    layer, x = built(), samples(IMAGES)
    keep = np.random.default_rng(5).random(IMAGES[:3]) > 0.4
    made = layer(x, maps()) - layer(np.zeros_like(x), maps())
    scale = to_numpy(made) / expected(layer.norm, x).y
    shift = to_numpy(layer(np.zeros_like(x), maps()))
    want = expected(layer.norm, x, keep[..., None]).y * scale + shift
    given = ops.convert_to_tensor(x)
    keras_private.give_mask(given, ops.convert_to_tensor(keep))
    for y in (layer(x, maps(), mask=keep), layer(given, maps())):
        assert_within(to_numpy(y), want, 1e-4)


def test_config():
    layer = SPADE(
        layers.GroupNormalization(2, name="inner"),
        filters=8,
        kernel_size=5,
        data_format="channels_last",
        kernel_initializer=keras.initializers.RandomNormal(seed=1),
        bias_regularizer=keras.regularizers.L2(0.1),
        kernel_constraint=keras.constraints.UnitNorm(axis=0),
        name="n",
    )
    config = layer.get_config()
    json.dumps(config)
    layer(samples(IMAGES), maps())
    assert layer.get_config() == config
    assert [tuple(w.shape) for w in layer.hidden.weights] == [(5, 5, 3, 8), (8,)]
    assert [tuple(w.shape) for w in layer.modulation.weights] == [(5, 5, 8, 8), (8,)]
    assert len(layer.losses) == 2
    again = SPADE.from_config(config)
    assert again.get_config() == config
    again(samples((2, 6, 5, 6)), maps((2, 3, 3, 2)))
    registered = keras.saving.serialize_keras_object(layer)["registered_name"]
    assert registered == "normwise>SPADE"


@pytest.mark.parametrize("jit_compile", [True, False])
def test_fit_moves_every_weight(jit_compile):
    allow_torch_compile(jit_compile)
    x, segmentation = keras.Input((6, 5, 4)), keras.Input((3, 4, 3))
    y = SPADE(layers.GroupNormalization(2), filters=8)(x, segmentation)
    model = keras.Model([x, segmentation], keras.layers.Dense(1)(y))
    model.compile("adam", "mse", jit_compile=jit_compile)
    before = model.get_weights()
    arrays = [samples((4, 6, 5, 4)), maps((4, 3, 4, 3))]
    model.fit(arrays, np.ones((4, 6, 5, 1)), verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.isfinite(new).all()
        assert not np.array_equal(old, new)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="extents unknown to the graph")
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_tensorflow_graph_of_unknown_extents(data_format):
    import tensorflow as tf

    layer, x, segmentation = built(), samples(IMAGES), maps()
    want = to_numpy(layer(x, segmentation))
    if data_format == "channels_first":
        weights, layer = layer.get_weights(), SPADE(filters=8, data_format=data_format)
        x, segmentation = (np.moveaxis(each, -1, 1) for each in (x, segmentation))
        layer.build(x.shape, segmentation.shape)
        layer.set_weights(weights)
        want = np.moveaxis(want, -1, 1)
    channels = (4, 3)
    spec = [
        tf.TensorSpec(
            [None, None, None, n] if data_format == "channels_last" else [None, n, None, None]
        )
        for n in channels
    ]
    assert_within(tf.function(layer, input_signature=spec)(x, segmentation).numpy(), want, 1e-5)


def raises(error, text):
    return pytest.raises(error, match=rf"(^|\x1b\[1m){re.escape(text)}($|\x1b\[0m)")


RANK = "takes images and maps of rank 4; make labels a channel each, as by keras.ops.one_hot"
MISFITS = [
    ((2, 5, 4), MAPS, f"x has shape (2, 5, 4), but SPADE {RANK}"),
    (IMAGES, (2, 6, 5), f"segmentation has shape (2, 6, 5), but SPADE {RANK}"),
    (
        IMAGES,
        (3, 4, 7, 3),
        "segmentation has shape (3, 4, 7, 3), but x of shape (2, 6, 5, 4) has 2 samples; pass a "
        "map for each",
    ),
]


@pytest.mark.parametrize(("shape", "of_maps", "text"), MISFITS, ids=["x", "map", "batch"])
def test_images_and_maps_that_do_not_fit(shape, of_maps, text):
    # Once it is built, Keras checks the rank of x.
    for layer in (SPADE(), built())[: 2 if shape == IMAGES else 1]:
        with raises(ValueError, text):
            layer(samples(shape), maps(of_maps))
        with raises(ValueError, text):
            layer(*(keras.Input(batch_shape=each) for each in (shape, of_maps)))


def test_unknown_channels_of_the_map():
    text = "segmentation has shape (None, 8, 8, None), so the number of channels on axis -1 is "
    text += "unknown; give it a fixed extent, as in keras.Input((None, None, 16))"
    with raises(ValueError, text):
        SPADE()(keras.Input((8, 8, 4)), keras.Input((8, 8, None)))


def test_what_is_no_norm():
    text = "norm='instance' is no norm of normwise.layers; give SPADE one, as in SPADE("
    text += "normwise.layers.InstanceNormalization(center=False, scale=False))"
    with raises(TypeError, text):
        SPADE("instance")


def test_a_wrong_data_format():
    text = "data_format='NCHW' is no order of axes; use 'channels_last' or 'channels_first'"
    with raises(ValueError, text):
        SPADE(data_format="NCHW")
