"""What KerasHub, timm and the paper of RevIN compute, repeated by our ops and layers.

tools/definitions_golden.py made the arrays. Both sides are float32, and their orders of summation
differ by a few eps of the largest element: 2e-5 of it is more than a hundred and seventy eps.
"""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from frameworks import gradients

from normwise import layers, ops

FOLDER = Path(__file__).parent / "golden"
CASES = json.loads((FOLDER / "definitions.json").read_text())["cases"]
TOLERANCE = 2e-5


def gemma_rms_norm(x, scale, **options):
    return ops.rms_norm(x, scale, gamma_offset=1.0, **options)


def adaptive_layer_norm(x, embedding, kernel, bias, **options):
    modulation = keras.ops.matmul(keras.ops.silu(embedding), kernel) + bias
    shift, scale = keras.ops.split(modulation, 2, axis=1)
    return ops.layer_norm(x, scale, shift, gamma_offset=1.0, **options)


def global_response(x, weight, bias, **options):
    layer = layers.GlobalResponseNormalization(**options)
    layer.build(x.shape)
    return layer.stateless_call([weight, bias], [], x)[0]


def standardized(*tensors, **options):
    *weights, x = tensors
    conv = keras.layers.Conv2D(4, (3, 2), strides=2)
    layer = layers.WeightStandardization(conv, **options)
    layer.build(x.shape)
    return layer.stateless_call(weights, [], x)[0]


def reversible(x, weight, bias, factor, **options):
    norm = layers.ReversibleInstanceNormalization(**options)
    norm.build(x.shape)
    (y, statistics), _ = norm.stateless_call([weight, bias], [], x)
    forecast = y[:, -1:] * factor
    back, _ = norm.stateless_call([weight, bias], [], forecast, statistics=statistics)
    outputs = [keras.ops.reshape(each, (-1,)) for each in (y, *statistics, back)]
    return keras.ops.concatenate(outputs)


OURS = {
    "gemma_rms_norm": gemma_rms_norm,
    "adaptive_layer_norm": adaptive_layer_norm,
    "global_response_last": global_response,
    "global_response_first": global_response,
    "standardized": standardized,
    "scaled_standardized": standardized,
    "reversible": reversible,
}


@pytest.fixture(scope="module")
def arrays():
    return np.load(FOLDER / "definitions.npz")


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_the_definition(name, arrays):
    case = CASES[name]
    inputs = [arrays[f"{name}/{each}"] for each in case["inputs"]]

    def function(*tensors):
        return OURS[name](*tensors, **case["options"])

    y, found = gradients(function, inputs, arrays[f"{name}/cotangent"])
    assert_close(y, arrays[f"{name}/y"], "y")
    for each, gradient in zip(case["inputs"], found, strict=True):
        assert_close(gradient, arrays[f"{name}/d_{each}"], f"d_{each}")


def assert_close(found, golden, what):
    assert found.shape == golden.shape
    error = np.abs(found - 1.0 * golden).max() / np.abs(golden).max()
    assert error <= TOLERANCE, f"{what} is off by {error:.1e} of its largest value"
