"""`normwise model ...`: tables of the norms in files, and files with other norms."""

import re

import keras
import numpy as np
import pytest
from frameworks import to_numpy
from typer.testing import CliRunner
from whole_models import images, randomize

import normwise
from normwise import cli


@pytest.fixture
def file(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            keras.layers.Conv2D(8, 3, name="conv"),
            keras.layers.BatchNormalization(name="batch"),
            keras.layers.GroupNormalization(4, name="group"),
            keras.layers.Dense(2, name="dense"),
        ],
        name="net",
    )
    randomize(model).save(tmp_path / "model.keras")
    return tmp_path / "model.keras"


def command(*arguments):
    result = CliRunner().invoke(
        cli.app, ["model", *map(str, arguments)], env={"COLUMNS": "160"}, catch_exceptions=False
    )
    return result.exit_code, re.sub(r"[\s│]+", " ", result.output)


def test_norms_prints_each_with_its_sets_and_kernel(file):
    status, words = command("norms", file)
    assert status == 0
    assert "batch batch any, 4, 4, 8 axes 0, 1, 2 16 of keras" in words
    assert "group group any, 4, 4, 8 axes 1, 2 in 4 groups 16 of keras" in words
    status, words = command("accelerate", file, file.with_name("new.keras"))
    kernel = normwise.explain(normwise.layers.GroupNormalization(4), (None, 4, 4, 8)).kernel
    _, words = command("norms", file.with_name("new.keras"))
    assert f"axes 1, 2 in 4 groups 16 {kernel}" in words


def test_a_model_without_norms(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.save(tmp_path / "plain.keras")
    status, words = command("norms", tmp_path / "plain.keras")
    assert (status, "There is no norm in" in words) == (0, True)


def test_accelerate_writes_a_model_that_predicts_the_same(file):
    before = file.read_bytes()
    status, words = command("accelerate", file, file.with_name("new.keras"))
    assert status == 0
    assert "normwise.layers.GroupNormalization" in words
    assert "1 of 2 norms changed" in words
    assert file.read_bytes() == before
    assert sorted(each.name for each in file.parent.iterdir()) == ["model.keras", "new.keras"]
    new, old = (keras.models.load_model(file.with_name(n)) for n in ("new.keras", "model.keras"))
    x = images(2, 6, 6, 3)
    np.testing.assert_allclose(to_numpy(new(x)), to_numpy(old(x)), atol=1e-4)


def test_fold_writes_a_model_without_batch_norm(file):
    new = file.with_name("new.keras")
    status, words = command("fold-batch-norm", file, new)
    assert (status, "folded into conv" in words) == (0, True)
    loaded = keras.models.load_model(new)
    assert type(loaded.get_layer("batch")) is keras.layers.Identity
    x = images(2, 6, 6, 3)
    want = keras.models.load_model(file)(x)
    np.testing.assert_allclose(to_numpy(loaded(x)), to_numpy(want), atol=1e-4)


def test_replace_freeze_and_unfreeze(file):
    new = file.with_name("new.keras")
    status, words = command("replace-batch-norm", file, new, "--groups", 2)
    assert (status, "GroupNormalization(groups=2)" in words) == (0, True)
    assert type(keras.models.load_model(new).get_layer("batch")) is (
        normwise.layers.GroupNormalization
    )
    status, _ = command("replace-batch-norm", file, new, "--with", "layer", "--overwrite")
    assert status == 0
    assert type(keras.models.load_model(new).get_layer("batch")) is (
        normwise.layers.LayerNormalization
    )
    status, words = command("freeze", file, new, "--kind", "batch", "--overwrite")
    assert (status, "moving statistics" in words) == (0, True)
    loaded = keras.models.load_model(new)
    assert (loaded.get_layer("batch").trainable, loaded.get_layer("group").trainable) == (
        False,
        True,
    )
    status, _ = command("unfreeze", new, file.with_name("again.keras"))
    assert status == 0
    assert keras.models.load_model(file.with_name("again.keras")).get_layer("batch").trainable


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["accelerate", "model.keras", "model.keras"], "write to another"),
        (["accelerate", "model.keras", "new.h5"], "write to new.keras"),
        (["accelerate", "model.keras", "no/new.keras"], "there is no folder no"),
        (["accelerate", "none.keras", "new.keras"], "there is no file none.keras"),
        (["norms", "old.h5"], "convert what Keras 2 saved by `normwise convert`"),
        (["norms", "text.keras"], "text.keras cannot be loaded by Keras"),
        (["replace-batch-norm", "model.keras", "new.keras", "--groups", "3"], "does not divide"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(file, monkeypatch, arguments, says):
    monkeypatch.chdir(file.parent)
    for name in ("old.h5", "text.keras"):
        file.with_name(name).write_text("no model")
    before = {each.name: each.read_bytes() for each in file.parent.iterdir()}
    status, words = command(*arguments)
    assert status == 2
    assert says in words
    assert words.startswith("Error: ")
    assert {each.name: each.read_bytes() for each in file.parent.iterdir()} == before


def test_code_in_a_file_runs_only_if_told_to(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x * 2)])
    model.save(tmp_path / "code.keras")
    status, words = command("norms", tmp_path / "code.keras")
    assert (status, "--unsafe" in words) == (2, True)
    status, words = command("norms", tmp_path / "code.keras", "--unsafe")
    assert (status, "There is no norm" in words) == (0, True)
