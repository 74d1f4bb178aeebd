"""Keras's own tests of these layers, from the installed package, run on ours."""

import importlib
import unittest

import keras
import pytest

import normwise

FOLDER = "keras.src.layers.normalization"
SUITES = {"group": "GroupNormalization", "layer": "LayerNormalization", "rms": "RMSNormalization"}


def keras_tests():
    for stem, layer in SUITES.items():
        module = importlib.import_module(f"{FOLDER}.{stem}_normalization_test")
        case = getattr(module, f"{layer}Test")
        for name in unittest.defaultTestLoader.getTestCaseNames(case):
            yield pytest.param(case, name, id=f"{stem}-{name}")


@pytest.fixture
def our_layers(monkeypatch):
    """Keras's names for these layers mean ours, and its error wording is not ours."""
    from keras.src import layers, testing

    for name in SUITES.values():
        monkeypatch.setattr(layers, name, getattr(normwise.layers, name))
    monkeypatch.setattr(
        testing.TestCase, "assertRaisesRegex", lambda case, error, _: pytest.raises(error)
    )


# Keras's tests and trainers warn of their own.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("our_layers")
@pytest.mark.parametrize(("case", "name"), list(keras_tests()))
def test_keras_own_test_passes(case, name):
    result = unittest.TestResult()
    case(name).run(result)
    for _, report in result.failures + result.errors:
        pytest.fail(report, pytrace=False)
    assert result.testsRun == 1
    assert not result.skipped


@pytest.mark.usefixtures("our_layers")
def test_the_replacement_reaches_kerass_tests():
    module = importlib.import_module(f"{FOLDER}.group_normalization_test")
    assert module.layers.GroupNormalization is normwise.layers.GroupNormalization
    assert module.layers.GroupNormalization is not keras.layers.GroupNormalization
