"""Outputs and gradients that TensorFlow Addons 0.23 computed, repeated on every backend."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from frameworks import gradients

from normwise import layers

FOLDER = Path(__file__).parents[2] / "shared" / "tfa_golden"
TOLERANCE = 2e-5


def cases():
    if not FOLDER.is_dir():
        reason = "the values computed by TensorFlow Addons are not beside this checkout"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
    lines = (FOLDER / "cases.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    ours = [case for case in found if hasattr(layers, layer_name(case))]
    return [pytest.param(case, id=case["file"].removesuffix(".npz")) for case in ours]


def layer_name(case):
    return case["layer"].removeprefix("keras.")


def from_kwargs(case):
    return getattr(layers, layer_name(case))(**case["kwargs"])


def from_saved_config(case):
    return getattr(layers, layer_name(case)).from_config(case["saved_config"])


def from_registered_name(case):
    """As Keras reads it out of a saved model."""
    registered = f"Addons>{layer_name(case)}"
    if case["layer"].startswith("keras."):
        registered = f"normwise>{layer_name(case)}"
    saved = {
        "module": None,
        "class_name": layer_name(case),
        "config": case["saved_config"],
        "registered_name": registered,
    }
    return keras.layers.deserialize(saved)


@pytest.mark.filterwarnings("ignore:InstanceNormalization ignores groups:UserWarning")
@pytest.mark.parametrize("make", [from_kwargs, from_saved_config, from_registered_name])
@pytest.mark.parametrize("case", cases())
def test_output_and_gradients_are_those_of_tensorflow_addons(case, make):
    stored = np.load(FOLDER / case["file"])
    layer = make(case)
    assert type(layer) is getattr(layers, layer_name(case))
    layer.build(stored["x"].shape)
    assert [w.name for w in layer.weights] == case["weights"]
    count = len(case["weights"])

    def call(x, *weights):
        return layer.stateless_call(weights, [], x)[0]

    weights = [stored[f"w{i}"] for i in range(count)]
    y, (dx, *dw) = gradients(call, [stored["x"], *weights], stored["dy"])
    assert_close(y, stored["y"], "y")
    assert_close(dx, stored["dx"], "dx")
    for i, name in enumerate(case["weights"]):
        assert_close(dw[i], stored[f"dw{i}"], name)


def assert_close(found, golden, what):
    assert found.shape == golden.shape
    error = np.abs(found - golden).max() / np.abs(golden).max()
    assert error <= TOLERANCE, f"{what} is off by {error:.1e} of its largest value"
