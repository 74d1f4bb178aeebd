"""What holds for all four layers: signature, weights, training, dtypes, shapes."""

import inspect

import keras
import numpy as np
import pytest
from frameworks import (
    BACKEND,
    allow_torch_compile,
    assert_within,
    compiled,
    float64_enabled,
    to_numpy,
)
from norms import NORMS, every_norm, expected, randomize, samples
from reference import SMALLEST

from normwise import layers

EPS = np.finfo(np.float32).eps
ROUNDING = {"float16": 2**-11, "bfloat16": 2**-8, "float32": EPS, "float64": 2**-52}

# Names, order and defaults, as Keras 3 and TensorFlow Addons have them; two new ones at the end.
AFFINE = {
    "axis": -1,
    "epsilon": 1e-3,
    "center": True,
    "scale": True,
    "beta_initializer": "zeros",
    "gamma_initializer": "ones",
    "beta_regularizer": None,
    "gamma_regularizer": None,
    "beta_constraint": None,
    "gamma_constraint": None,
    "activation": None,
    "gamma_offset": 0.0,
}
SIGNATURES = {
    "group": {"groups": 32, **AFFINE},
    "instance": AFFINE,
    "layer": AFFINE,
    "rms": {
        "axis": -1,
        "epsilon": 1e-6,
        "scale": True,
        "gamma_initializer": "ones",
        "gamma_regularizer": None,
        "gamma_constraint": None,
        "activation": None,
        "gamma_offset": 0.0,
    },
}


def signature(layer):
    parameters = list(inspect.signature(layer.__init__).parameters.values())[1:]
    assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    return {p.name: p.default for p in parameters[:-1]}


@pytest.mark.parametrize("name", NORMS)
def test_signature(name):
    found = signature(NORMS[name].layer)
    assert list(found.items()) == list(SIGNATURES[name].items())


@pytest.mark.parametrize("name", ["group", "layer", "rms"])
def test_signature_begins_as_that_of_keras(name):
    ours, theirs = (signature(c) for c in (NORMS[name].layer, NORMS[name].keras_layer))
    first = list(ours.items())[: len(theirs)]
    assert first == list(theirs.items())


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((4, 6), [1]),
        ((2, 5, 6), 2),
        ((2, 6, 5), -2),
        ((2, 3, 4, 6), [-1]),
        ((2, 6, 3, 4), 1),
        ((2, 3, 6, 4), (2,)),
        ((2, 3, 1, 4, 6), 4),
        ((2, 6, 3, 1, 4), -4),
    ],
)
@every_norm
def test_every_rank_and_form_of_axis(norm, shape, axis):
    layer, x = norm.make(axis=axis), samples(shape)
    layer.build((None, *shape[1:]))
    randomize(layer)
    right = expected(layer, x)
    assert_within(to_numpy(layer(x)), right.y, right.y_tolerance(EPS))
    assert layer.compute_output_shape((None, *shape[1:])) == (None, *shape[1:])


@every_norm
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_weights(norm, center, scale):
    if "beta" not in norm.weights and not center:
        pytest.skip("it has no beta, and so no center")
    options = {"scale": scale} if "beta" not in norm.weights else {"scale": scale, "center": center}
    layer = norm.make(**options)
    layer.build((None, 5, 6))
    wanted = [n for n in norm.weights if (scale if n == "gamma" else center)]
    assert [(w.name, tuple(w.shape), w.dtype) for w in layer.weights] == [
        (name, (6,), "float32") for name in wanted
    ]
    assert layer.trainable_weights == layer.weights
    randomize(layer)
    right = expected(layer, samples())
    assert_within(to_numpy(layer(samples())), right.y, right.y_tolerance(EPS))


def per_weight(norm, option, value):
    return {f"{name}_{option}": value for name in norm.weights}


@every_norm
def test_initializers(norm):
    layer = norm.make(**per_weight(norm, "initializer", keras.initializers.Constant(0.25)))
    layer.build((None, 5, 6))
    for weight in layer.weights:
        assert (to_numpy(weight) == 0.25).all()


@every_norm
def test_regularizers(norm):
    layer = norm.make(**per_weight(norm, "regularizer", keras.regularizers.L2(0.5)))
    layer.build((None, 5, 6))
    randomize(layer)
    layer(samples())
    wanted = [0.5 * np.sum(to_numpy(w) ** 2) for w in layer.weights]
    np.testing.assert_allclose([to_numpy(loss) for loss in layer.losses], wanted, rtol=1e-5)


@every_norm
def test_constraints_hold_after_a_step(norm):
    limit = keras.constraints.MaxNorm(0.01, axis=0)
    layer = norm.make(**per_weight(norm, "constraint", limit))
    layer.build((None, 5, 6))
    randomize(layer)
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.apply([keras.ops.zeros(6) for _ in layer.weights], layer.trainable_variables)
    for weight in layer.weights:
        assert 0 < np.linalg.norm(to_numpy(weight)) <= 0.01 + 1e-6


@every_norm
@pytest.mark.parametrize(
    "activation", ["relu", keras.activations.tanh, keras.layers.LeakyReLU(0.5)]
)
def test_activation(norm, activation):
    plain, active = norm.make(), norm.make(activation=activation)
    again = norm.layer.from_config(active.get_config())
    wanted = keras.activations.get(activation)(plain(samples()))
    for layer in (active, again):
        assert_within(to_numpy(layer(samples())), to_numpy(wanted), 1e-6)


@every_norm
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_gamma_offset(norm, policy):
    """With a gamma of -1 + 2^-20 and an offset of 1, which float16 would make a scale of 0."""
    layer = norm.make(gamma_offset=1.0, dtype=policy)
    layer.build((None, 5, 6))
    gamma = np.linspace(-1.0, 1.0, 6, dtype="float32") + np.float32(2**-20)
    layer.set_weights([gamma, *(np.full(w.shape, 2.0**-21) for w in layer.weights[1:])])
    found = to_numpy(layer(samples()))
    layer.gamma.assign(np.float64(gamma) + 1)
    right = expected(layer, samples())
    result = ROUNDING[layer.compute_dtype] * np.abs(right.y) + SMALLEST[layer.compute_dtype]
    assert_within(found, right.y, right.y_tolerance(EPS) + result)


@every_norm
def test_gamma_offset_in_configs(norm):
    layer = norm.make(gamma_initializer="zeros", gamma_offset=1)
    config = layer.get_config()
    assert config["gamma_offset"] == 1.0
    again = norm.layer.from_config(config)
    right = expected(norm_of_ones(norm), samples())
    assert_within(to_numpy(again(samples())), right.y, right.y_tolerance(EPS))
    del config["gamma_offset"]
    assert norm.layer.from_config(config).gamma_offset == 0.0


def norm_of_ones(norm):
    layer = norm.make()
    layer.build((None, 5, 6))
    return layer


@every_norm
@pytest.mark.parametrize("given", ["float64", "int32", "uint8", "bool"])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_arrays_of_another_dtype(norm, given, policy):
    x = samples().clip(0)
    x = x > 3 if given == "bool" else x.astype(given)
    assert_follows_policy(norm, x, policy)


@every_norm
@pytest.mark.parametrize("given", ["float32", "float16"])
@pytest.mark.parametrize("policy", ["float16", "mixed_float16", "mixed_bfloat16", "float64"])
def test_dtype_policies(norm, given, policy):
    with float64_enabled():
        assert_follows_policy(norm, samples().astype(given), policy)


def assert_follows_policy(norm, x, policy):
    layer = norm.make(dtype=policy)
    layer.build(x.shape)
    randomize(layer)
    y = layer(x)
    result = keras.DTypePolicy(policy).compute_dtype
    assert keras.backend.standardize_dtype(y.dtype) == result
    assert {w.dtype for w in layer.weights} == {keras.DTypePolicy(policy).variable_dtype}
    right = expected(layer, x.astype("float64"))
    tolerance = right.y_tolerance(2**-52 if policy == "float64" else EPS)
    assert_within(to_numpy(y), right.y, tolerance + ROUNDING[result] * np.abs(right.y))


@every_norm
def test_inputs_that_float16_cannot_hold(norm):
    x = samples() * np.float32(1e5)
    assert_follows_policy(norm, x, "mixed_float16")


@every_norm
def test_dynamic_batch_and_positions(norm):
    layer = norm.make()
    inputs = keras.Input((None, None, 6))
    model = keras.Model(inputs, layer(inputs))
    assert model.output_shape == (None, None, None, 6)
    randomize(layer)
    for shape in [(2, 3, 4, 6), (1, 5, 1, 6)]:
        right = expected(layer, samples(shape))
        assert_within(to_numpy(model(samples(shape))), right.y, right.y_tolerance(EPS))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="extents unknown to the graph")
@every_norm
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("jit_compile", [True, False])
def test_tensorflow_graph_of_unknown_extents(norm, axis, jit_compile):
    import tensorflow as tf

    shape = (2, 3, 4, 6) if axis == -1 else (2, 6, 3, 4)
    layer = norm.make(axis=axis)
    layer.build(shape)
    randomize(layer)
    spec = [extent if extent == 6 else None for extent in shape]
    function = tf.function(layer, jit_compile=jit_compile, input_signature=[tf.TensorSpec(spec)])
    right = expected(layer, samples(shape))
    assert_within(function(samples(shape)).numpy(), right.y, right.y_tolerance(EPS))


@pytest.mark.parametrize("jit_compile", [True, False])
def test_fit_moves_every_weight(jit_compile):
    """All norms in one model: of a compilation by torch, most seconds go to what is Keras's."""
    allow_torch_compile(jit_compile)
    x = keras.Input((None, 6))
    # Side by side: one after another would take out what the first adds, and leave beta no slope.
    y = keras.layers.add([norm.make()(x) for norm in NORMS.values()])
    model = keras.Model(x, keras.layers.Dense(1)(y))
    model.compile("adam", "mse", jit_compile=jit_compile)
    before = model.get_weights()
    model.fit(samples((4, 5, 6)), np.ones((4, 5, 1)), verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.isfinite(new).all()
        assert not np.allclose(old, new, atol=1e-5)


@every_norm
def test_stateless_call(norm):
    layer = norm.make()
    layer.build((None, 5, 6))
    weights = [np.full(w.shape, 2.0, "float32") for w in layer.trainable_variables]
    y, state = compiled(lambda w, x: layer.stateless_call(w, [], x))(weights, samples())
    assert state == []
    layer.set_weights(weights)
    assert_within(to_numpy(y), to_numpy(layer(samples())), 1e-5)


@every_norm
@pytest.mark.parametrize("training", [True, False, None])
def test_training_changes_nothing(norm, training):
    layer = norm.make()
    plain = to_numpy(layer(samples()))
    np.testing.assert_array_equal(to_numpy(layer(samples(), training=training)), plain)


@every_norm
def test_symbolic_dtype_is_that_of_the_policy(norm):
    y = norm.make(dtype="mixed_float16")(keras.Input((5, 6), dtype="int32"))
    assert (y.dtype, y.shape) == ("float16", (None, 5, 6))


@every_norm
def test_empty_batch(norm):
    assert to_numpy(norm.make()(np.zeros((0, 5, 6), "float32"))).shape == (0, 5, 6)


def test_channel_norms_keep_to_the_rank_and_channels_they_were_built_on():
    for layer in (layers.GroupNormalization(2), layers.InstanceNormalization()):
        layer(samples())
        with pytest.raises(ValueError, match="expected ndim=3, found ndim=4"):
            layer(samples((2, 5, 5, 6)))
        with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 6"):
            layer(samples((2, 5, 8)))


@pytest.mark.parametrize("make", [layers.LayerNormalization, layers.RMSNormalization])
def test_layer_norms_take_other_ranks(make):
    layer = make()
    for shape in [(2, 5, 6), (4, 6), (2, 3, 4, 6)]:
        right = expected(layer, samples(shape)) if layer.built else None
        y = to_numpy(layer(samples(shape)))
        right = right or expected(layer, samples(shape))
        assert_within(y, right.y, right.y_tolerance(EPS))


@pytest.mark.parametrize("make", [layers.LayerNormalization, layers.RMSNormalization])
@pytest.mark.parametrize("axis", [[3, 1], (1, 3), [-1, -3], [1, 2, 3], [2, 3]])
def test_layer_norms_over_lists_of_axes(make, axis):
    layer, x = make(axis=axis), samples((2, 3, 4, 5))
    layer.build((None, 3, 4, 5))
    shape = tuple(x.shape[a] for a in sorted(a % 4 for a in axis))
    assert [tuple(w.shape) for w in layer.weights] == [shape] * len(layer.weights)
    randomize(layer)
    right = expected(layer, x)
    assert_within(to_numpy(layer(x)), right.y, right.y_tolerance(EPS))


@pytest.mark.parametrize("make", [layers.LayerNormalization, layers.RMSNormalization])
def test_layer_norms_without_parameters_take_axes_of_unknown_extent(make):
    options = (
        {"scale": False} if make is layers.RMSNormalization else {"scale": False, "center": False}
    )
    inputs = keras.Input((None, 6))
    model = keras.Model(inputs, make(axis=[1, 2], **options)(inputs))
    right = expected(model.layers[-1], samples())
    assert_within(to_numpy(model(samples())), right.y, right.y_tolerance(EPS))
