"""Models that TensorFlow 2.14 and TensorFlow Addons saved predict as they did.

`tools/keras2_models.py` made those of the archive; the others are beside the checkout.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import old_models
import pytest
from frameworks import to_numpy

import normwise
from normwise import migrate

ARCHIVE = Path(__file__).parent / "golden" / "keras2_models.zip"
FIXTURES = Path(__file__).parents[2] / "shared" / "tfa_models"
# Of the largest prediction. A few dozen float32 roundings, each of 6e-8, through layers whose
# norms may make an error of the inputs ten times as large; "axes" predicts in float16.
TOLERANCES = {"axes": 8e-3}
TOLERANCE = 5e-6


class Scale(keras.layers.Layer):
    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def build(self, input_shape):
        self.scale = self.add_weight(name="scale", shape=input_shape[-1:], initializer="ones")

    def call(self, x):
        return x * self.scale * self.factor

    def get_config(self):
        return {**super().get_config(), "factor": self.factor}


class Shift(Scale):
    def call(self, x):
        return x + self.scale * self.factor


def double(x):
    return 2.0 * x


OWN = {"Scale": Scale, "Shift": Shift, "double": double}
ALL = ["arithmetic", "axes", "code", "convolutions", "custom", "nested", "recurrent"]
SAVED_MODELS = ["arithmetic", "convolutions", "nested"]
WHOLE = [
    *(f"{name}.{suffix}" for name in ALL for suffix in ("h5", "keras")),
    *(f"{name}.savedmodel" for name in SAVED_MODELS),
]
WEIGHTS = [
    f"{name}.{suffix}" for name in ALL for suffix in ("weights.h5", "legacy.h5", "h5", "checkpoint")
]


@pytest.fixture(scope="session")
def golden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keras2")
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return folder


def load(path):
    if path.name.startswith("code") and sys.version_info >= (3, 13):
        pytest.skip("Python 3.13 may crash on the code of 3.11, which is in the file")
    return migrate.load_model(path, custom_objects=OWN, safe_mode=not path.name.startswith("code"))


def check_predictions(model, folder, name, tolerance=None):
    stored = np.load(folder / f"{name}.npz")
    inputs = [stored[key] for key in sorted(stored) if key.startswith("x")]
    expected = [stored[key] for key in sorted(stored) if key.startswith("y")]
    if isinstance(model.inputs, list) and len(model.inputs) > 1:
        inputs = keras.tree.pack_sequence_as(model.input, inputs)
    else:
        (inputs,) = inputs
    found = [to_numpy(each) for each in keras.tree.flatten(model(inputs))]
    assert len(found) == len(expected)
    tolerance = tolerance or TOLERANCES.get(name, TOLERANCE)
    for y, golden in zip(found, expected, strict=True):
        assert y.shape == golden.shape
        assert y.dtype == golden.dtype
        golden = golden.astype("float64")
        error = np.abs(y - golden).max() / max(1.0, np.abs(golden).max())
        assert error <= tolerance


def check_saves_and_loads(model, path):
    model.save(path)
    # safe_mode: the Lambda layer of one of them.
    again = keras.saving.load_model(path, custom_objects=OWN, safe_mode=False)
    for new, old in zip(arrays(again), arrays(model), strict=True):
        np.testing.assert_array_equal(new, old)
    return again


@pytest.mark.parametrize("file", WHOLE)
def test_models_predict_as_they_did(golden, file, tmp_path):
    model = load(golden / file)
    assert type(model).__module__.startswith("keras.")
    check_predictions(model, golden, file.partition(".")[0])
    again = check_saves_and_loads(model, tmp_path / "new.keras")
    if file.endswith(".h5"):
        check_predictions(again, golden, file.partition(".")[0])


def empty(model):
    for weight in model.weights:
        weight.assign(keras.ops.zeros(weight.shape, weight.dtype))
    return model


def arrays(model):
    return [to_numpy(weight).copy() for weight in model.weights]


@pytest.fixture(scope="module")
def loaded(golden):
    """The models, each loaded once, with the weights that they have in the file."""
    models = {name: load(golden / f"{name}.keras") for name in ALL}
    return {name: (model, arrays(model)) for name, model in models.items()}


@pytest.mark.parametrize("file", WEIGHTS)
def test_weights_are_those_of_the_model(golden, file, loaded):
    model, wanted = loaded[file.partition(".")[0]]
    assert migrate.load_weights(empty(model), golden / file) is None
    for weight, array in zip(arrays(model), wanted, strict=True):
        np.testing.assert_array_equal(weight, array)


def test_weights_of_models_built_anew_go_by_order_and_class(golden):
    """Their layers have other names than those in the file, which Keras makes up."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            Scale(3.0, name="one"),
            Shift(2.0, name="two"),
            keras.layers.Dense(2, activation=double, name="three"),
        ]
    )
    for suffix in ("weights.h5", "legacy.h5", "checkpoint"):
        migrate.load_weights(empty(model), golden / f"custom.{suffix}")
        check_predictions(model, golden, "custom")


def test_weights_go_by_name_where_the_order_is_another(golden):
    old = migrate.load_model(golden / "custom.h5", custom_objects=OWN)
    names = [layer.name for layer in old.layers]
    with keras.saving.custom_object_scope(OWN):
        first, second, dense = (type(each).from_config(each.get_config()) for each in old.layers)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, dense(first(second(inputs))))
    assert [layer.name for layer in model.layers if layer.weights] != names
    migrate.load_weights(model, golden / "custom.legacy.h5")
    for old_layer, layer in zip(old.layers, (first, second, dense), strict=True):
        for mine, theirs in zip(layer.weights, old_layer.weights, strict=True):
            np.testing.assert_array_equal(to_numpy(mine), to_numpy(theirs))


def test_weights_that_do_not_fit_change_nothing(golden, loaded):
    model = empty(loaded["custom"][0])
    for file in ("convolutions.weights.h5", "nested.legacy.h5", "axes.checkpoint"):
        with pytest.raises(ValueError, match=rf"{file} cannot be loaded: "):
            migrate.load_weights(model, golden / file)
    assert all(not to_numpy(weight).any() for weight in model.weights)


def test_one_wrong_shape_among_right_ones_changes_nothing(golden):
    model = keras.Sequential(
        [keras.Input((4,)), Scale(3.0), Shift(2.0), keras.layers.Dense(3, activation=double)]
    )
    before = arrays(model)
    for suffix in ("weights.h5", "legacy.h5", "checkpoint"):
        with pytest.raises(ValueError, match=r"kernel has the shape \(4, 3\), and the file's"):
            migrate.load_weights(model, golden / f"custom.{suffix}")
    for weight, old in zip(arrays(model), before, strict=True):
        np.testing.assert_array_equal(weight, old)


# What becomes of the layers.


def test_layers_are_those_of_keras_and_of_normwise(golden):
    model = load(golden / "axes.h5")
    norms = [layer for layer in model.layers if isinstance(layer, normwise.layers.affine.Affine)]
    assert [type(layer) for layer in norms] == [
        normwise.layers.LayerNormalization,
        normwise.layers.LayerNormalization,
        normwise.layers.InstanceNormalization,
    ]
    assert [layer.axis for layer in norms] == [[1, 2], [1], 2]
    assert norms[0].dtype_policy.name == "mixed_float16"
    batch_norm = next(x for x in model.layers if isinstance(x, keras.layers.BatchNormalization))
    assert batch_norm.axis == 1
    assert isinstance(model.layers[-1].kernel_regularizer, keras.regularizers.L2)


def test_shared_models_and_layers_stay_shared(golden):
    model = load(golden / "nested.h5")
    names = [layer.name for layer in model.layers]
    assert len(names) == len(set(names))
    assert {len(model.get_layer(name)._inbound_nodes) for name in ("shared",)} == {2}
    block = model.get_layer("block")
    assert not block.layers[0].trainable
    assert block.layers[1].trainable


def test_spectral_norm_is_the_original_one(golden):
    layer = load(golden / "convolutions.keras").layers[2]
    assert isinstance(layer, normwise.layers.SpectralNormalization)
    assert layer.compatible


def test_offsets_of_trained_wrappers_are_gone_with_the_old_weights(golden):
    model = load(golden / "convolutions.h5")
    for weight in model.weights:
        weight.assign(keras.ops.ones(weight.shape, weight.dtype))
    migrate.load_weights(model, golden / "convolutions.legacy.h5")
    check_predictions(model, golden, "convolutions")


def test_recurrent_layers_keep_their_state_from_batch_to_batch(tmp_path):
    config = old_models.sequential(
        old_models.layer("InputLayer", "input", batch_input_shape=[1, 3, 2]),
        old_models.layer("SimpleRNN", "rnn", units=1, activation="linear", stateful=True),
    )
    weights = {"kernel": np.ones((2, 1)), "recurrent_kernel": np.ones((1, 1)), "bias": np.zeros(1)}
    path = old_models.write_h5(tmp_path / "old.h5", config, {"rnn": weights})
    model = migrate.load_model(path)
    ones = np.ones((1, 3, 2), "float32")
    assert [to_numpy(model(ones)).item() for _ in range(2)] == [6.0, 12.0]


def test_a_model_loads_and_trains_as_it_was_compiled(golden):
    model = migrate.load_model(golden / "nested.h5", compile=True)
    assert isinstance(model.optimizer, keras.optimizers.Adam)
    stored = np.load(golden / "nested.npz")
    targets = [stored["y0"] + 1.0, stored["y1"] - 1.0]
    losses = [model.train_on_batch([stored["x0"], stored["x1"]], targets) for _ in range(2)]
    assert np.all(np.isfinite(losses))


@pytest.mark.parametrize("suffix", ["h5", "keras", "savedmodel"])
def test_every_format_says_how_the_model_was_compiled(golden, suffix):
    model = migrate.load_model(golden / f"nested.{suffix}", compile=True)
    assert model.loss == "mse" or model.loss is keras.losses.mean_squared_error


# Models of the size of real ones.


def shipped():
    if not FIXTURES.is_dir():
        reason = "the models saved by TensorFlow Addons are not beside this checkout"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
    return [
        pytest.param(FIXTURES / f"{name}.{suffix}", id=f"{name}.{suffix}")
        for name in ("tutorial_group", "functional", "rnn")
        for suffix in ("h5", "keras", "savedmodel")
    ]


def check_shipped(model, name):
    stored = np.load(FIXTURES / f"{name}.npz")
    assert np.abs(to_numpy(model(stored["x"])) - stored["y"]).max() <= 1e-5


@pytest.mark.parametrize("path", shipped())
def test_shipped_models_and_weights(path, tmp_path):
    model = migrate.load_model(path)
    check_shipped(model, path.stem)
    check_shipped(check_saves_and_loads(model, tmp_path / "new.keras"), path.stem)
    migrate.load_weights(empty(model), path.with_suffix(".weights.h5"))
    check_shipped(model, path.stem)


BLOCKED = """
import sys

# As on a machine without it, for `import` and for those who look whether it is there.
sys.modules["tensorflow"] = None
import keras, numpy as np
from normwise import migrate

for name in ("nested", "convolutions"):
    stored = np.load(f"{sys.argv[1]}/{name}.npz")
    for suffix in ("h5", "keras", "savedmodel"):
        model = migrate.load_model(f"{sys.argv[1]}/{name}.{suffix}")
        for kind in ("weights.h5", "legacy.h5", "checkpoint"):
            migrate.load_weights(model, f"{sys.argv[1]}/{name}.{kind}")
        inputs = [stored[key] for key in sorted(stored) if key.startswith("x")]
        y = keras.tree.flatten(model(inputs if len(inputs) > 1 else inputs[0]))[0]
        error = np.abs(np.asarray(keras.ops.convert_to_numpy(y)) - stored["y0"]).max()
        assert error <= 1e-4 * np.abs(stored["y0"]).max(), (name, suffix, error)
assert sys.modules["tensorflow"] is None
"""


@pytest.mark.skipif(keras.config.backend() == "tensorflow", reason="Keras runs on TensorFlow here")
def test_no_format_needs_tensorflow(golden):
    run = [sys.executable, "-c", BLOCKED, str(golden)]
    subprocess.run(run, check=True, capture_output=True)
