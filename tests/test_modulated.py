"""Modulated: published definitions, conditions, gates, residuals, masks, dtypes, files, errors."""

import json
import re

import keras
import numpy as np
import pytest
from frameworks import (
    BACKEND,
    allow_torch_compile,
    assert_within,
    compiled,
    float64_enabled,
    gradients,
    in_one_graph,
    to_numpy,
)
from keras import ops
from norms import NORMS, Case, expected, randomize, samples
from reference import EPS

import normwise
from normwise import layers
from normwise.layers import Modulated

CASES = {
    **NORMS,
    "response": Case(layers.FilterResponseNormalization, None, {"axis": [1]}),
}
LABELS = np.array([2, 0], "int32")
CONDITION = np.random.default_rng(3).normal(size=(2, 4)).astype("float32")
KEEP = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]], bool)

every_norm = pytest.mark.parametrize("norm", CASES.values(), ids=CASES.keys())


def plain(make=layers.LayerNormalization, **options):
    """A norm without gamma and beta."""
    return make(center=False, scale=False, **options)


def normalized(x, axes, epsilon):
    """(x - mean) / sqrt(var + epsilon) over axes, which for group norm are those of x in groups."""
    variance = ops.var(x, axis=axes, keepdims=True)
    return (x - ops.mean(x, axis=axes, keepdims=True)) / ops.sqrt(variance + epsilon)


def adaptive_layer_norm(x, condition, kernel, bias):
    """The `modulate` of DiT, and the gate of its residual branch (Peebles and Xie 2023)."""
    made = ops.matmul(ops.silu(condition), kernel) + bias
    scale, shift, gate = ops.split(made[:, None, :], 3, axis=-1)
    return normalized(x, [-1], 1e-6) * (1 + scale) + shift, gate


def adaptive_group_norm(x, condition, kernel, bias, gamma, beta):
    """Group norm with its own gamma and beta, then y * (1 + scale) + shift, and SiLU.

    The residual block of guided diffusion with `use_scale_shift_norm` (Dhariwal and Nichol 2021).
    """
    grouped = ops.reshape(x, (2, 4, 3, 3, 2))
    y = ops.reshape(normalized(grouped, [1, 2, 4], 1e-5), (2, 4, 3, 6)) * gamma + beta
    made = ops.matmul(ops.silu(condition), kernel) + bias
    scale, shift = ops.split(made[:, None, None, :], 2, axis=-1)
    return (ops.silu(y * (1 + scale) + shift),)


def film(x, condition, kernel, bias):
    """gamma * z + beta for every channel, channels first here, of a linear map (Perez 2018).

    With the paper's remedy against gammas near 0: the map predicts gamma - 1.
    """
    made = ops.matmul(condition, kernel) + bias
    scale, shift = (each[:, :, None, None] for each in ops.split(made, 2, axis=-1))
    return (normalized(x, [2, 3], 1e-3) * (1 + scale) + shift,)


def conditional_instance_norm(x, labels, table):
    """gamma[label] * z + beta[label], where a row holds gamma - 1 and beta (Dumoulin 2017)."""
    scale, shift = ops.split(ops.take(table, labels, axis=0)[:, None, None, :], 2, axis=-1)
    return (normalized(x, [1, 2], 1e-3) * (1 + scale) + shift,)


PUBLISHED = {
    "AdaLN-zero of DiT": (
        lambda: Modulated(plain(epsilon=1e-6), gate=True, condition_activation="silu"),
        (2, 5, 6),
        CONDITION,
        adaptive_layer_norm,
    ),
    "AdaGN of guided diffusion": (
        lambda: Modulated(
            layers.GroupNormalization(3, epsilon=1e-5, activation="silu"),
            condition_activation="silu",
        ),
        (2, 4, 3, 6),
        CONDITION,
        adaptive_group_norm,
    ),
    "FiLM": (
        lambda: Modulated(plain(layers.InstanceNormalization, axis=1)),
        (2, 6, 4, 3),
        CONDITION,
        film,
    ),
    "conditional instance norm": (
        lambda: Modulated(plain(layers.InstanceNormalization), classes=3),
        (2, 4, 3, 6),
        LABELS,
        conditional_instance_norm,
    ),
}


@pytest.mark.parametrize(
    ("make", "shape", "condition", "definition"), PUBLISHED.values(), ids=PUBLISHED.keys()
)
def test_published_definitions(make, shape, condition, definition):
    """Results and gradients against the definition in float64.

    Each is a sum of products of a few roundings, of no more terms than x has elements: it may be
    off by eps * sqrt(terms) times as large a number as there is, here a few times the largest.
    """
    layer, x = make(), samples(shape)
    layer.build(shape, condition.shape)
    rng = np.random.default_rng(1)
    weights = [rng.normal(0.5, 0.5, w.shape).astype("float32") for w in layer.weights]
    labels = condition.dtype == np.int32
    arrays = [x, *weights] if labels else [x, condition, *weights]
    results = layer.compute_output_shape(shape)
    total = shape[0] * (np.prod(shape[1:]) + (6 if len(results) == 2 else 0))
    dy = rng.normal(size=(total,)).astype("float32")

    def flat(function):
        def result(*tensors):
            x, *rest = tensors
            given = [ops.convert_to_tensor(condition)] if labels else []
            outputs = function(x, *given, *rest)
            return ops.concatenate([ops.reshape(each, (-1,)) for each in outputs])

        return result

    def ours(x, condition, *weights):
        outputs, _ = layer.stateless_call(weights, [], x, condition)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    found = gradients(flat(ours), arrays, dy)
    with float64_enabled():
        wide = [np.float64(each) for each in arrays]
        right = gradients(flat(definition), wide, np.float64(dy))
    names = ("x", *([] if labels else ["condition"]), *(w.name for w in layer.weights))
    for name, each, want in zip(
        ("y", *names), (found[0], *found[1]), (right[0], *right[1]), strict=True
    ):
        allowed = 8 * EPS["float32"] * np.sqrt(x.size) * np.abs(want).max()
        assert_within(each, want, allowed, name)


@every_norm
@pytest.mark.parametrize("classes", [None, 3], ids=["features", "labels"])
def test_at_first_it_is_the_norm(norm, classes):
    condition = CONDITION if classes is None else LABELS
    layer = Modulated(norm.make(gamma_offset=0.5, activation="tanh"), gate=True, classes=classes)
    layer.build((2, 5, 6), condition.shape)
    randomize(layer.norm)
    y, gate = layer(samples(), condition)
    assert_within(to_numpy(y), to_numpy(layer.norm(samples())), 1e-6)
    np.testing.assert_array_equal(to_numpy(gate), np.zeros((2, 1, 6)))


def modulated(norm, classes=None, **options):
    """A layer with weights that no initializer gives, and the condition for it."""
    condition = CONDITION if classes is None else LABELS
    layer = Modulated(norm.make(), classes=classes, **options)
    layer.build((None, 5, 6), (None, *condition.shape[1:]))
    return randomize(layer), condition


def parts(layer, condition):
    """The scale, the shift and the gate of each sample, (batch, 1, 6), in float64."""
    kernel = np.float64(to_numpy(layer.kernel))
    if layer.classes is None:
        made = np.float64(condition) @ kernel + to_numpy(layer.bias)
    else:
        made = kernel[condition]
    return np.split(made[:, None, :], made.shape[-1] // 6, axis=-1)


def assert_modulated(layer, x, condition, y, keep=None, rounding=0.0):
    """Of the result of `layer` on x, whose scale and shift are sums of features + 1 products."""
    right = expected(layer.norm, x, keep)
    scale, shift, *_ = parts(layer, condition)
    want = right.y * (1 + scale) + shift
    eps = EPS["float32"]
    made = eps * 8 * (np.abs(right.y) + 1) * (1 + np.abs(scale) + np.abs(shift))
    allowed = np.abs(1 + scale) * right.y_tolerance(eps) + made
    assert_within(to_numpy(y), want, allowed + rounding * np.abs(want))


@every_norm
@pytest.mark.parametrize("classes", [None, 3], ids=["features", "labels"])
@pytest.mark.parametrize("gate", [False, True], ids=["", "gate"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("mask", [None, KEEP], ids=["", "mask"])
def test_results(norm, classes, gate, residual, mask):
    layer, condition = modulated(norm, classes, gate=gate)
    x, other = samples(), samples(seed=5)
    results = layer(x, condition, mask=mask, residual=other if residual else None)
    results = list(results) if isinstance(results, tuple) else [results]
    assert len(results) == 1 + gate + residual
    total = x + other if residual else x
    keep = None if mask is None else mask[..., None]
    assert_modulated(layer, total, condition, results.pop(0), keep)
    if residual:
        np.testing.assert_array_equal(to_numpy(results.pop(0)), total)
    if gate:
        *_, want = parts(layer, condition)
        assert_within(to_numpy(results.pop(0)), want, 8 * EPS["float32"] * (1 + abs(want)))


def test_a_norm_over_several_axes_has_a_scale_for_each_of_their_elements():
    layer = Modulated(layers.LayerNormalization(axis=[2, 1]), gate=True)
    y, gate = layer(samples(), CONDITION)
    assert [tuple(w.shape) for w in layer.weights] == [(4, 90), (90,), (5, 6), (5, 6)]
    assert tuple(gate.shape) == tuple(y.shape) == (2, 5, 6)
    rng = np.random.default_rng(1)
    layer.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layer.weights])
    made = np.float64(CONDITION) @ to_numpy(layer.kernel) + to_numpy(layer.bias)
    scale, shift, _ = np.split(made.reshape(2, 15, 6), 3, axis=1)
    right = expected(layer.norm, samples())
    y, _ = layer(samples(), CONDITION)
    assert_within(to_numpy(y), right.y * (1 + scale) + shift, 1e-5)


@pytest.mark.filterwarnings("ignore:.*rms_scaling:UserWarning")
def test_rms_scaling():
    norm = layers.LayerNormalization(rms_scaling=True)
    layer = Modulated(norm)
    layer.build((2, 5, 6), CONDITION.shape)
    randomize(layer)
    scale, shift = parts(layer, CONDITION)
    want = to_numpy(norm(samples())) * (1 + scale) + shift
    assert_within(to_numpy(layer(samples(), CONDITION)), want, 1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "float64"])
@pytest.mark.parametrize("given", ["float32", "float16", "int32"])
def test_dtypes(policy, given):
    """Arithmetic is in float32: y and the gate are rounded once."""
    with float64_enabled():
        layer = Modulated(NORMS["group"].make(dtype=policy), gate=True)
        assert layer.dtype_policy.name == policy
        x = samples().astype(given)
        layer.build(x.shape, CONDITION.shape)
        randomize(layer)
        result = keras.DTypePolicy(policy).compute_dtype
        y, gate = layer(x, CONDITION.astype("float16"))
        symbols = layer(keras.Input((5, 6), dtype=given), keras.Input((4,), dtype="float16"))
        for each, symbol in zip((y, gate), symbols, strict=True):
            assert keras.backend.standardize_dtype(each.dtype) == symbol.dtype == result
        condition = CONDITION.astype("float16")
        assert_modulated(layer, np.float64(x), condition, y, rounding=2 * EPS[result])
        *_, want = parts(layer, condition)
        allowed = 8 * EPS["float32"] * (1 + abs(want)) + EPS[result] * abs(want)
        assert_within(to_numpy(gate), want, allowed)


def test_a_scale_near_zero_keeps_its_digits():
    """One of -1 + 2^-20, which leaves of y 2^-20 of the norm, and float16 would leave nothing."""
    layer = Modulated(plain(), dtype="mixed_float16")
    layer.build((2, 5, 6), (2, 4))
    layer.bias.assign(np.repeat([2**-20 - 1, 0], 6))
    y = to_numpy(layer(samples() * 1e3, CONDITION))
    want = expected(layer.norm, samples() * np.float32(1e3)).y * 2**-20
    assert_within(y, want, 1e-3 * abs(want) + 2.0**-24)


def model_of(norm, classes):
    """Tokens with a mask, and a modulated norm of their sum with a residual."""
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    residual = keras.Input((None, 6), name="residual")
    condition = keras.Input(() if classes else (4,), dtype="int32" if classes else "float32")
    x = keras.layers.Embedding(4, 6, mask_zero=True)(tokens)
    layer = Modulated(norm.make(), gate=True, classes=classes, name="modulated")
    y, total, gate = layer(x, condition, residual=residual)
    return keras.Model([tokens, condition, residual], [y, total, gate, total + gate * y])


@every_norm
@pytest.mark.parametrize("classes", [None, 3], ids=["features", "labels"])
def test_a_model_with_a_mask_saves_and_loads(norm, classes, tmp_path):
    model = model_of(norm, classes)
    symbols = model.outputs[:3]
    assert [s.shape for s in symbols] == [(None, None, 6), (None, None, 6), (None, 1, 6)]
    for symbol in symbols[:2]:
        assert normwise.keras_private.mask_of(symbol).shape == (None, None)
    layer = randomize(model.get_layer("modulated"))
    tokens, condition = (
        np.array([[3, 1, 2, 0, 0], [1, 0, 2, 1, 0]]),
        LABELS if classes else CONDITION,
    )
    arrays = (tokens, condition, samples(seed=5))
    results = model([ops.convert_to_tensor(each) for each in arrays])
    for each in results[:2]:
        np.testing.assert_array_equal(to_numpy(normwise.keras_private.mask_of(each)), KEEP)
    y, total, *_ = results
    assert_modulated(layer, to_numpy(total), condition, y, KEEP[..., None])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for found, want in zip(loaded(list(arrays)), results, strict=True):
        np.testing.assert_array_equal(to_numpy(found), to_numpy(want))


def test_config():
    layer = Modulated(
        layers.GroupNormalization(3, activation="relu", name="inner"),
        gate=True,
        condition_activation="silu",
        kernel_initializer=keras.initializers.RandomNormal(seed=1),
        bias_regularizer=keras.regularizers.L2(0.1),
        kernel_constraint=keras.constraints.UnitNorm(axis=0),
        name="n",
        dtype="mixed_bfloat16",
    )
    config = layer.get_config()
    json.dumps(config)
    layer(samples(), CONDITION)
    assert layer.get_config() == config
    again = Modulated.from_config(config)
    assert again.get_config() == config
    assert type(again.norm) is layers.GroupNormalization
    again(samples((2, 5, 9)), np.ones((2, 7)))
    registered = keras.saving.serialize_keras_object(layer)["registered_name"]
    assert registered == "normwise>Modulated"


def test_initializers_regularizers_and_constraints():
    layer = Modulated(
        plain(),
        kernel_initializer="ones",
        bias_initializer=keras.initializers.Constant(2.0),
        kernel_regularizer=keras.regularizers.L1(0.5),
        bias_constraint=keras.constraints.NonNeg(),
    )
    layer(samples(), CONDITION)
    np.testing.assert_array_equal(to_numpy(layer.kernel), np.ones((4, 12)))
    np.testing.assert_array_equal(to_numpy(layer.bias), np.full(12, 2.0))
    assert_within(to_numpy(layer.losses[0]), 24.0, 1e-4)
    gradient = [ops.zeros(w.shape) for w in layer.trainable_variables]
    layer.bias.assign(np.full(12, -1.0))
    keras.optimizers.SGD(0.1).apply(gradient, layer.trainable_variables)
    np.testing.assert_array_equal(to_numpy(layer.bias), np.zeros(12))


@pytest.mark.parametrize("classes", [None, 3], ids=["features", "labels"])
@pytest.mark.parametrize("jit_compile", [True, False])
def test_fit_moves_every_weight(classes, jit_compile):
    allow_torch_compile(jit_compile)
    x = keras.Input((5, 6))
    condition = keras.Input(() if classes else (4,), dtype="int32" if classes else "float32")
    layer = Modulated(layers.GroupNormalization(3), gate=True, classes=classes)
    y, gate = layer(x, condition)
    model = keras.Model([x, condition], keras.layers.Dense(1)(x + (1 + gate) * y))
    model.compile("adam", "mse", jit_compile=jit_compile)
    before = model.get_weights()
    given = np.array([0, 1, 2, 0], "int32") if classes else np.ones((4, 4), "float32")
    model.fit([samples((4, 5, 6)), given], np.ones((4, 5, 1)), verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.isfinite(new).all()
        assert not np.array_equal(old, new)


@pytest.mark.skipif(BACKEND != "torch", reason="torch.compile")
def test_one_graph_of_torch_compile():
    import torch

    layer, _ = modulated(NORMS["layer"])
    x, condition = torch.tensor(samples()), torch.tensor(CONDITION)
    assert_within(to_numpy(in_one_graph(layer)(x, condition)), to_numpy(layer(x, condition)), 1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="extents unknown to the graph")
def test_tensorflow_graph_of_unknown_extents():
    import tensorflow as tf

    layer, _ = modulated(NORMS["instance"], gate=True)
    spec = [tf.TensorSpec([None, None, 6]), tf.TensorSpec([None, 4])]
    y, gate = tf.function(layer, input_signature=spec)(samples(), CONDITION)
    assert_modulated(layer, samples(), CONDITION, y)
    assert tuple(gate.shape) == (2, 1, 6)


def test_compiled_is_the_same():
    layer, condition = modulated(NORMS["group"])
    y = compiled(lambda x, c: layer(x, c))(*map(ops.convert_to_tensor, (samples(), condition)))
    assert_modulated(layer, samples(), condition, y)


def test_an_empty_batch():
    y, gate = Modulated(plain(), gate=True)(np.zeros((0, 5, 6)), np.zeros((0, 4)))
    assert (tuple(y.shape), tuple(gate.shape)) == ((0, 5, 6), (0, 1, 6))


def test_output_shapes():
    layer, shape = Modulated(layers.GroupNormalization(3, axis=1), gate=True), (None, 6, 5, 4)
    assert layer.compute_output_shape(shape, (None, 4)) == (shape, (None, 6, 1, 1))
    shapes = layer.compute_output_shape(shape, (None, 4), shape)
    assert shapes == (shape, shape, (None, 6, 1, 1))
    assert Modulated(plain()).compute_output_shape((2, 5, 6), (2, 4)) == (2, 5, 6)


def test_explain():
    layer = Modulated(layers.GroupNormalization(3))
    choice = normwise.explain(layer, (2, 5, 6))
    assert choice.kernel in ("native", "torch", "composite")
    with pytest.raises(TypeError, match="a layer has its options itself; leave out groups"):
        normwise.explain(layer, (2, 5, 6), groups=3)


def raises(error, text):
    return pytest.raises(error, match=rf"(^|\x1b\[1m){re.escape(text)}($|\x1b\[0m)")


@pytest.mark.parametrize("norm", [None, "layer", layers.TLU(name="tlu"), keras.layers.Dense(3)])
def test_what_is_no_norm(norm):
    text = f"norm={norm!r} is no norm of normwise.layers; give Modulated one, as in "
    text += "Modulated(normwise.layers.InstanceNormalization(center=False, scale=False))"
    with raises(TypeError, text):
        Modulated(norm)


@pytest.mark.parametrize("classes", [0, -1, True, 2.0, "3", [3]])
def test_what_is_no_number_of_classes(classes):
    text = f"classes={classes!r} is no number of labels; expected a positive int, or None for a "
    with raises(ValueError, text + "condition of features"):
        Modulated(plain(), classes=classes)


def test_an_activation_of_labels():
    text = "condition_activation='silu' has no meaning for labels; leave it out, or classes=3"
    with raises(ValueError, text):
        Modulated(plain(), classes=3, condition_activation="silu")


BAD_CONDITIONS = {
    "positions": (
        {},
        (2, 5, 4),
        "condition has shape (2, 5, 4), but it is to be (batch, features); take a mean over "
        "positions, or for labels set classes to their number",
    ),
    "labels": (
        {},
        (2,),
        "condition has shape (2,), but it is to be (batch, features); take a mean over positions, "
        "or for labels set classes to their number",
    ),
    "one-hot": (
        {"classes": 3},
        (2, 3),
        "condition has shape (2, 3), but with classes=3 it is a label for each sample, (batch,); "
        "pass integers of that shape, or leave classes out",
    ),
    "another batch": (
        {},
        (3, 4),
        "condition has shape (3, 4), but x of shape (2, 5, 6) has 2 samples; pass one for each",
    ),
}


@pytest.mark.parametrize("built", [False, True], ids=["new", "built"])
@pytest.mark.parametrize(
    ("options", "shape", "text"), BAD_CONDITIONS.values(), ids=BAD_CONDITIONS.keys()
)
def test_conditions_of_a_wrong_shape(options, shape, text, built):
    for symbolic in (False, True):
        layer = Modulated(plain(), **options)
        dtype = "int32" if options else "float32"
        if built:
            layer.build((2, 5, 6), (2,) if options else (2, 4))
        x, condition = samples(), np.ones(shape, dtype)
        if symbolic:
            x = keras.Input(batch_shape=(2, 5, 6))
            condition = keras.Input(batch_shape=shape, dtype=dtype)
        with raises(ValueError, text):
            layer(x, condition)


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_labels_that_are_no_integers(dtype):
    text = f"condition has dtype {dtype}, but with classes=3 it is a label for each sample; pass "
    text += "integers, or leave classes out for features"
    layer = Modulated(plain(), classes=3)
    for x, labels in (
        (samples(), np.ones(2, dtype)),
        (keras.Input((5, 6)), keras.Input((), dtype=dtype)),
    ):
        with raises(TypeError, text):
            layer(x, labels)


def test_other_features_than_the_layer_was_built_for():
    layer = Modulated(plain())
    layer(samples(), CONDITION)
    text = "condition has 3 features, but the layer was built for 4; pass as many, or make another "
    with raises(ValueError, text + "layer"):
        layer(samples(), CONDITION[:, :3])


def test_unknown_features():
    text = "condition has shape (None, None), so the number of its features is unknown; give it a "
    text += "fixed extent, as in keras.Input((16,))"
    with raises(ValueError, text):
        Modulated(plain())(keras.Input((5, 6)), keras.Input((None,)))


def test_a_norm_over_the_batch():
    text = "axis=[0, 1] of the norm is the batch of shape (2, 6) too, but a condition is that of "
    text += "one sample; leave axis 0 out"
    with raises(ValueError, text):
        Modulated(plain(axis=[0, 1]))(samples((2, 6)), CONDITION)


def test_axes_of_unknown_extent():
    text = "axis=[1, 2] of shape (None, None, 6) has an unknown extent, so the shape of what the "
    text += "condition makes is unknown; give it a fixed extent"
    with raises(ValueError, text):
        Modulated(plain(axis=[1, 2]))(keras.Input((None, 6)), keras.Input((4,)))


def test_it_keeps_to_the_channels_it_was_built_on():
    layer = Modulated(layers.GroupNormalization(3))
    layer(samples(), CONDITION)
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 6"):
        layer(samples((2, 5, 9)), CONDITION)
