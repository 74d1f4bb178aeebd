"""`accelerate`: Keras's and KerasHub's norms become ours; the model predicts and trains alike."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from frameworks import BACKEND, float64_enabled, to_numpy
from whole_models import SMALL, Untouched, images, randomize, trained

import normwise
from normwise.models import accelerate, norms_of


def predictions(model, x):
    return keras.tree.map_structure(to_numpy, model(x, training=False))


def assert_close(found, want, tolerance):
    for ours, theirs in zip(keras.tree.flatten(found), keras.tree.flatten(want), strict=True):
        largest = max(1.0, np.abs(theirs).max(initial=0))
        error = np.abs(ours - theirs).max(initial=0)
        assert error <= tolerance * largest, (error, largest)


def assert_trains_alike(faster, model, x, y, tolerance=1e-5):
    losses = trained(faster, x, y), trained(model, x, y)
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for ours, theirs in zip(faster.weights, model.weights, strict=True):
        assert_close(to_numpy(ours), to_numpy(theirs), tolerance)


@pytest.mark.parametrize("make", [SMALL["functional"], SMALL["subclassed"]])
def test_the_model_predicts_and_trains_on_as_before(make):
    model = randomize(make())
    x, y = images(8, 4, 6), images(8, 4, 3 if model.name == "functional" else 6, seed=1)
    trained(model, x, y)
    untouched = Untouched(model)
    faster, report = accelerate(model)
    untouched.check()
    assert {record.done.partition(".")[0] for record in report} == {"normwise", "kept"}
    assert [record.why for record in report if not record.changed] == [
        "normwise has no batch norm: see fold_batch_norm, replace_batch_norm"
    ] * sum(record.was == "BatchNormalization" for record in report)
    assert_close(predictions(faster, x), predictions(model, x), 1e-6)
    assert_trains_alike(faster, model, x, y)


def test_a_file_has_ours_where_the_config_says_so(tmp_path):
    faster, report = accelerate(randomize(SMALL["functional"]()))
    in_memory = {record.layer for record in report if record.why.startswith("only in memory")}
    assert in_memory == {"block/first"}
    faster.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.get_layer("twice")) is normwise.layers.LayerNormalization
    assert type(loaded.get_layer("block").first) is keras.layers.LayerNormalization
    x = images(2, 4, 6)
    assert_close(predictions(loaded, x), predictions(faster, x), 1e-6)


OPTIONS = {
    "group": lambda: keras.layers.GroupNormalization(2, axis=1, epsilon=0.1, scale=False),
    "instance": lambda: keras.layers.GroupNormalization(-1, beta_regularizer="l2"),
    "layer": lambda: keras.layers.LayerNormalization(center=False, gamma_constraint="non_neg"),
    "layer over two": lambda: keras.layers.LayerNormalization(axis=[-2, -1]),
    "rms": lambda: keras.layers.RMSNormalization(epsilon=1e-2),
    "frozen": lambda: keras.layers.LayerNormalization(trainable=False),
    "half": lambda: keras.layers.RMSNormalization(dtype="mixed_bfloat16"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_kept(name):
    # Keras's own layer norm raises over two axes on PyTorch, and cannot be asked.
    if BACKEND == "torch" and name == "layer over two":
        pytest.skip("Keras's LayerNormalization(axis=[-2, -1]) raises on PyTorch")
    layer = OPTIONS[name]()
    model = randomize(keras.Sequential([keras.Input((4, 6)), layer]))
    faster, report = accelerate(model)
    (record,) = report
    assert record.changed, record
    ours = faster.layers[0]
    assert type(ours).__module__.startswith("normwise.")
    assert (ours.name, ours.trainable, ours.dtype_policy.name) == (
        layer.name,
        layer.trainable,
        layer.dtype_policy.name,
    )
    for key in ("beta_regularizer", "gamma_constraint"):
        assert type(getattr(ours, key, None)) is type(getattr(layer, key, None))
    x = images(2, 4, 6)
    # On PyTorch, Keras takes the variance of a group as a difference of squares.
    tolerance = 1e-2 if name == "half" else 5e-5
    assert_close(predictions(faster, x), predictions(model, x), tolerance)


def test_float64():
    with float64_enabled():
        norm = keras.layers.LayerNormalization(dtype="float64")
        model = keras.Sequential([keras.Input((6,), dtype="float64"), norm])
        faster, report = accelerate(model)
        # Keras's own has no more than float32's digits on some backends, and then stays.
        assert report[0].changed or "other values" in report[0].why
        assert faster.layers[0].dtype_policy.name == "float64"


def test_spectral_norm_keeps_its_vector():
    inner = keras.layers.Conv2D(4, 2)
    wrapper = keras.layers.SpectralNormalization(inner, power_iterations=2, name="wrapper")
    model = keras.Sequential([keras.Input((6, 6, 3)), wrapper])
    x = images(2, 6, 6, 3)
    model(x, training=True)
    faster, report = accelerate(model)
    assert report[0].done == "normwise.layers.SpectralNormalization"
    ours = faster.get_layer("wrapper")
    np.testing.assert_array_equal(to_numpy(ours.u), to_numpy(wrapper.vector_u))
    assert ours.power_iterations == 2
    assert_close(predictions(faster, x), predictions(model, x), 1e-6)
    found, want = (to_numpy(each(x, training=True)) for each in (faster, model))
    assert_close(found, want, 1e-5)


def test_what_stays_says_why():
    class Own(keras.layers.LayerNormalization):
        def call(self, x):
            return 2 * super().call(x)

    model = keras.Sequential(
        [
            keras.Input((8,)),
            Own(name="own"),
            keras.layers.UnitNormalization(name="unit"),
            normwise.layers.RMSNormalization(name="ours"),
        ]
    )
    faster, report = accelerate(model)
    assert {record.layer: record.why for record in report} == {
        "own": "Own is no class that normwise knows",
        "unit": "divides by a length, at least 1e-6, and not by a root with an epsilon",
        "ours": "is of normwise already",
    }
    assert not report.changed
    x = images(2, 8)
    np.testing.assert_array_equal(predictions(faster, x), predictions(model, x))


def test_a_norm_that_computes_otherwise_stays(monkeypatch):
    monkeypatch.setattr(keras.layers.RMSNormalization, "call", lambda self, x: x * 2)
    model = keras.Sequential([keras.Input((8,)), keras.layers.RMSNormalization(name="odd")])
    _, report = accelerate(model)
    assert report[0].why == "gives other values than normwise's on random input"


def test_a_model_that_predicts_otherwise_is_not_returned(monkeypatch):
    monkeypatch.setattr("normwise.models.comparison.compare", lambda *models: (1.0, 1e-6))
    with pytest.raises(ValueError, match=r"predicts otherwise, by 1\.0e\+00 where 1\.0e-06"):
        accelerate(SMALL["sequential"]())


@pytest.mark.skipif(importlib.util.find_spec("keras_hub") is None, reason="needs keras-hub")
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_transformer_of_keras_hub(name):
    """In a process of its own: KerasHub imports every framework, and Triton bears no TensorFlow."""
    program = f"import test_accelerate; test_accelerate.check_transformer({name!r})"
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent)}
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_transformer(name):
    """That a small transformer predicts and trains the same with ours."""
    import keras_hub

    heads = {"num_query_heads": 2, "num_key_value_heads": 1}
    tiny = {"vocabulary_size": 40, "num_layers": 1, "hidden_dim": 8, "intermediate_dim": 12}
    keras.utils.set_random_seed(0)
    if name == "llama":
        model = keras_hub.models.LlamaBackbone(**heads, **tiny)
    else:
        model = keras_hub.models.GemmaBackbone(head_dim=4, **heads, **tiny)
    randomize(model)
    untouched = Untouched(model)
    faster, report = accelerate(model)
    untouched.check()
    assert type(faster) is type(model)
    assert len(report.changed) == len(report) == 3
    for norm in norms_of(faster):
        assert type(norm.layer) is normwise.layers.RMSNormalization
        assert norm.layer.gamma_offset == (1.0 if name == "gemma" else 0.0)
    tokens = np.random.default_rng(0).integers(1, 40, (2, 7))
    x = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    want = predictions(model, x)
    assert_close(predictions(faster, x), want, 1e-5)
    assert_trains_alike(faster, model, x, images(*want.shape), 1e-4)


def test_convnext():
    keras.utils.set_random_seed(0)
    model = keras.applications.ConvNeXtTiny(
        weights=None, input_shape=(32, 32, 3), classes=4, classifier_activation=None
    )
    faster, report = accelerate(model)
    assert len(report.changed) == len(report) == 23
    x = images(2, 32, 32, 3)
    assert_close(predictions(faster, x), predictions(model, x), 1e-5)
    loaded = keras.Model.from_config(faster.get_config())
    assert type(loaded.layers[-2]) is normwise.layers.LayerNormalization
