"""Configs, files and copies: what was saved comes back, in this process and in a fresh one."""

import copy
import json
import pickle
import subprocess
import sys
import zipfile

import h5py
import keras
import numpy as np
import pytest
from frameworks import to_numpy
from norms import NORMS, every_norm, randomize, samples

import normwise
from normwise import layers, ops


def full_options(norm):
    """Every argument other than its default."""
    options = {"epsilon": 1e-2, "activation": "relu", "name": "n", "dtype": "mixed_bfloat16"}
    for weight in norm.weights:
        options[f"{weight}_initializer"] = keras.initializers.RandomNormal(seed=1)
        options[f"{weight}_regularizer"] = keras.regularizers.L2(0.1)
        options[f"{weight}_constraint"] = keras.constraints.UnitNorm(axis=0)
    return options


@every_norm
def test_config_round_trip(norm):
    layer = norm.make(**full_options(norm))
    config = layer.get_config()
    json.dumps(config)
    again = norm.layer.from_config(config)
    assert again.get_config() == config
    for name, value in {**full_options(norm), **norm.options}.items():
        if isinstance(value, (str, float, int)) and name not in ("activation", "dtype"):
            assert config[name] == value
    arguments = set(config) - {"name", "trainable", "dtype"}
    assert arguments <= {*layer.__init__.__code__.co_varnames}


def test_a_config_is_a_copy():
    layer = layers.LayerNormalization(axis=[1, 2])
    layer.get_config()["axis"].append(3)
    assert layer.axis == [1, 2]


@every_norm
@pytest.mark.parametrize("axis", [-1, [-1], 2])
def test_config_does_not_depend_on_what_it_was_built_on(norm, axis):
    layer = norm.make(axis=axis)
    before = copy.deepcopy(layer.get_config())
    layer(samples())
    assert layer.get_config() == before
    other = norm.layer.from_config(before)
    assert tuple(other(samples((2, 5, 12))).shape) == (2, 5, 12)


def test_unsorted_axes_stay_as_they_were_given():
    layer = layers.LayerNormalization(axis=(2, 1))
    layer(samples())
    assert layer.get_config()["axis"] == [2, 1]


def sequential(norm):
    return keras.Sequential([keras.Input((5, 6)), norm.make(name="n"), keras.layers.Flatten()])


def functional(norm):
    inputs = keras.Input((None, 6))
    return keras.Model(inputs, norm.make(name="n", activation="relu")(inputs) + 1.0)


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """A model of its own class, which holds a norm."""

    def __init__(self, norm, **kwargs):
        super().__init__(**kwargs)
        self.n = keras.saving.deserialize_keras_object(norm) if isinstance(norm, dict) else norm

    def call(self, x):
        return self.n(x) * 2.0

    def get_config(self):
        return {"norm": keras.saving.serialize_keras_object(self.n)}


def subclassed(norm):
    model = Subclassed(norm.make(name="n"))
    model(samples())
    return model


def norm_of(model):
    return model.n if isinstance(model, Subclassed) else model.get_layer("n")


@every_norm
@pytest.mark.parametrize("make", [sequential, functional, subclassed])
def test_saved_models_come_back(norm, make, tmp_path):
    model = make(norm)
    randomize(norm_of(model))
    y = to_numpy(model(samples()))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(norm_of(loaded)) is norm.layer
    np.testing.assert_array_equal(to_numpy(loaded(samples())), y)
    model.save_weights(tmp_path / "model.weights.h5")
    other = make(norm)
    assert not np.array_equal(to_numpy(other(samples())), y)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(to_numpy(other(samples())), y)


def test_a_fresh_process_loads_after_import_normwise_alone(tmp_path):
    inputs = keras.Input((5, 6))
    y = inputs
    for norm in NORMS.values():
        y = norm.op(norm.make()(y), **norm.options)
    model = keras.Model(inputs, y)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", samples())
    script = (
        "import sys, normwise, keras, numpy as np;"
        "model = keras.models.load_model(sys.argv[1] + '/model.keras');"
        "y = model.predict(np.load(sys.argv[1] + '/x.npy'), verbose=0);"
        "np.save(sys.argv[1] + '/y.npy', y)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    np.testing.assert_allclose(
        np.load(tmp_path / "y.npy"), to_numpy(model(samples())), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", ["group", "layer", "rms"])
def test_weights_of_keras_own_layer_load(name, tmp_path):
    norm = NORMS[name]
    theirs = keras.Sequential([keras.Input((5, 6)), norm.keras_layer(**norm.options)])
    randomize(theirs.layers[-1])
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    ours = keras.Sequential([keras.Input((5, 6)), norm.make()])
    ours.load_weights(tmp_path / "theirs.weights.h5")
    x = samples()
    np.testing.assert_allclose(to_numpy(ours(x)), to_numpy(theirs(x)), rtol=0, atol=1e-5)


@every_norm
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, keras.models.clone_model, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "clone_model", "pickle"],
)
def test_copies(norm, copied):
    model = functional(norm)
    randomize(norm_of(model))
    twin = copied(model)
    if copied is keras.models.clone_model:
        twin.set_weights(model.get_weights())
    assert norm_of(twin) is not norm_of(model)
    np.testing.assert_array_equal(to_numpy(twin(samples())), to_numpy(model(samples())))


@every_norm
def test_deepcopy_of_a_layer(norm):
    layer = norm.make()
    layer(samples())
    twin = copy.deepcopy(layer)
    randomize(twin)
    assert not np.array_equal(to_numpy(twin(samples())), to_numpy(layer(samples())))


@every_norm
def test_registered_name(norm):
    name = f"normwise>{norm.layer.__name__}"
    assert keras.saving.get_registered_name(norm.layer) == name
    assert keras.saving.get_registered_object(name) is norm.layer
    assert keras.saving.serialize_keras_object(norm.make())["registered_name"] == name
    assert keras.saving.get_registered_name(type(norm.make())) == name


OLD = [("GroupNormalization", {"groups": 2, "axis": 2}), ("InstanceNormalization", {"axis": 2})]


@pytest.mark.parametrize(("name", "config"), OLD)
def test_names_of_tensorflow_addons(name, config):
    legacy = {"class_name": f"Addons>{name}", "config": config}
    current = {
        "module": "tensorflow_addons.layers.normalizations",
        "class_name": name,
        "config": config,
        "registered_name": f"Addons>{name}",
    }
    for saved in (legacy, current):
        for deserialize in (keras.layers.deserialize, keras.saving.deserialize_keras_object):
            layer = deserialize(copy.deepcopy(saved))
            assert type(layer) is getattr(normwise.layers, name)
            assert layer.axis == 2
    assert keras.saving.get_registered_object(f"Addons>{name}") is getattr(normwise.layers, name)


def test_an_old_model_config_becomes_a_model():
    config = {
        "name": "old",
        "layers": [
            {"class_name": "InputLayer", "config": {"batch_input_shape": (None, 5, 6)}},
            {"class_name": "Addons>GroupNormalization", "config": {"groups": 2}},
        ],
    }
    model = keras.Sequential.from_config(config)
    assert type(model.layers[-1]) is layers.GroupNormalization


SEVERAL_AXES = {
    "layer": lambda x: layers.LayerNormalization(axis=[1, 2, 3])(x),
    "layer without weights": lambda x: layers.LayerNormalization(
        axis=(2, 1), center=False, scale=False
    )(x),
    "rms": lambda x: layers.RMSNormalization(axis=[1, 2], scale=False)(x),
    "rms of one axis": lambda x: layers.RMSNormalization(axis=[2])(x),
    "response": lambda x: layers.FilterResponseNormalization(axis=[2, 3])(x),
    "op": lambda x: ops.layer_norm(x, axis=[1, 2]),
    "nested": lambda x: keras.Sequential([layers.LayerNormalization(axis=[1, 2])])(x),
    "wrapped": lambda x: keras.layers.TimeDistributed(layers.LayerNormalization(axis=[1, 2]))(x),
}


@pytest.fixture
def saved_as_h5(tmp_path, monkeypatch):
    """A function that saves a model in Keras's legacy format and gives the path."""
    monkeypatch.setattr("absl.logging.warning", lambda *_: None)

    def save(model):
        path = tmp_path / "model.h5"
        model.save(path)
        return path

    return save


def without_axes(path):
    """Make of a file what Keras alone would have written."""
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        for layer in config["config"]["layers"]:
            layer["config"].pop("axes", None)
        file.attrs["model_config"] = json.dumps(config)


@pytest.mark.parametrize("make", SEVERAL_AXES.values(), ids=SEVERAL_AXES.keys())
def test_several_axes_come_back_from_legacy_h5(make, saved_as_h5):
    inputs = keras.Input((5, 4, 6))
    model = keras.Model(inputs, make(inputs))
    randomize(model)
    x = samples((2, 5, 4, 6))
    loaded = keras.models.load_model(saved_as_h5(model), compile=False)
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(model(x)))
    assert [layer.get_config() for layer in loaded.layers if hasattr(layer, "axis")] == [
        layer.get_config() for layer in model.layers if hasattr(layer, "axis")
    ]


@pytest.mark.parametrize("name", ["layer", "layer without weights", "rms", "response"])
def test_a_legacy_h5_whose_axes_are_lost_is_refused(name, saved_as_h5):
    def make():
        inputs = keras.Input((5, 4, 6))
        return keras.Model(inputs, SEVERAL_AXES[name](inputs))

    model = randomize(make())
    path = saved_as_h5(model)
    without_axes(path)
    with pytest.raises(ValueError, match=r"has lost its axis: .* load_weights, and save it as"):
        keras.models.load_model(path, compile=False)
    twin, x = make(), samples((2, 5, 4, 6))
    twin.load_weights(path)
    np.testing.assert_array_equal(to_numpy(twin(x)), to_numpy(model(x)))


def test_only_a_legacy_h5_names_axes_twice(tmp_path, saved_as_h5):
    model = keras.Sequential([keras.Input((5, 6)), layers.LayerNormalization(axis=[1, 2])])
    saved_as_h5(model)
    assert "axes" not in model.layers[-1].get_config()
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as file:
        assert b'"axes": [' not in file.read("config.json").replace(b'"axes": {}', b"")
