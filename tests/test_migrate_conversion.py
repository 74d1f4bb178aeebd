"""convert: what it writes, what it says, and that it writes nothing else."""

import dataclasses
import io
import json
from pathlib import Path

import keras
import numpy as np
import old_models
import pytest
from frameworks import to_numpy
from rich.console import Console
from typer.testing import CliRunner

from normwise import cli, migrate
from normwise.migrate.models import conversion

FIXTURES = Path(__file__).parents[2] / "shared" / "tfa_models"
# What TensorFlow Addons predicted, on another framework's kernels.
TOLERANCE = 2e-4
RNG = np.random.default_rng(0)

CONFIG = old_models.small()
WEIGHTS = {
    "conv": {"kernel": RNG.normal(size=(3, 3, 4, 4)), "bias": RNG.normal(size=4)},
    "norm": {"gamma": RNG.normal(size=4), "beta": RNG.normal(size=4)},
    "dense": {"kernel": RNG.normal(size=(4, 3)), "bias": RNG.normal(size=3)},
}


@pytest.fixture
def old(tmp_path):
    return write(tmp_path, CONFIG, WEIGHTS)


def write(folder, config, weights):
    weights = {
        name: {key: np.asarray(array, "float32") for key, array in arrays.items()}
        for name, arrays in weights.items()
    }
    return old_models.write_h5(folder / "old.h5", config, weights)


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


def test_the_model_is_written_and_its_layers_listed(old, tmp_path):
    out = tmp_path / "new.keras"
    converted = migrate.convert(old, out)
    assert names(tmp_path) == ["new.keras", "old.h5"]
    rows = [dataclasses.astuple(layer) for layer in converted.layers]
    assert rows == [
        ("conv", "Conv2D", "Conv2D", 2, 148),
        ("norm", "Addons>GroupNormalization", "normwise>GroupNormalization", 2, 8),
        ("pool", "GlobalAveragePooling2D", "GlobalAveragePooling2D", 0, 0),
        ("dense", "Dense", "Dense", 2, 15),
    ]
    assert (converted.path, converted.out) == (old, out)
    assert converted.largest_difference <= converted.tolerance < 1e-4
    assert converted.versions["saved by Keras"] == old_models.VERSION
    assert converted.versions["keras"] == keras.__version__

    images = RNG.normal(size=(2, 6, 6, 4)).astype("float32")
    predicted = to_numpy(keras.saving.load_model(out)(images))
    np.testing.assert_allclose(predicted, to_numpy(migrate.load_model(old)(images)), atol=1e-6)


def test_the_file_may_be_read_by_whom_the_umask_says(old, tmp_path):
    (tmp_path / "by_hand").touch()
    migrate.convert(str(old), str(tmp_path / "new.keras"))
    mode = (tmp_path / "new.keras").stat().st_mode
    assert mode == (tmp_path / "by_hand").stat().st_mode


@pytest.mark.parametrize(
    ("out", "texts"),
    [
        ("new.h5", ["new.h5 does not end in .keras", "write to", "new.keras"]),
        ("new", ["does not end in .keras"]),
        ("no/such/new.keras", ["there is no folder", "no/such", "make it first"]),
        ("there.keras", ["there.keras exists", "overwrite=True"]),
        ("link.keras", ["link.keras exists"]),
        ("folder.keras", ["folder.keras is a folder"]),
    ],
)
def test_where_it_may_not_write(old, tmp_path, out, texts):
    (tmp_path / "there.keras").write_text("before")
    (tmp_path / "link.keras").symlink_to("nowhere")
    (tmp_path / "folder.keras").mkdir()
    before = names(tmp_path)
    with pytest.raises(ValueError) as refused:  # noqa: PT011 -- the texts are what is compared
        migrate.convert(old, tmp_path / out)
    assert all(text in str(refused.value) for text in texts)
    assert names(tmp_path) == before
    assert (tmp_path / "there.keras").read_text() == "before"


def test_the_old_file_is_not_overwritten(tmp_path):
    path = old_models.write_keras(tmp_path / "old.keras", CONFIG, WEIGHTS)
    (tmp_path / "other.keras").hardlink_to(path)
    for out in ("old.keras", "other.keras"):
        with pytest.raises(ValueError, match="is the file to convert; write to another"):
            migrate.convert(path, tmp_path / out, overwrite=True)


def test_overwrite(old, tmp_path):
    out = tmp_path / "new.keras"
    out.write_text("before")
    migrate.convert(old, out, overwrite=True)
    assert keras.saving.load_model(out).name == "sequential"


def appearing(monkeypatch, out):
    """Let a file appear at the last moment before a conversion moves its own."""
    compare = conversion._compare_predictions

    def compare_and_appear(*arguments):
        out.write_text("precious")
        return compare(*arguments)

    monkeypatch.setattr(conversion, "_compare_predictions", compare_and_appear)


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_appears_meanwhile_stays(old, tmp_path, monkeypatch, has_links):
    out = tmp_path / "new.keras"
    if not has_links:
        monkeypatch.setattr(conversion.os, "link", raising(OSError("no hard links here")))
    migrate.convert(old, tmp_path / "other.keras")
    assert names(tmp_path) == ["old.h5", "other.keras"]
    appearing(monkeypatch, out)
    with pytest.raises(ValueError, match=r"new\.keras exists; write to another"):
        migrate.convert(old, out)
    assert out.read_text() == "precious"
    assert names(tmp_path) == ["new.keras", "old.h5", "other.keras"]


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


class Halfway(BaseException):
    """As KeyboardInterrupt is: no Exception, so nothing that catches those stops it."""


def fail_at(monkeypatch, where, error):
    fail = raising(error)

    def save_half(model, path, **kwargs):
        Path(path).write_bytes(b"PK half")
        raise error

    if where == "save":
        monkeypatch.setattr(keras.Model, "save", save_half)
    elif where == "read back":
        monkeypatch.setattr(keras.saving, "load_model", fail)
    elif where == "compare":
        monkeypatch.setattr(conversion, "_compare_predictions", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)


@pytest.mark.parametrize("where", ["save", "read back", "compare", "move"])
@pytest.mark.parametrize("error", [Halfway(), KeyboardInterrupt(), OSError("disk is full")])
def test_nothing_is_left_behind(old, tmp_path, monkeypatch, where, error):
    out = tmp_path / "new.keras"
    out.write_text("before")
    fail_at(monkeypatch, where, error)
    with pytest.raises(type(error)):
        migrate.convert(old, out, overwrite=True)
    assert names(tmp_path) == ["new.keras", "old.h5"]
    assert out.read_text() == "before"


def test_what_keras_cannot_read_back_is_told_in_one_line(old, tmp_path, monkeypatch):
    fail_at(monkeypatch, "read back", TypeError("Cannot deserialize\n\nconfig={...}"))
    with pytest.raises(
        ValueError, match=r"cannot save it and read it back \(TypeError: Cannot"
    ) as e:
        migrate.convert(old, tmp_path / "new.keras")
    assert "\n" not in str(e.value)


class Scale(keras.layers.Layer):
    """A layer of a user's own, which may forget its argument."""

    remembers = True

    def __init__(self, factor=1.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, inputs):
        return inputs * self.factor

    def get_config(self):
        own = {"factor": self.factor} if self.remembers else {}
        return {**super().get_config(), **own}


class Forgetful(Scale):
    """A layer that forgets its argument."""

    remembers = False


class Bias(keras.layers.Layer):
    """A layer that does not save its weight."""

    def build(self, shape):
        self.bias = self.add_weight(name="bias", shape=(shape[-1],), initializer="zeros")

    def call(self, inputs):
        return inputs + 0.0 * self.bias

    def save_own_variables(self, store):
        pass

    def load_own_variables(self, store):
        pass


def with_own_layer(folder, class_name, weights, **config):
    layers = CONFIG["config"]["layers"]
    own = old_models.layer(class_name, "own", **config)
    return write(folder, old_models.sequential(*layers, own), {**WEIGHTS, "own": weights})


def test_custom_objects(tmp_path):
    old = with_own_layer(tmp_path, "Scale", {}, factor=3.0)
    with pytest.raises(ValueError, match="Scale") as refused:
        migrate.convert(old, tmp_path / "new.keras")
    assert "custom_objects" in str(refused.value)
    converted = migrate.convert(old, tmp_path / "new.keras", custom_objects={"Scale": Scale})
    assert (converted.layers[-1].old, converted.layers[-1].new) == ("Scale", "Scale")


@pytest.mark.parametrize(
    ("own", "weights", "config", "text"),
    [
        (Forgetful, {}, {"factor": 3.0}, "predicts otherwise than the loaded one"),
        (Bias, {"bias": np.ones(3)}, {}, "own/bias is another after saving"),
    ],
)
def test_another_model_is_not_written(tmp_path, own, weights, config, text):
    old = with_own_layer(tmp_path, own.__name__, weights, **config)
    with pytest.raises(ValueError, match=text):
        migrate.convert(old, tmp_path / "new.keras", custom_objects={own.__name__: own})
    assert names(tmp_path) == ["old.h5"]


class Seen(keras.layers.Layer):
    """Keeps what it is called on, and passes it on."""

    inputs = []  # noqa: RUF012 -- shared by the loaded and the written model

    def call(self, inputs, mask=None):
        Seen.inputs.append(to_numpy(inputs))
        return inputs

    def compute_output_spec(self, inputs, mask=None):
        return keras.KerasTensor(inputs.shape, inputs.dtype)


@pytest.fixture
def seen():
    Seen.inputs.clear()
    return Seen.inputs


def converted_functional(folder, layers, weights, inputs, outputs):
    config = old_models.functional(layers, inputs, outputs)
    old = write(folder, config, weights)
    return migrate.convert(old, folder / "new.keras", custom_objects={"Seen": Seen})


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_input_of_an_embedding_is_in_its_vocabulary(tmp_path, seen, dtype):
    table = RNG.normal(size=(5, 2))
    embedding = old_models.layer("Embedding", "table", input_dim=5, output_dim=2, mask_zero=True)
    layers = [
        (old_models.input_layer("words", None, dtype=dtype), []),
        (old_models.layer("Seen", "seen"), ["words"]),
        (embedding, ["seen"]),
        (old_models.layer("LSTM", "lstm", units=2), ["table"]),
    ]
    lstm = {
        "lstm_cell/kernel": RNG.normal(size=(2, 8)),
        "lstm_cell/recurrent_kernel": RNG.normal(size=(2, 8)),
        "lstm_cell/bias": RNG.normal(size=8),
    }
    weights = {"table": {"embeddings": table}, "lstm": lstm}
    converted_functional(tmp_path, layers, weights, ["words"], ["lstm"])
    words = seen[-1]
    assert set(np.unique(words)) == {0, 1, 2, 3, 4}
    # The first sample is shorter than the second, so that the mask does something.
    assert not words[0, words.shape[1] // 2 :].any()
    assert words[1, words.shape[1] // 2 :].any()


def test_masked_steps_have_the_value_that_is_masked(tmp_path, seen):
    layers = [
        (old_models.input_layer("steps", 8, 3), []),
        (old_models.layer("Masking", "masking", mask_value=-7.0), ["steps"]),
        (old_models.layer("Seen", "seen"), ["steps"]),
        (old_models.layer("Add", "add"), ["masking", "seen"]),
    ]
    converted_functional(tmp_path, layers, {}, ["steps"], ["add"])
    assert (seen[-1][0, 4:] == -7.0).all()
    assert (seen[-1][0, :4] != -7.0).all()
    assert (seen[-1][1] != -7.0).all()


def test_open_extents_grow_until_the_model_takes_them(tmp_path, seen):
    layers = [
        (old_models.input_layer("image", None, None, 1), []),
        (old_models.layer("Seen", "seen"), ["image"]),
        (old_models.layer("MaxPooling2D", "pool", pool_size=[40, 40], strides=[40, 40]), ["seen"]),
        (old_models.layer("Conv2D", "conv", filters=1, kernel_size=[1, 1]), ["pool"]),
    ]
    weights = {"conv": {"kernel": np.ones((1, 1, 1, 1)), "bias": np.ones(1)}}
    converted = converted_functional(tmp_path, layers, weights, ["image"], ["conv"])
    assert seen[-1].shape == (2, 64, 64, 1)
    assert converted.largest_difference <= converted.tolerance


def test_several_inputs_and_outputs(tmp_path, seen):
    layers = [
        (old_models.input_layer("a", 3), []),
        (old_models.input_layer("b", 3), []),
        (old_models.layer("Seen", "seen_a"), ["a"]),
        (old_models.layer("Seen", "seen_b"), ["b"]),
        (old_models.layer("Add", "sum"), ["seen_a", "seen_b"]),
        (old_models.layer("Subtract", "difference"), ["seen_a", "seen_b"]),
    ]
    converted_functional(tmp_path, layers, {}, ["a", "b"], ["sum", "difference"])
    a, b = seen[-2:]
    assert (a != b).any()
    assert keras.saving.load_model(
        tmp_path / "new.keras", custom_objects={"Seen": Seen}
    ).output_shape == [(None, 3), (None, 3)]


def test_the_same_seed_draws_the_same(old, tmp_path):
    conversions = [
        migrate.convert(old, tmp_path / f"{i}.keras", seed=seed) for i, seed in enumerate((3, 3))
    ]
    assert conversions[0].tolerance == conversions[1].tolerance


def shipped():
    if not FIXTURES.is_dir():
        reason = "the models saved by TensorFlow Addons are not beside this checkout"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
    paths = [
        path for suffix in ("h5", "keras", "savedmodel") for path in FIXTURES.glob(f"*.{suffix}")
    ]
    whole = sorted(path for path in paths if not path.name.endswith(".weights.h5"))
    return [pytest.param(path, id=path.name) for path in whole]


@pytest.mark.parametrize("path", shipped())
def test_shipped_models_predict_as_they_did_when_they_were_saved(path, tmp_path):
    out = tmp_path / "new.keras"
    converted = migrate.convert(path, out)
    assert names(tmp_path) == ["new.keras"]
    index = json.loads((FIXTURES / "index.json").read_text())
    listed = [
        layer.new.partition("(")[0].partition(">")[2] or layer.new for layer in converted.layers
    ]
    wanted = index[path.stem]["summary"]
    assert [name.partition("(")[0] for name in listed] == wanted
    assert all(layer.old for layer in converted.layers)
    assert sum(layer.parameters for layer in converted.layers) > 0

    stored = np.load(FIXTURES / f"{path.stem}.npz")
    predicted = to_numpy(keras.saving.load_model(out)(stored["x"]))
    assert np.abs(predicted - stored["y"]).max() <= TOLERANCE


# The command.


def command(*arguments):
    return CliRunner().invoke(cli.app, ["convert", *map(str, arguments)])


def refused(result, *texts):
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert all(text in result.stderr for text in texts), result.stderr


def test_the_command_prints_the_layers_and_where_it_wrote(old, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command("old.h5", "new.keras")
    assert result.exit_code == 0, result.output
    for text in ("conv", "Addons>", "normwise>", "148", "largest difference"):
        assert text in result.stdout
    assert result.stdout.endswith("Writing new.keras\n")
    assert names(tmp_path) == ["new.keras", "old.h5"]

    refused(command("old.h5", "new.keras"), "new.keras exists", "--overwrite")
    assert command("old.h5", "new.keras", "--overwrite").exit_code == 0


def test_the_command_refuses_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.h5").write_text("no model")
    with_own_layer(tmp_path, "Scale", {}, factor=3.0)
    refused(command("missing.h5", "new.keras"), "missing.h5")
    refused(command("text.h5", "new.keras"), "text.h5")
    refused(command("old.h5", "new.keras"), "Scale", "custom_objects")
    assert names(tmp_path) == ["old.h5", "text.h5"]


def test_what_cannot_be_printed_is_not_written(old, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.Console, "print", raising(BrokenPipeError("the pipe is broken")))
    refused(command(old, tmp_path / "new.keras"), "the pipe is broken")
    assert names(tmp_path) == ["old.h5"]


def test_a_class_is_text_and_no_markup(tmp_path):
    layers = [{**each, "registered_name": "[/x]:boom:"} for each in CONFIG["config"]["layers"]]
    layers[1]["config"] = {**layers[1]["config"], "cells": None, "layers": None}
    old = write(tmp_path, old_models.sequential(*layers), WEIGHTS)
    result = command(old, tmp_path / "new.keras")
    assert result.exit_code == 0, result.output
    assert "[/x]:boom:" in result.stdout


def test_the_table_fits_a_narrow_terminal(old, tmp_path):
    converted = migrate.convert(old, tmp_path / "new.keras")
    console = Console(file=io.StringIO(), width=80)
    console.print(cli.converted_table(converted))
    shown = console.file.getvalue()
    assert "…" not in shown
    assert "148" in shown
    assert "saved by Keras 2.14.0" in shown
