"""What leaves the process: exported models, which run without normwise, and files."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
from frameworks import BACKEND, assert_within, skip_newer_stablehlo
from norms import every_norm, randomize, samples

import normwise
from normwise import dispatch, layers
from normwise.kernels import library


@pytest.fixture
def model():
    """Norms between other layers, with weights that no initializer gives."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 5, 8), name="image")
    y = layers.GroupNormalization(groups=4, activation="relu", name="group")(inputs)
    y = keras.layers.Conv2D(6, 3)(y)
    y = layers.InstanceNormalization(name="instance")(y)
    y = layers.LayerNormalization(axis=[1, 2, 3], activation="gelu", name="layer")(y)
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(y)))
    for name in ("group", "instance", "layer"):
        randomize(model.get_layer(name))
    return model


@pytest.fixture
def model_of_others():
    """What is no norm of x alone: of kernels, of channels that compete, and one used both ways."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 5, 8), name="image")
    convolution = keras.layers.Conv2D(3, 2, padding="same")
    y = layers.WeightStandardization(convolution, scaled=True, name="standardized")(inputs)
    y = layers.GlobalResponseNormalization(name="response")(y)
    y = keras.layers.Reshape((30, 3))(y)
    norm = layers.ReversibleInstanceNormalization(name="reversible")
    y, statistics = norm(y)
    y = norm.invert(keras.layers.Dense(3)(y), statistics)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(y))
    for name in ("response", "reversible"):
        randomize(model.get_layer(name))
    return model


@pytest.fixture
def modulated():
    """Norms that something else scales and shifts, of an image of any extents, and a residual."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((None, None, 8), name="image")
    x = keras.layers.Conv2D(6, 3, padding="same")(inputs)
    condition = keras.layers.GlobalAveragePooling2D()(inputs)
    y, gate = layers.Modulated(layers.LayerNormalization(), gate=True, name="m")(x, condition)
    y, total = layers.GroupNormalization(groups=2, gamma_offset=1.0)(y * gate, residual=x)
    y = layers.AdaptiveInstanceNormalization()(y, keras.layers.Conv2D(6, 1)(inputs))
    y = layers.SPADE(filters=4)(y + total, keras.layers.UpSampling2D(2)(inputs))
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(y))
    randomize(model.get_layer("m"))
    # Keras exports to ONNX what has been called.
    model(images(1))
    return model


def images(count, *extents):
    return samples((count, *(extents or (6, 5)), 8))


both_models = pytest.mark.parametrize("which", ["model", "model_of_others"])


def predict_elsewhere(program, artefact, x):
    """What the artefact says of `x`, in a process that knows nothing of normwise."""
    np.save(f"{artefact}-x.npy", x)
    subprocess.run(
        [sys.executable, "-c", program + ALONE, str(artefact)],
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        check=True,
        timeout=300,
    )
    return np.load(f"{artefact}-y.npy")


ALONE = """
np.save(sys.argv[1] + "-y.npy", predict(np.load(sys.argv[1] + "-x.npy")))
assert "normwise" not in sys.modules
"""

SAVED_MODEL = """
import sys, numpy as np, tensorflow as tf
loaded = tf.saved_model.load(sys.argv[1])
(name,) = loaded.signatures["serving_default"].structured_input_signature[1]

def predict(x):
    served = loaded.serve(x)
    (signed,) = loaded.signatures["serving_default"](**{name: tf.constant(x)}).values()
    assert np.array_equal(served, signed)
    return served
"""

ONNX = """
import sys, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])

def predict(x):
    (y,) = session.run(None, {session.get_inputs()[0].name: x})
    return y
"""


# Of Keras's call of jax2tf.
@pytest.mark.filterwarnings("ignore:The `native_serialization:DeprecationWarning")
@pytest.mark.skipif(BACKEND == "torch", reason="Keras exports no SavedModel from PyTorch")
@both_models
def test_a_saved_model_runs_without_normwise(which, request, tmp_path, capfd):
    pytest.importorskip("tensorflow")
    model, x = request.getfixturevalue(which), images(3)
    # Traced with the native kernels first, of which the export must not make use.
    want = model.predict(x, verbose=0)
    model.export(tmp_path / "model", verbose=False)
    try:
        found = predict_elsewhere(SAVED_MODEL, tmp_path / "model", x)
    except subprocess.CalledProcessError:
        skip_newer_stablehlo(capfd.readouterr().err)
        raise
    assert_within(found, want, 1e-5)
    more = images(7)
    found = predict_elsewhere(SAVED_MODEL, tmp_path / "model", more)
    assert_within(found, model.predict(more, verbose=0), 1e-5)


@pytest.mark.filterwarnings("ignore:The `native_serialization:DeprecationWarning")
@pytest.mark.skipif(BACKEND == "torch", reason="Keras exports no SavedModel from PyTorch")
def test_a_saved_model_of_modulated_norms_runs_without_normwise(modulated, tmp_path, capfd):
    pytest.importorskip("tensorflow")
    modulated.export(tmp_path / "model", verbose=False)
    for x in (images(3), images(2, 9, 7)):
        try:
            found = predict_elsewhere(SAVED_MODEL, tmp_path / "model", x)
        except subprocess.CalledProcessError:
            skip_newer_stablehlo(capfd.readouterr().err)
            raise
        assert_within(found, modulated.predict(x, verbose=0), 1e-4)


def missing_for_onnx():
    if BACKEND != "torch":
        return "the export to ONNX is tried on PyTorch"
    names = [n for n in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(n)]
    return f"{' and '.join(names)} must be installed" if names else None


# Of PyTorch's tracer and exporter: that they are old, and that the channels become a constant.
@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.skipif(missing_for_onnx() is not None, reason=str(missing_for_onnx()))
@pytest.mark.parametrize(
    ("which", "fixed"), [("model", True), ("model", False), ("model_of_others", True)]
)
def test_an_onnx_file_runs_without_normwise(which, request, fixed, tmp_path):
    model = request.getfixturevalue(which)
    if not fixed:
        inputs = keras.Input((None, None, 8))
        y = model.get_layer("group")(inputs)
        # At epsilon 0 torch's own norm gives NaN, so this one is the composite.
        y = layers.GroupNormalization(groups=2, epsilon=0.0, scale=False)(y)
        y = layers.LayerNormalization()(layers.InstanceNormalization()(y))
        y = layers.RMSNormalization()(y)
        model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(y))
    x, more = images(3), images(7) if fixed else images(2, 9, 7)
    want = model.predict(x, verbose=0)
    file = tmp_path / "model.onnx"
    model.export(file, format="onnx", verbose=False)
    assert_within(predict_elsewhere(ONNX, file, x), want, 1e-5)
    found = predict_elsewhere(ONNX, file, more)
    assert_within(found, model.predict(more, verbose=0), 1e-5)


@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.skipif(missing_for_onnx() is not None, reason=str(missing_for_onnx()))
def test_an_onnx_file_of_modulated_norms_runs_without_normwise(modulated, tmp_path):
    file = tmp_path / "model.onnx"
    modulated.export(file, format="onnx", verbose=False)
    for x in (images(3), images(2, 9, 7)):
        found = predict_elsewhere(ONNX, file, x)
        assert_within(found, modulated.predict(x, verbose=0), 1e-4)


COMPOSITE = """
import sys, numpy as np, keras, normwise
from normwise import dispatch

assert dispatch.mode() == "composite"
model = keras.models.load_model(sys.argv[1] + ".keras")
np.save(sys.argv[1] + "-y.npy", model.predict(np.load(sys.argv[1] + "-x.npy"), verbose=0))
"""


def strings(config):
    """Every key and text in a config."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield key
            yield from strings(value)
    elif isinstance(config, list):
        for value in config:
            yield from strings(value)
    elif isinstance(config, str):
        yield config


@pytest.mark.skipif(library.path() is None, reason="the native library was not built")
def test_a_file_knows_no_kernel(model, tmp_path):
    """Saved after training on the native kernels, it predicts the same where there are none."""
    x = images(4)
    with normwise.use_kernels("auto"):
        model.compile("sgd", "mse", jit_compile=False)
        model.fit(x, np.ones((4, 3)), epochs=2, verbose=0)
        want = model.predict(x, verbose=0)
        model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as saved:
        config = json.loads(saved.read("config.json"))
        names = {name.split("/")[-1] for name in saved.namelist()}
    assert names == {"config.json", "metadata.json", "model.weights.h5"}
    words = ("native", "kernels", *dispatch.MODES[1:], library.path().name, "normwise.kernels")
    assert not [s for s in strings(config) if any(word in s.lower() for word in words)]

    np.save(tmp_path / "model-x.npy", x)
    subprocess.run(
        [sys.executable, "-c", COMPOSITE, str(tmp_path / "model")],
        env={**os.environ, "NORMWISE_KERNELS": "composite"},
        check=True,
        timeout=300,
    )
    assert_within(np.load(tmp_path / "model-y.npy"), want, 1e-5)


@every_norm
def test_a_config_is_the_same_in_every_mode(norm):
    configs = []
    for mode in dispatch.MODES[:: 1 if library.path() else 2]:
        with normwise.use_kernels(mode):
            layer = norm.make(name="n", activation="relu")
            layer(samples())
            configs.append(layer.get_config())
    assert all(config == configs[0] for config in configs)
    assert "kernel" not in json.dumps(configs[0])


def test_a_model_loaded_in_another_mode_predicts_the_same(model, tmp_path):
    x = images(2)
    model.save(tmp_path / "model.keras")
    want = model.predict(x, verbose=0)
    with normwise.use_kernels("composite"):
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert_within(loaded.predict(x, verbose=0), want, 1e-5)
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in model.layers]
