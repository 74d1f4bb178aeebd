"""What TensorFlow Addons' wrappers computed in three steps of training, repeated on every backend.

`tools/tfa_golden.py` made the arrays. In float32 two orders of summation differ by a few eps of the
largest element, which the steps carry on and the data's 1 / deviation multiplies: 2e-5 of it, as
for the other layers, is a hundred and seventy eps.
"""

import copy
import json
from pathlib import Path

import keras
import numpy as np
import pytest
from frameworks import gradients, to_numpy

from normwise import layers

FOLDER = Path(__file__).parent / "golden"
CASES = json.loads((FOLDER / "wrappers.json").read_text())
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def arrays():
    return np.load(FOLDER / "wrappers.npz")


@pytest.mark.parametrize("name", CASES)
def test_three_steps_are_those_of_tensorflow_addons(name, arrays):
    case = CASES[name]
    stored = {
        key.removeprefix(f"{name}/"): arrays[key] for key in arrays if key.startswith(f"{name}/")
    }
    layer = build(case, stored)
    x, target = stored["x"], stored["target"]
    weights = [to_numpy(w) for w in layer.trainable_weights]
    state = [to_numpy(w) for w in layer.non_trainable_variables]
    inputs = [x[0]] if x.dtype == "float32" else []

    def call(*tensors):
        weights, given = tensors[: len(case["trained"])], tensors[len(case["trained"]) :]
        return layer.stateless_call(weights, state, *(given or x[:1]), training=True)[0]

    y, found = gradients(call, [*weights, *inputs], stored["y"][0] - target[0])
    assert_close(y, stored["y"][0], "y")
    for short, gradient in zip([*case["trained"], "x"], found, strict=False):
        assert_close(gradient, stored[f"d_{short}"][0], f"d_{short}")

    model = keras.Sequential([keras.Input(x.shape[2:], dtype=x.dtype), layer])
    model.compile(keras.optimizers.SGD(case["learning_rate"]), half_square)
    for step in range(len(x)):
        model.train_on_batch(x[step], target[step])
    after = with_offsets(layer)
    for short in case["trained"] + case["state"][:1]:
        assert_close(after[short], stored[f"after/{short}"], f"{short} after")
    assert_close(model.predict_on_batch(x[0]), stored["prediction"], "prediction")


def half_square(target, y):
    """A loss whose gradient needs y, and so the values of the weights before they are updated.

    Of one that is linear in y TensorFlow 2.21 may calculate the gradient of v with the updated g:
    its dependency optimizer removes the edge from the read to the update as implied by the
    optimizer's IdentityN, and then IdentityN. Two Dense layers of Keras are no better off.
    """
    return keras.ops.sum(keras.ops.square(y - target)) / 2


def build(case, stored):
    """The layer of a case with the weights that it began with, in TensorFlow Addons' order."""
    config = copy.deepcopy(case["config"])
    for option in ("groups", "batch_input_shape", "time_major"):
        # Keras 2 has them in the configs of layers that refuse them in Keras 3.
        config["layer"]["config"].pop(option, None)
    layer = getattr(layers, case["wrapper"]).from_config(config)
    layer.build(stored["x"].shape[1:])
    names = case["trained"] + case["state"][:1]
    weights = (layer.trainable_weights + layer.non_trainable_weights)[: len(names)]
    assert [w.name for w in weights] == names
    for w in weights:
        value = stored[f"before/{w.name}"]
        assert w.shape == value.shape
        w.assign(value)
    if case["config"].get("data_init") is False:
        # There g becomes |v| in the first call; here it is so when it is built.
        v = stored[f"before/{case['trained'][1]}"]
        layer.g.assign(np.sqrt((v**2).sum(tuple(range(v.ndim - 1)))))
        layer.non_trainable_weights[0].assign(True)
    return layer


def with_offsets(layer):
    """The weights by name, each with its offset."""
    values = {w.name: to_numpy(w) for w in layer.weights}
    return {
        name: value + values[f"{name}_offset"] if f"{name}_offset" in values else value
        for name, value in values.items()
    }


def assert_close(found, golden, what):
    assert found.shape == golden.shape
    error = np.abs(found - 1.0 * golden).max() / np.abs(golden).max()
    assert error <= TOLERANCE, f"{what} is off by {error:.1e} of its largest value"
