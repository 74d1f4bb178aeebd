"""ReversibleInstanceNormalization: both ways, their gradients, masks, functional models and files.

The reference of the way there is the tests' own; of the way back, the formula and its gradients in
float64 NumPy. Float32 is off by a few tens of eps of the largest number that takes part.
"""

import copy
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
    to_numpy,
)
from norms import randomize, samples
from reference import EPS, Norm, group_labels

import normwise
from normwise.layers import ReversibleInstanceNormalization

KEEP = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], bool)
both_axes = pytest.mark.parametrize("axis", [1, 2])


def made(shape=(2, 5, 6), **options):
    """A layer built on a shape, with weights that no initializer gives."""
    layer = ReversibleInstanceNormalization(**options)
    layer.build((None, *shape[1:]))
    return randomize(layer)


def expected(layer, x, keep=None):
    features = 3 - layer.axis % 3
    gamma, beta = (None if w is None else to_numpy(w) for w in (layer.gamma, layer.beta))
    labels = group_labels(x.shape, features, x.shape[features])
    return Norm(x, gamma, beta, labels, (features,), layer.epsilon, keep=keep)


def statistics_of(right, axis=1):
    """Mean and deviation as the layer gives them, of the reference."""
    first = [slice(0, 1) if a == axis else slice(None) for a in range(3)]
    return right.mean[tuple(first)], np.sqrt(right.variance + right.epsilon)[tuple(first)]


def close(found, wanted, what="", units=64):
    assert_within(found, wanted, units * EPS["float32"] * np.abs(wanted).max(), what)


@pytest.mark.parametrize("axis", [1, 2, -1, -2])
@pytest.mark.parametrize("affine", [True, False])
def test_there_and_back(axis, affine):
    x = samples((3, 5, 7))
    layer = made(x.shape, axis=axis, affine=affine)
    features = x.shape[3 - axis % 3]
    assert [(w.name, tuple(w.shape)) for w in layer.trainable_weights] == [
        (name, (features,)) for name in ("gamma", "beta") if affine
    ]
    right = expected(layer, x)
    y, statistics = layer(x)
    assert_within(to_numpy(y), right.y, right.y_tolerance(EPS["float32"]), "y")
    for found, wanted in zip(statistics, statistics_of(right, axis % 3), strict=True):
        close(to_numpy(found), wanted, "statistics")
    close(to_numpy(layer.invert(y, statistics)), x, "x")


def forecast(y, weights):
    """A model of three steps, each of them a multiple of the series' last."""
    return y[:, -1:] * weights


def test_gradients_of_both_ways_and_of_a_forecast_between():
    x, c = samples((2, 5, 6)), samples((2, 3, 6), seed=1) - 3
    layer, weights = made(), samples((2, 3, 6), seed=2)
    gamma, beta = (to_numpy(w) for w in layer.weights)

    def call(x, weights, *parameters):
        (y, statistics), _ = layer.stateless_call(parameters, [], x)
        return layer.stateless_call(parameters, [], forecast(y, weights), statistics=statistics)[0]

    found, (dx, dweights, dgamma, dbeta) = gradients(call, [x, weights, gamma, beta], c)

    right = expected(layer, x)
    mean, deviation = statistics_of(right)
    z = forecast(right.y, weights.astype("float64"))
    close(found, (z - beta) / gamma * deviation + mean)
    dz = c * deviation / gamma
    ddeviation = (c * (z - beta) / gamma).sum(1, keepdims=True)
    dy = np.zeros(x.shape)
    dy[:, -1:] = (dz * weights).sum(1, keepdims=True)
    wanted_dx, wanted_dgamma, wanted_dbeta = right.gradients(dy)
    wanted_dx += (ddeviation * (right.x - mean) / deviation + c.sum(1, keepdims=True)) / x.shape[1]
    close(dx, wanted_dx, "dx", units=256)
    close(dweights, dz * right.y[:, -1:], "dweights", units=256)
    wanted_dgamma -= (dz * (z - beta) / gamma).sum((0, 1))
    close(dgamma, wanted_dgamma, "dgamma", units=256)
    close(dbeta, wanted_dbeta - dz.sum((0, 1)), "dbeta", units=256)


@pytest.mark.parametrize("epsilon", [1e-5, 0.0])
@pytest.mark.parametrize("value", [0.1, 3e4])
def test_a_constant_series_comes_back_as_it_was(value, epsilon):
    x = np.full((2, 5, 6), value, "float32")
    layer = made(epsilon=epsilon)

    def there_and_back(x):
        parameters = [w.value for w in layer.weights]
        (y, statistics), _ = layer.stateless_call(parameters, [], x)
        return layer.stateless_call(parameters, [], y, statistics=statistics)[0]

    found, (dx,) = gradients(there_and_back, [x], x)
    np.testing.assert_array_equal(found, x)
    assert np.isfinite(dx).all()
    np.testing.assert_array_equal(to_numpy(layer(x)[0])[0, 0], to_numpy(layer.beta))


def test_the_gradient_of_there_and_back_is_that_of_nothing():
    x, c = samples(), samples(seed=1)
    layer = made()
    parameters = [to_numpy(w) for w in layer.weights]

    def there_and_back(x, *parameters):
        (y, statistics), _ = layer.stateless_call(parameters, [], x)
        return layer.stateless_call(parameters, [], y, statistics=statistics)[0]

    _, (dx, *others) = gradients(there_and_back, [x, *parameters], c)
    close(dx, c, "dx", units=256)
    for found in others:
        assert_within(found, np.zeros(6), 1e-4)


def test_a_level_far_from_zero_comes_back():
    """At mean 1e6 and deviation 1 a series has few digits, and all of them return."""
    x = (samples() + 1e6).astype("float32")
    layer = made()
    y, statistics = layer(x)
    right = expected(layer, x)
    assert_within(to_numpy(y), right.y, right.y_tolerance(EPS["float32"]))
    assert_within(to_numpy(layer.invert(y, statistics)), x, 4 * np.spacing(np.float32(1e6)))


def test_a_gamma_near_zero_throws_no_forecast_out_of_proportion():
    layer, x = made(), samples()
    layer.gamma.assign([0.0, 1e-30, -1e-30, 2e-5, -2e-5, 1.0])
    layer.beta.assign(np.zeros(6))
    y, statistics = layer(x)
    mean, deviation = (to_numpy(each) for each in statistics)
    found = to_numpy(layer.invert(np.ones((2, 1, 6), "float32"), statistics))
    inverse = np.array([1e5, 1e5, -1e5, 5e4, -5e4, 1.0])
    close(found, inverse * deviation + mean)
    # Where it is no nearer than that, the series itself comes back.
    close(to_numpy(layer.invert(y, statistics))[..., 3:], x[..., 3:])


def test_padded_steps_leave_the_statistics():
    x = np.where(KEEP[..., None], samples(), 0)
    layer = made()
    right = expected(layer, x, KEEP[..., None])
    model = keras.Sequential([keras.Input((5, 6)), keras.layers.Masking(), layer])
    y, statistics = model(x)
    assert_within(to_numpy(y), right.y, right.y_tolerance(EPS["float32"]))
    for found, wanted in zip(statistics, statistics_of(right), strict=True):
        close(to_numpy(found), wanted)
    np.testing.assert_array_equal(to_numpy(y._keras_mask), KEEP)
    x = np.where(KEEP[..., None], x, np.nan)
    y, statistics = layer(x, mask=KEEP)
    back = to_numpy(layer.invert(y, statistics))
    close(back[KEEP], x[KEEP])


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int32"])
def test_dtypes(policy, dtype):
    with float64_enabled():
        layer = made(dtype=policy)
        # What float16 cannot hold comes back all the same.
        x = samples() * np.float32(1e5) if dtype == "float32" else samples().astype(dtype)
        y, statistics = layer(x)
        result = keras.DTypePolicy(policy).compute_dtype
        arithmetic = "float64" if "float64" in (policy, dtype) else "float32"
        back = layer.invert(y, statistics)
        symbols, symbol_statistics = layer(keras.Input((5, 6), dtype=dtype))
        symbol_back = layer.invert(symbols, symbol_statistics)
        for found, symbol, name in [
            (y, symbols, result),
            (statistics[0], symbol_statistics[0], arithmetic),
            (statistics[1], symbol_statistics[1], arithmetic),
            (back, symbol_back, arithmetic),
        ]:
            assert keras.backend.standardize_dtype(found.dtype) == symbol.dtype == name
            assert tuple(found.shape)[1:] == symbol.shape[1:]
        assert {w.dtype for w in layer.weights} == {keras.DTypePolicy(policy).variable_dtype}
        right = expected(layer, x.astype("float64"))
        tolerance = right.y_tolerance(EPS[arithmetic])
        assert_within(to_numpy(y), right.y, tolerance + 2 * EPS[result] * np.abs(right.y))
        # Of a y that was rounded, what comes back is off by as much of the deviation.
        size = np.abs(x).max() + np.abs(right.y / right.scale).max() * statistics_of(right)[1].max()
        assert_within(to_numpy(back), x.astype("float64"), 64 * EPS[result] * size)


def model_of(axis=1, steps=2, **options):
    """A forecast of a few steps as a functional model, in which the norm is used both ways."""
    shape = (5, 3) if axis == 1 else (3, 5)
    inputs = keras.Input(shape)
    norm = ReversibleInstanceNormalization(axis=axis, name="norm", **options)
    y, statistics = norm(inputs)
    if axis == 1:
        y = keras.layers.Permute((2, 1))(y)
    y = keras.layers.Dense(steps, name="dense")(y)
    if axis == 1:
        y = keras.layers.Permute((2, 1))(y)
    return keras.Model(inputs, norm.invert(y, statistics))


def series(count=8, axis=1):
    x = np.cumsum(samples((count, 5, 3)), axis=1) * np.float32(10)
    return x if axis == 1 else x.swapaxes(1, 2)


@both_axes
def test_a_functional_model_is_the_formula(axis):
    model, x = model_of(axis), series(axis=axis)
    norm, dense = randomize(model.get_layer("norm")), model.get_layer("dense")
    right = expected(norm, x)
    mean, deviation = statistics_of(right, axis)
    kernel, bias = (to_numpy(w).astype("float64") for w in dense.weights)
    y = right.y if axis == 2 else right.y.swapaxes(1, 2)
    y = y @ kernel + bias
    y = y if axis == 2 else y.swapaxes(1, 2)
    shape = (1, 1, -1) if axis == 1 else (1, -1, 1)
    gamma, beta = (to_numpy(w).astype("float64").reshape(shape) for w in norm.weights)
    wanted = (y - beta) / gamma * deviation + mean
    assert model.output_shape == (None, *wanted.shape[1:])
    close(to_numpy(model(x)), wanted)


@both_axes
@pytest.mark.parametrize("reload", ["keras", "h5", "weights", "clone", "copy", "config"])
# Of Keras, that the format is an old one.
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_a_model_with_both_ways_is_saved_and_shares_its_weights(axis, reload, tmp_path):
    model = model_of(axis)
    randomize(model.get_layer("norm"))
    y = to_numpy(model(series(axis=axis)))
    if reload in ("keras", "h5"):
        model.save(tmp_path / f"model.{reload}")
        other = keras.models.load_model(tmp_path / f"model.{reload}")
    elif reload == "weights":
        model.save_weights(tmp_path / "model.weights.h5")
        other = model_of(axis)
        other.load_weights(tmp_path / "model.weights.h5")
    elif reload == "copy":
        other = copy.deepcopy(model)
    else:
        other = (
            keras.models.clone_model(model)
            if reload == "clone"
            else keras.Model.from_config(model.get_config())
        )
        other.set_weights(model.get_weights())
    assert [w.path for w in other.weights] == [w.path for w in model.weights]
    np.testing.assert_array_equal(to_numpy(other(series(axis=axis))), y)
    norm = other.get_layer("norm")
    norm.gamma.assign(2 * norm.gamma)
    norm.beta.assign(norm.beta + 1)
    # Were gamma and beta of one way others, this would be another forecast by far.
    other.get_layer("dense").set_weights([np.eye(5, 2), np.zeros(2)])
    found, x = to_numpy(other(series(axis=axis))), series(axis=axis)
    close(found, x[:, :2] if axis == 1 else x[..., :2])


@pytest.mark.parametrize("jit_compile", [True, False])
def test_fit_moves_every_weight(jit_compile):
    allow_torch_compile(jit_compile)
    model = model_of()
    model.compile(keras.optimizers.Adam(1e-2), "mae", jit_compile=jit_compile)
    before = model.get_weights()
    x = series(8)
    losses = model.fit(x, x[:, -2:] + 1, batch_size=4, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.isfinite(new).all()
        assert not np.allclose(old, new, atol=1e-5)


def test_in_a_model_of_ones_own():
    class Forecast(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = ReversibleInstanceNormalization(affine=False)
            self.dense = keras.layers.Dense(3)

        def call(self, x):
            y, statistics = self.norm(x)
            return self.norm.invert(self.dense(y[:, -1:]), statistics)

    model = Forecast()
    x = series()
    y = model.predict(x, verbose=0)
    assert y.shape == (8, 1, 3)
    assert np.abs(y).max() > 10


@pytest.mark.skipif(BACKEND != "tensorflow", reason="extents unknown to the graph")
@pytest.mark.parametrize("jit_compile", [True, False])
def test_tensorflow_graph_of_unknown_extents(jit_compile):
    import tensorflow as tf

    layer, x = made(), samples()

    def there_and_back(x):
        y, statistics = layer(x)
        return layer.invert(y[:, :2], statistics)

    spec = [tf.TensorSpec([None, None, 6])]
    function = tf.function(there_and_back, jit_compile=jit_compile, input_signature=spec)
    close(function(x).numpy(), x[:, :2])


def test_stateless_call_compiled():
    layer, x = made(), samples()
    weights = [to_numpy(w) for w in layer.weights]

    def there_and_back(weights, x):
        (y, statistics), _ = layer.stateless_call(weights, [], x)
        return layer.stateless_call(weights, [], y, statistics=statistics)[0]

    close(to_numpy(compiled(there_and_back)(weights, x)), x)


def test_explain_knows_which_kernels_normalize_it():
    layer = ReversibleInstanceNormalization()
    choice = normwise.explain(layer, (8, 96, 7))
    assert choice == normwise.explain(normwise.ops.instance_norm, (8, 96, 7))


FULL = {
    "axis": 2,
    "epsilon": 1e-2,
    "affine": True,
    "gamma_initializer": keras.initializers.RandomNormal(seed=1),
    "beta_regularizer": keras.regularizers.L2(0.1),
    "gamma_constraint": keras.constraints.NonNeg(),
    "name": "n",
    "dtype": "mixed_bfloat16",
}


@pytest.mark.parametrize("options", [{}, FULL, {"affine": False}], ids=["", "full", "plain"])
def test_config_round_trip(options):
    config = ReversibleInstanceNormalization(**options).get_config()
    json.dumps(config)
    again = ReversibleInstanceNormalization.from_config(copy.deepcopy(config))
    assert again.get_config() == config
    wanted = {"axis": 1, "epsilon": 1e-5, "affine": True, **options}
    for name in ("axis", "epsilon", "affine"):
        assert config[name] == wanted[name]
    name = "normwise>ReversibleInstanceNormalization"
    assert keras.saving.get_registered_name(ReversibleInstanceNormalization) == name


def test_compute_output_shape():
    shapes = ReversibleInstanceNormalization().compute_output_shape((None, 5, 6))
    assert shapes == ((None, 5, 6), ((None, 1, 6), (None, 1, 6)))


def test_empty_batch():
    layer = ReversibleInstanceNormalization()
    y, statistics = layer(np.zeros((0, 5, 6), "float32"))
    assert to_numpy(layer.invert(y, statistics)).shape == (0, 5, 6)


def raises(error, text):
    return pytest.raises(error, match=re.escape(text))


@pytest.mark.parametrize("axis", [0, 3, -3, [1], [1, 2]])
def test_axes_of_no_series(axis):
    text = f"axis={axis} is no time axis of a series; use axis=1 for (batch, time, features), axis"
    with raises(ValueError, text):
        ReversibleInstanceNormalization(axis=axis)


def test_what_is_wrong_is_said():
    make = ReversibleInstanceNormalization
    with raises(TypeError, "axis='1' is no axis; expected an int"):
        make(axis="1")
    with raises(ValueError, "epsilon=-1 cannot be added to a variance"):
        make(epsilon=-1)
    with raises(TypeError, "affine=1 is neither True nor False; use one of them"):
        make(affine=1)
    text = "shape (8, 24) has rank 2, but a series is of shape (batch, time, features); give it an"
    with raises(ValueError, text):
        make()(np.zeros((8, 24), "float32"))
    with raises(ValueError, "the number of channels on axis 2 of shape (None, 5, None) is unknown"):
        make()(keras.Input((5, None)))
    with raises(ValueError, "mask has shape (2, 4), which does not fit x of shape (2, 5, 6)"):
        make()(samples(), mask=np.ones((2, 4), bool))
    with raises(ValueError, "mask has shape (None, 4), which does not fit x of shape"):
        make()(keras.Input((5, 6)), mask=keras.Input((4,), dtype="bool"))
    with raises(TypeError, "x has dtype complex64, and no norm is defined on complex numbers"):
        make()(keras.Input((5, 6), dtype="complex64"))
    with raises(ValueError, "expected axis 2 of input shape to have value 6"):
        made()(samples((2, 5, 7)))


def test_statistics_that_do_not_fit():
    layer = made()
    y, (mean, deviation) = layer(samples())
    rule = "but y of shape (2, 5, 6) needs a mean and a deviation of shape (2, 1, 6); pass what the"
    with raises(ValueError, f"statistics have the shapes [(2, 1, 6)], {rule}"):
        layer.invert(y, (mean,))
    with raises(ValueError, f"statistics have the shapes [(2, 6), (2, 1, 6)], {rule}"):
        layer.invert(y, (mean[:, 0], deviation))
    symbols, statistics = layer(keras.Input((5, 6)))
    with raises(ValueError, "needs a mean and a deviation of shape (None, 1, 6)"):
        layer.invert(symbols, [statistics[0], symbols])
