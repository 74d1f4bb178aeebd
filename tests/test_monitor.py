"""The monitor of norms: its numbers against float64, its verdicts, and training as without it."""

import csv
import dataclasses
import sys

import keras
import numpy as np
import pytest
from frameworks import BACKEND, assert_within, to_numpy
from reference import EPS, Norm, group_labels, layer_labels

from normwise import layers
from normwise.models import NormMonitor, Reading, pictures, readings, watching

RNG = np.random.default_rng(0)
X = RNG.normal(3.0, 2.0, (8, 5, 6)).astype("float32")
Y = RNG.normal(size=(8, 1)).astype("float32")


def read(model, x=X, y=None, **options):
    """A monitor with one reading of a model."""
    made = NormMonitor(x, y, **options)
    made.set_model(model)
    made.on_train_begin()
    return made


def alone(layer, shape=X.shape[1:]):
    """A model of one layer."""
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(inputs))


def trainable(*norms, seed=0, shape=X.shape[1:]):
    """A compiled model of these norms between dense layers."""
    keras.utils.set_random_seed(seed)
    made = [keras.Input(shape)]
    for norm in norms:
        made += [keras.layers.Dense(6), norm]
    made += [keras.layers.Flatten(), keras.layers.Dense(1)]
    model = keras.Sequential(made)
    model.compile("sgd", "mse")
    return model


def sets_by(labels, x):
    """The elements of each set."""
    return [x[labels == label].astype("float64") for label in np.unique(labels)]


# By name: the layer, the labels of its sets for X, and whether the mean is subtracted.
STATISTICS = {
    "group": (lambda: layers.GroupNormalization(3), group_labels(X.shape, 2, 3), True),
    "instance": (lambda: layers.InstanceNormalization(), group_labels(X.shape, 2, 6), True),
    "layer": (lambda: layers.LayerNormalization(), layer_labels(X.shape, [2]), True),
    "layer, middle": (lambda: layers.LayerNormalization(axis=1), layer_labels(X.shape, [1]), True),
    "rms": (lambda: layers.RMSNormalization(), layer_labels(X.shape, [2]), False),
    "filter response": (
        lambda: layers.FilterResponseNormalization(axis=1),
        group_labels(X.shape, 2, 6),
        False,
    ),
    "global response": (
        lambda: layers.GlobalResponseNormalization(),
        group_labels(X.shape, 2, 6),
        False,
    ),
    "reversible": (
        lambda: layers.ReversibleInstanceNormalization(),
        group_labels(X.shape, 2, 6),
        True,
    ),
    "batch": (lambda: keras.layers.BatchNormalization(), layer_labels(X.shape, [0, 1]), True),
    "Keras's group": (
        lambda: keras.layers.GroupNormalization(3),
        group_labels(X.shape, 2, 3),
        True,
    ),
    "Keras's layer": (lambda: keras.layers.LayerNormalization(), layer_labels(X.shape, [2]), True),
    "Keras's RMS": (lambda: keras.layers.RMSNormalization(), layer_labels(X.shape, [2]), False),
    "unit": (lambda: keras.layers.UnitNormalization(), layer_labels(X.shape, [2]), False),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_those_of_the_sets(name):
    """Each is a mean over sets of sums over a set, of numbers of one size: a few roundings."""
    make, labels, centred = STATISTICS[name]
    x = X.copy()
    x[0] = 0 if not centred else x[0, :1]  # flat sets along the positions, and some along channels
    x[1] = x[1, 0, 0] if centred else 0
    (reading,) = read(alone(make()), x).records
    sets = sets_by(labels, x)
    squares = [np.mean((each - centred * each.mean()) ** 2) for each in sets]
    expected = {
        "mean": np.mean([each.mean() for each in sets]),
        "spread": np.mean(np.sqrt(squares)),
        "flat": np.mean(np.array(squares) < 1e-7),
    }
    assert 0 <= expected["flat"] < 1
    for field, value in expected.items():
        assert_within(getattr(reading, field), value, 64 * EPS["float32"] * 6, field)
    assert reading.gamma_gradient is reading.beta_gradient is None


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_the_spread_has_its_digits_beside_a_large_mean(mean):
    x = X + np.float32(mean)
    (reading,) = read(alone(layers.GroupNormalization(3)), x).records
    expected = np.mean([each.std() for each in sets_by(group_labels(X.shape, 2, 3), x)])
    assert_within(reading.spread, expected, 1e-5, "spread")


def test_half_precision_is_read_in_float32():
    layer = layers.LayerNormalization(dtype="mixed_float16")
    (reading,) = read(alone(layer), 100 * X).records
    assert reading.spread == pytest.approx(100 * X.std(axis=-1).mean(), rel=1e-2)
    assert reading.state == "fine"


def test_what_is_normalized_is_the_sum_with_a_residual():
    inputs, other = keras.Input((5, 6)), keras.Input((5, 6))
    y, _ = layers.LayerNormalization()(inputs, residual=other)
    (reading,) = read(keras.Model([inputs, other], y), [X, 3 * X]).records
    assert_within(reading.mean, 4 * X.mean(), 1e-4, "mean")


def test_the_inverse_of_a_reversible_norm_is_no_reading():
    inputs, layer = keras.Input((5, 6)), layers.ReversibleInstanceNormalization()
    y, statistics = layer(inputs)
    model = keras.Model(inputs, layer.invert(keras.ops.multiply(y, 100.0), statistics))
    (reading,) = read(model).records
    assert reading.spread == pytest.approx(X.std(axis=1).mean(), rel=1e-4)


def test_a_shared_layer_averages_over_its_calls():
    inputs, layer = keras.Input((5, 6)), layers.LayerNormalization()
    outputs = layer(inputs) + layer(keras.ops.concatenate([inputs, inputs], axis=1) * 4.0)[:, :5]
    (reading,) = read(keras.Model(inputs, outputs)).records
    # Two thirds of the sets are of the second call.
    assert_within(reading.mean, X.mean() * (1 + 2 * 4) / 3, 1e-4, "mean")


def test_a_modulated_norm_is_read_once_with_the_parameters_of_the_norm_in_it():
    inputs, condition = keras.Input((5, 6)), keras.Input((3,))
    layer = layers.Modulated(layers.GroupNormalization(3, gamma_initializer="zeros", name="in"))
    model = keras.Model([inputs, condition], layer(inputs, condition))
    (reading,) = read(model, [X, np.ones((8, 3), "float32")]).records
    assert (reading.kind, reading.gamma_max, reading.state) == ("modulated", 0.0, "fine")
    assert reading.mean == pytest.approx(X.mean(), rel=1e-4)


def test_the_range_of_gamma_has_its_offset():
    layer = layers.LayerNormalization(gamma_offset=1.0, gamma_initializer="zeros")
    model = alone(layer)
    assert read(model).records[0].state == "fine"
    layer.gamma.assign([-1.0, 0, 1, 2, 3, 4])
    layer.beta.assign([-3.0, 0, 1, 2, 3, 9])
    (reading,) = read(model).records
    assert (reading.gamma_min, reading.gamma_max) == (0.0, 5.0)
    assert (reading.beta_min, reading.beta_max) == (-3.0, 9.0)


@pytest.mark.parametrize("kind", ["group", "batch"])
def test_gradients_are_those_of_the_loss(kind):
    """Those of float64, within the tolerance of the reference's gradients, and of a regularizer."""
    options = {"gamma_regularizer": keras.regularizers.L2(0.5)}
    if kind == "group":
        layer = layers.GroupNormalization(3, **options)
    else:
        layer = keras.layers.BatchNormalization(**options)
    model = keras.Sequential(
        [keras.Input((5, 6)), layer, keras.layers.Flatten(), keras.layers.Dense(1)]
    )
    model.compile("sgd", "mse")
    (reading,) = read(model, X, Y).records

    weight, bias = (to_numpy(each).astype("float64") for each in model.layers[-1].weights)
    weight = weight.reshape(1, 5, 6)
    norm = Norm(X, np.ones(6), np.zeros(6), group_labels(X.shape, 2, 3), (2,))
    if kind == "batch":  # in inference: moving statistics of 0 and 1
        norm.mean, norm.inv_std = 0.0, 1 / np.sqrt(1 + layer.epsilon)
        y = X * norm.inv_std
    else:
        y = norm.normalized
    error = (y * weight).sum((1, 2)) + bias - Y[:, 0]
    dy = 2 / len(X) * error[:, None, None] * weight
    gamma_gradient = (dy * y).sum((0, 1)) + 2 * 0.5
    beta_gradient = dy.sum((0, 1))
    for found, expected in (
        (reading.gamma_gradient, gamma_gradient),
        (reading.beta_gradient, beta_gradient),
    ):
        assert found == pytest.approx(np.linalg.norm(expected), rel=1e-4)


def test_gradients_are_those_of_a_loss_that_a_layer_adds():
    @keras.saving.register_keras_serializable("test_monitor")
    class Adding(keras.layers.Layer):
        def call(self, inputs):
            self.add_loss(3.0 * keras.ops.sum(inputs))
            return inputs

    model = keras.Sequential([keras.Input((5, 6)), layers.LayerNormalization(), Adding()])
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(1, kernel_initializer="zeros"))
    model.compile("sgd", "mse")
    (reading,) = read(model, X, Y).records
    assert reading.beta_gradient == pytest.approx(3 * 8 * 5 * np.sqrt(6), rel=1e-5)


def test_a_frozen_norm_has_no_gradient():
    frozen, free = layers.LayerNormalization(trainable=False), layers.LayerNormalization()
    made = read(trainable(frozen, free), X, Y)
    assert made.records[0].gamma_gradient is made.records[0].beta_gradient is None
    assert made.records[1].gamma_gradient > 0


# Verdicts.


def with_faults():
    """A model with a gamma that was set to 0, and a norm whose inputs were scaled by 1e4."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 6))
    x = layers.GroupNormalization(3, name="sound")(keras.layers.Dense(6)(inputs))
    dead = layers.GroupNormalization(3, name="gamma_of_0", trainable=False)
    x = x + dead(keras.layers.Dense(6)(x))
    x = keras.layers.Rescaling(1e4)(keras.layers.Dense(6)(x))
    x = layers.LayerNormalization(name="inputs_by_1e4")(x)
    x = keras.layers.BatchNormalization(name="sound_too")(keras.layers.Dense(6)(x))
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(x)))
    dead.gamma.assign(np.zeros(6))
    model.compile("adam", "mse")
    return model


FAULTS = ["fine", "dies", "explodes", "fine"]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A monitor of a training of that model, its history, and the folder of its files."""
    folder = tmp_path_factory.mktemp("faulty")
    made = NormMonitor(X, Y, picture=folder / "norms.png", csv=folder / "norms.csv")
    fitted = with_faults().fit(X, Y, epochs=2, verbose=0, callbacks=[made])
    return made, fitted.history, folder


def test_it_finds_a_gamma_of_0_and_inputs_scaled_by_1e4(faulty):
    made, history, folder = faulty
    assert made.layers == ["sound", "gamma_of_0", "inputs_by_1e4", "sound_too"]
    assert [each.state for each in made.records] == 3 * FAULTS
    arrays = made.arrays()
    assert arrays["state"].tolist() == [[state] * 3 for state in FAULTS]
    assert (arrays["gamma_max"][1] == 0).all()
    assert (arrays["spread"][2] > 1e3).all()
    assert (arrays["spread"][[0, 1, 3]] < 1e2).all()
    assert history["norms/dying"] == history["norms/exploding"] == [1.0, 1.0]
    with (folder / "norms.csv").open() as file:
        assert [row["state"] for row in csv.DictReader(file)] == 3 * FAULTS
    for axes in made.figure().axes[::2]:
        marks = {each.get_gid(): each.get_offsets().tolist() for each in axes.collections}
        assert marks["dies"] == [[time, 1] for time in range(3)]
        assert marks["explodes"] == [[time, 2] for time in range(3)]
    assert (folder / "norms.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_it_finds_what_happens_in_the_middle_of_a_training():
    """A single norm has no others: only its own first spread can tell."""
    model = trainable(layers.LayerNormalization())
    dense = model.layers[0]

    class Fault(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                self.model.layers[0].kernel.assign(1e4 * to_numpy(dense.kernel.value))

    made = NormMonitor(X, Y)
    model.fit(X, Y, epochs=3, verbose=0, callbacks=[Fault(), made])
    assert [each.state for each in made.records] == ["fine", "fine", "explodes", "explodes"]


READING = Reading(0, 0, "norm", "layer", 0.0, 1.0, 0.0, 0.5, 1.0, 0.0, 0.0, 0.1, 0.1)


@pytest.mark.parametrize(
    ("changes", "scales", "spreads", "state"),
    [
        ({}, True, (1.0, 1.0), "fine"),
        ({"gamma_min": -0.9e-3, "gamma_max": 0.9e-3}, True, (1.0, 1.0), "dies"),
        ({"gamma_min": -0.9e-3, "gamma_max": 0.9e-3}, False, (1.0, 1.0), "fine"),
        ({"gamma_min": -1.1e-3, "gamma_max": 0.0}, True, (1.0, 1.0), "fine"),
        ({"gamma_min": None, "gamma_max": None}, True, (1.0, 1.0), "fine"),
        ({"flat": 0.49}, True, (1.0, 1.0), "fine"),
        ({"flat": 0.5}, True, (1.0, 1.0), "dies"),
        ({"spread": 999.0}, True, (1.0, 1.0), "fine"),
        ({"spread": 1001.0}, True, (1.0, 2.0), "explodes"),
        ({"spread": 1001.0}, True, (2.0, 1.0), "explodes"),
        ({"spread": 1001.0}, True, (None, np.nan), "fine"),
        ({"spread": 99.0}, True, (0.0, 0.0), "fine"),  # 1000 * sqrt(0.01) is 100
        ({"spread": 101.0}, True, (0.0, 5.0), "explodes"),
        ({"mean": np.nan}, True, (1.0, 1.0), "explodes"),
        ({"beta_max": np.inf}, True, (1.0, 1.0), "explodes"),
        ({"gamma_gradient": np.nan, "flat": 1.0}, True, (1.0, 1.0), "explodes"),
        ({"mean": None, "spread": None, "flat": None}, True, (1.0, 1.0), "fine"),
    ],
)
def test_the_rule(changes, scales, spreads, state):
    reading = dataclasses.replace(READING, **changes)
    assert readings.judged(reading, scales, 0.01, spreads).state == state


def test_a_global_response_norm_that_begins_with_zeros_is_fine():
    assert read(alone(layers.GlobalResponseNormalization())).records[0].state == "fine"


def test_an_input_that_is_not_finite_explodes():
    x = X.copy()
    x[0, 0, 0] = np.nan
    assert read(alone(layers.LayerNormalization()), x).records[0].state == "explodes"


# Models of every kind.


@keras.saving.register_keras_serializable("test_monitor")
class Block(keras.layers.Layer):
    """A layer with a norm in it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = layers.LayerNormalization(name="norm")

    def build(self, input_shape):
        self.norm.build(input_shape)

    def call(self, inputs):
        return self.norm(inputs)


@keras.saving.register_keras_serializable("test_monitor")
class Subclassed(keras.Model):
    """A model that says nothing of its training argument, nor of its graph."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [Block(name="first"), Block(name="second")]
        self.head = keras.layers.Dense(1)

    def call(self, inputs):
        for block in self.blocks:
            inputs = block(inputs)
        return keras.ops.mean(self.head(inputs), axis=1)


def nested():
    inner = keras.Sequential([keras.Input((5, 6)), Block(name="first")], name="inner")
    inputs = keras.Input((5, 6))
    x = Block(name="second")(inner(inputs))
    return keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(x)))


KINDS = {
    "sequential": (
        lambda: trainable(layers.LayerNormalization(name="a"), layers.LayerNormalization(name="b")),
        ["a", "b"],
    ),
    "nested": (nested, ["inner/first/norm", "second/norm"]),
    "subclassed": (Subclassed, ["first/norm", "second/norm"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_every_kind(kind, tmp_path):
    make, paths = KINDS[kind]
    model = make()
    model.compile("sgd", "mse")
    made = NormMonitor(X, Y)
    history = model.fit(X, Y, batch_size=4, epochs=1, verbose=0, callbacks=[made]).history
    assert made.layers == paths
    # What is not built yet is not read before.
    before = [] if kind == "subclassed" and BACKEND == "tensorflow" else [(0, 0)] * 2
    assert [(each.step, each.epoch) for each in made.records] == [*before, (2, 1), (2, 1)]
    for each in made.records:
        assert each.gamma_gradient > 0
        assert each.spread > 0
    # Nothing is left in the layers, and all can be saved.
    assert all("call" not in vars(norm.layer) for norm in watching.watchable(model))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_within(loaded.predict(X, verbose=0), model.predict(X, verbose=0), 1e-5)
    assert history[f"norms/{paths[0]}/spread"] == [made.records[-2].spread]


def test_a_model_that_runs_eagerly_is_not_compiled():
    model = trainable(layers.LayerNormalization())
    (expected,) = read(model, X, Y).records
    seen = []
    call = model.layers[0].call
    vars(model.layers[0])["call"] = lambda x, **options: seen.append(to_numpy(x)) or call(x)
    model.compile("sgd", "mse", run_eagerly=True)
    (reading,) = read(model, X, Y).records
    assert len(seen) == 1
    for name, number in reading.numbers().items():
        assert number == pytest.approx(expected.numbers()[name], rel=1e-4, abs=1e-5), name


def test_several_inputs_and_outputs_by_name():
    inputs = {"a": keras.Input((5, 6), name="a"), "b": keras.Input((5, 6), name="b")}
    x = layers.LayerNormalization()(inputs["a"] + inputs["b"])
    x = keras.layers.Flatten()(x)
    outputs = {name: keras.layers.Dense(1, name=name)(x) for name in ("c", "d")}
    model = keras.Model(inputs, outputs)
    model.compile("sgd", {"c": "mse", "d": "mae"}, metrics={"c": ["mae"]})
    x, y = {"a": X, "b": 2 * X}, {"c": Y, "d": Y}
    made = NormMonitor(x, y)
    model.fit(x, y, verbose=0, callbacks=[made])
    assert made.records[0].mean == pytest.approx(3 * X.mean(), rel=1e-4)
    assert made.records[0].gamma_gradient > 0


class Mapping(keras.layers.Layer):
    """Runs a norm on each sample, as the framework maps a function."""

    def __init__(self, norm):
        super().__init__(name="map")
        self.norm = norm

    def build(self, input_shape):
        self.norm.build(input_shape[1:])

    def call(self, inputs):
        return keras.ops.vectorized_map(self.norm.call, inputs)


class Cell(keras.layers.Layer):
    """A recurrent cell that normalizes its state."""

    state_size = output_size = 6

    def __init__(self, norm):
        super().__init__(name="cell")
        self.norm = norm

    def build(self, input_shape):
        self.norm.build(input_shape)

    def call(self, inputs, states):
        outputs = self.norm(inputs + states[0])
        return outputs, [outputs]


@pytest.mark.parametrize(
    ("holder", "known"),
    [
        (Mapping, False),
        # PyTorch's loop is Python's.
        (lambda norm: keras.layers.RNN(Cell(norm), return_sequences=True), BACKEND == "torch"),
    ],
    ids=["map", "loop"],
)
def test_a_norm_within_what_the_framework_traces_by_itself(holder, known):
    inputs = keras.Input((5, 6))
    x = holder(layers.LayerNormalization(name="inside"))(inputs)
    x = layers.InstanceNormalization(name="outside")(x)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(x)))
    model.compile("sgd", "mse")
    made = read(model, X, Y)
    inside, outside = made.records
    assert (inside.spread is not None) == known
    assert (inside.gamma_max, inside.state) == (1.0, "fine")
    assert inside.gamma_gradient > 0
    assert outside.spread > 0
    assert np.isnan(made.arrays()["spread"][0, 0]) == (not known)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="Keras itself cannot do so in a graph")
def test_norms_that_are_computed_twice_to_save_memory():
    with keras.RematScope(mode="full"):
        model = trainable(layers.LayerNormalization())
    (reading,) = read(model, X, Y).records
    assert reading.gamma_gradient > 0


# Training.


def training(callbacks, epochs=2):
    """A short training with all that could be disturbed; its model and the losses."""
    keras.utils.set_random_seed(0)
    model = trainable(
        keras.layers.BatchNormalization(),
        layers.GroupNormalization(3),
        keras.layers.Dropout(0.5),
    )
    model.compile("adam", "mse", metrics=["mae"])
    history = model.fit(X, Y, batch_size=2, epochs=epochs, verbose=0, callbacks=callbacks).history
    return model, history


@pytest.fixture(scope="module")
def unwatched():
    """The training without a monitor."""
    return training([])


@pytest.mark.parametrize("every", ["epoch", 1])
def test_training_is_the_same_bit_for_bit(every, unwatched):
    made = NormMonitor(X, Y, every=every)
    model, history = training([made])
    expected_model, expected_history = unwatched
    state = [*model.variables, *model.optimizer.variables]
    expected = [*expected_model.variables, *expected_model.optimizer.variables]
    for found, wanted in zip(state, expected, strict=True):
        np.testing.assert_array_equal(to_numpy(found.value), to_numpy(wanted.value), found.path)
    assert {name: history[name] for name in expected_history} == expected_history
    assert len(made.records) == 2 * (3 if every == "epoch" else 9)


@pytest.mark.parametrize(
    ("every", "times"),
    [
        ("epoch", [(0, 0), (4, 1), (8, 2)]),
        (3, [(0, 0), (3, 1), (6, 2)]),
        (1, [(0, 0), *((step, 1 + (step > 4)) for step in range(1, 9))]),
    ],
)
def test_the_times(every, times):
    made = NormMonitor(X, every=every)
    model = trainable(layers.LayerNormalization())
    history = model.fit(X, Y, batch_size=2, epochs=2, verbose=0, callbacks=[made]).history
    assert [(each.step, each.epoch) for each in made.records] == times
    assert made.step == 8
    assert len(history["norms/dying"]) == 2
    (name,) = made.layers
    assert history[f"norms/{name}/spread"][-1] == made.records[-1].spread
    assert np.isnan(history[f"norms/{name}/gamma_gradient"]).all()
    # The weights of that very step.
    if every != 3:
        assert made.records[-1].gamma_max == pytest.approx(
            to_numpy(model.layers[1].gamma.value).max(), rel=1e-6
        )


def test_a_second_fit_goes_on_and_another_model_begins_anew():
    made = NormMonitor(X, Y)
    model = trainable(layers.LayerNormalization(name="norm"))
    for _ in range(2):
        model.fit(X, Y, batch_size=4, verbose=0, callbacks=[made])
    assert [each.step for each in made.records] == [0, 2, 4]
    before = made._evaluate
    model.compile("sgd", "mae")
    model.fit(X, Y, batch_size=4, verbose=0, callbacks=[made])
    assert made._evaluate is not before
    assert made.records[-2].gamma_gradient != pytest.approx(
        made.records[-1].gamma_gradient, rel=0.01
    )
    trainable_too = trainable(layers.LayerNormalization(name="other"))
    trainable_too.fit(X, Y, verbose=0, callbacks=[made])
    assert [each.layer for each in made.records] == ["other"] * 2


def test_an_error_in_the_model_leaves_its_layers_as_they_were():
    class Failing(keras.layers.Layer):
        def call(self, inputs):
            if inputs.shape[0] == 3:
                raise RuntimeError("three samples")
            return inputs

    model = trainable(layers.LayerNormalization(), layers.GroupNormalization(3), Failing())
    with pytest.raises(RuntimeError, match="three samples"):
        read(model, X[:3])
    assert all("call" not in vars(norm.layer) for norm in watching.watchable(model))
    model.fit(X, Y, verbose=0)


# Where it goes.


def test_the_csv_has_every_digit_and_whole_lines(tmp_path):
    path = tmp_path / "folder" / "norms.csv"
    model = trainable(layers.LayerNormalization(center=False, name="norm"))
    seen = []

    class Reader(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(path.read_text())

    made = NormMonitor(X, Y, csv=path)
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[made, Reader()])
    assert [text.count("\n") for text in seen] == [3, 4]
    assert all(text.endswith("\n") for text in seen)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == readings.FIELDS
    for row, record in zip(rows, made.records, strict=True):
        for name, text in row.items():
            value = getattr(record, name)
            assert text == ("" if value is None else str(value))
    assert rows[0]["beta_max"] == ""
    NormMonitor(X, csv=path)
    assert path.read_text() == seen[-1], "a monitor that is not used yet writes nothing"


def test_tensorboard_reads_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.compat.proto.event_pb2 import Event

    made = NormMonitor(X, tensorboard=tmp_path)
    trainable(layers.LayerNormalization(name="norm")).fit(X, Y, verbose=0, callbacks=[made])
    (path,) = tmp_path.iterdir()
    data, events = path.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    first, *rest = events
    assert first.file_version == "brain.Event:2"
    assert [event.step for event in rest] == [0, 1]
    for event, record in zip(rest, made.records, strict=True):
        found = {value.tag: value.simple_value for value in event.summary.value}
        expected = {
            f"norms/norm/{name}": np.float32(number)
            for name, number in record.numbers().items()
            if number is not None
        }
        assert found == expected


def test_the_picture(faulty, tmp_path):
    made, *_ = faulty
    figure = made.figure(tmp_path / "new" / "norms.png")
    assert (tmp_path / "new" / "norms.png").read_bytes().startswith(b"\x89PNG")
    spread, gamma, gradient = figure.axes[::2]  # between them their scales
    assert [axes.get_title() for axes in (spread, gamma, gradient)] == [
        "spread of what comes in, log10",
        "largest |gamma|",
        "gradient of gamma and beta, log10",
    ]
    assert [label.get_text() for label in spread.get_yticklabels()] == [
        "sound",
        "gamma_of_0  ✕ dies",
        "inputs_by_1e4  ▲ explodes",
        "sound_too",
    ]
    assert {axes.get_xlabel() for axes in (spread, gamma, gradient)} == {"epoch"}
    arrays = made.arrays()
    np.testing.assert_allclose(spread.images[0].get_array(), np.log10(arrays["spread"]))
    np.testing.assert_allclose(gamma.images[0].get_array(), arrays["gamma_max"])
    slope = np.hypot(arrays["gamma_gradient"], arrays["beta_gradient"])
    drawn = gradient.images[0].get_array()
    np.testing.assert_allclose(drawn.filled(np.nan), np.log10(slope))
    assert drawn.mask[1].all(), "a frozen layer has none"
    assert spread.images[0].get_cmap().name == "cividis"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [text.partition(":")[0] for text in legend] == ["dies", "explodes", "not known"]
    ticks = spread.xaxis.get_major_formatter()
    assert [ticks(place, None) for place in (0, 1, 2, 0.5, 9)] == ["0", "1", "2", "", ""]


def table_of(rows, times, **fields):
    """Records of many layers as arrays."""
    made = [
        dataclasses.replace(READING, step=time, epoch=time, layer=f"stage/block_{row}/norm")
        for time in range(times)
        for row in range(rows)
    ]
    return {**readings.arrays(made), **fields}


def test_the_picture_of_every_so_many_steps_counts_these():
    figure = pictures.layers_by_time(table_of(2, 3, step=np.array([[0, 10, 20]] * 2)), "step")
    axes = figure.axes[0]
    assert axes.get_xlabel() == "step"
    assert axes.xaxis.get_major_formatter()(2, None) == "20"


def test_the_picture_of_a_long_model_keeps_its_names_apart():
    figure = pictures.layers_by_time(table_of(120, 300), "epoch")
    height = figure.get_figheight() * figure.axes[0].get_position().height
    (size,) = {label.get_fontsize() for label in figure.axes[0].get_yticklabels()}
    assert size >= 6
    assert 120 * size / 72 <= height
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "no layer dies or explodes"
    ]


def test_the_picture_without_gradients_has_two_panels_and_takes_infinities():
    nothing = np.full((3, 4), np.nan)
    spread = np.array([[1.0, np.inf, np.nan, 0.0]] * 3)
    arrays = table_of(3, 4, gamma_gradient=nothing, beta_gradient=nothing, spread=spread)
    figure = pictures.layers_by_time(arrays, "epoch")
    assert len(figure.axes) == 4
    drawn = figure.axes[0].images[0].get_array()
    assert drawn[0].tolist() == [0.0, 0.0, None, -1.0]


# Errors.


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"every": 0}, ValueError, 'every=0 is no interval; use "epoch", or a positive int'),
        ({"every": True}, ValueError, "every=True is no interval"),
        ({"every": "step"}, ValueError, "every='step' is no interval"),
        ({"x": None}, TypeError, "x=None holds no array; pass a batch of arrays, as x.:32."),
        ({"x": {"a": 3}}, TypeError, "x holds 3, which is no array of samples; pass a batch"),
        ({"x": X[:0]}, ValueError, r"shape \(0, 5, 6\), which has no sample; pass one or more"),
        ({"y": Y[:3]}, ValueError, "y has 3 samples, but x has 8; pass a target for each input"),
        ({"picture": "a.txt"}, ValueError, "'a.txt' does not name a format of pictures; use"),
    ],
)
def test_errors_name_value_rule_and_remedy(arguments, error, text):
    with pytest.raises(error, match=text):
        NormMonitor(**{"x": X, **arguments})


def test_without_tensorboard_or_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with pytest.raises(
        ValueError, match=r"tensorboard='logs' needs the package tensorboard, .* csv="
    ):
        NormMonitor(X, tensorboard="logs")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'a.png', needs Matplotlib, which is not installed"):
        NormMonitor(X, picture="a.png")
    with pytest.raises(ValueError, match="a picture needs Matplotlib"):
        pictures.layers_by_time(table_of(1, 1), "epoch")


def test_a_model_without_norms_and_a_loss_that_does_not_fit():
    model = trainable()
    with pytest.raises(ValueError, match="has no norm to watch; leave the monitor out"):
        read(model)
    model = trainable(layers.LayerNormalization())
    with pytest.raises(
        ValueError, match=r"the loss of the model .* cannot be computed .*; pass a y"
    ):
        read(model, X, {"a": Y})
    with pytest.raises(
        ValueError, match="there is no reading yet to draw; pass the monitor to fit"
    ):
        NormMonitor(X).figure()
