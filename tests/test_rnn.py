"""The recurrent cells' numbers, beside float64 and TensorFlow Addons; masks, states and dropout."""

import copy
import json
from pathlib import Path

import keras
import numpy as np
import pytest
from frameworks import BACKEND, assert_within, float64_enabled, gradients, to_numpy
from recurrent import (
    FEATURES,
    MASK,
    RATES,
    UNITS,
    every_cell,
    flat,
    recurrent,
    reference,
    sequences,
    slopes,
    softsign,
)

import normwise
from normwise.rnn import LayerNormLSTMCell, LayerNormSimpleRNNCell

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "rnn.json").read_text())
every_case = pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])


def pure(layer, mask=None):
    """The layer as a function of its input and weights."""

    def call(x, *weights):
        state = [v.value for v in layer.non_trainable_variables]
        keep = None if mask is None else keras.ops.convert_to_tensor(mask)
        return flat(layer.stateless_call(list(weights), state, x, mask=keep)[0])

    return call


# Numbers.


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@every_cell
def test_float64_outputs_and_gradients(cell_type, masked):
    # On JAX, keras.ops.tanh rounds float64 to float32.
    mask, options = MASK if masked else None, {"activation": softsign}
    with float64_enabled():
        layer = recurrent(
            cell_type,
            {"activation": "softsign"},
            return_sequences=True,
            return_state=True,
            dtype="float64",
        )
        arrays = [sequences(dtype="float64"), *layer.get_weights()]
        right = reference(cell_type, arrays[0], arrays[1:], mask, **options)
        cotangent = np.random.default_rng(2).normal(size=right.shape)
        y, found = gradients(pure(layer, mask), arrays, cotangent)
    # 2^-52 times the roundings of five steps, of which each may double what came before it.
    assert_within(y, right, 1e-12, "outputs and states")

    def total(x, *weights):
        return (reference(cell_type, x, weights, mask, **options) * cotangent).sum()

    # Central differences are off by step^2 * the third derivative, and 2^-52 / step: 1e-10, 2e-11.
    wanted = slopes(total, arrays)
    for name, a, b in zip(["x", *(w.path for w in layer.weights)], found, wanted, strict=True):
        assert_within(a, b, 1e-7 * np.abs(b).max(), name)


@pytest.mark.parametrize("mode", ["auto", "composite"])
@every_cell
def test_float32_outputs(cell_type, mode):
    layer = recurrent(cell_type, return_sequences=True, return_state=True)
    with normwise.use_kernels(mode):
        y = to_numpy(flat(layer(sequences(), mask=MASK)))
    assert_within(y, reference(cell_type, sequences(), layer.get_weights(), MASK), 1e-5)


def old_cell(case):
    """The cell of a golden case, as Keras makes it from what TensorFlow Addons saved."""
    saved = {
        "module": "tensorflow_addons.rnn",
        "class_name": case["cell"],
        "config": copy.deepcopy(case["config"]),
        "registered_name": f"Addons>{case['cell']}",
    }
    return keras.saving.deserialize_keras_object(saved)


def stored(case):
    """The arrays of a golden case by name, and the weights in order."""
    with np.load(GOLDEN / "rnn.npz") as file:
        prefix = case["name"] + "/"
        arrays = {k.removeprefix(prefix): file[k] for k in file if k.startswith(prefix)}
        arrays["mask"] = file["mask"]
    return arrays, [arrays[f"w{i}"] for i in range(len(case["weights"]))]


def assert_close(found, golden, what):
    """Six steps of three norms, of about ten float32 roundings on either side: 360 * 6e-8."""
    error = np.abs(np.asarray(found) - golden).max() / np.abs(golden).max()
    assert error <= 2e-5, f"{what} is off by {error:.1e} of its largest value"


@every_case
def test_outputs_states_and_gradients_are_those_of_tensorflow_addons(case):
    arrays, weights = stored(case)
    cell = old_cell(case)
    layer = keras.layers.RNN(cell, return_sequences=True, return_state=True, **case["rnn"])
    layer.build(arrays["x"].shape)
    assert_same_weights(layer, case, weights)
    call = pure(layer, arrays["mask"])
    y, (dx, *dw) = gradients(call, [arrays["x"], *weights], arrays["cotangent"])
    assert_close(y, arrays["outputs"], "the outputs and states")
    assert_close(dx, arrays["dx"], "dx")
    for i, name in enumerate(case["weights"]):
        assert_close(dw[i], arrays[f"dw{i}"], name)


def assert_same_weights(layer, case, weights):
    names = [name.split("/")[-1].removesuffix(":0") for name in case["weights"]]
    assert [w.name for w in layer.weights] == names
    assert [tuple(w.shape) for w in layer.weights] == [w.shape for w in weights]


@every_case
def test_three_steps_of_training_are_those_of_tensorflow_addons(case):
    arrays, weights = stored(case)
    layer = keras.layers.RNN(old_cell(case), **case["rnn"])
    x = np.where(arrays["mask"][..., None], arrays["x"], 0)
    model = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Masking(), layer])
    layer.set_weights(weights)
    # On JAX a step that is not compiled takes longer than compiling it.
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=BACKEND == "jax")
    for _ in range(3):
        model.train_on_batch(x, arrays["target"])
    for i, weight in enumerate(layer.get_weights()):
        assert_close(weight, arrays[f"trained{i}"], case["weights"][i])


# Masks, states and the options of keras.layers.RNN.


@every_cell
def test_a_masked_end_is_a_shorter_sequence(cell_type):
    layer = recurrent(cell_type, return_state=True)
    x, mask = sequences(), np.zeros(MASK.shape, bool)
    mask[:, :3] = True
    x[:, 3:] = np.nan
    short = flat(layer(x[:, :3]))
    assert_within(to_numpy(flat(layer(x, mask=mask))), to_numpy(short), 1e-6)


@every_cell
def test_unrolled_steps_are_those_of_the_loop(cell_type):
    options = {"return_sequences": True, "return_state": True}
    loop, unrolled = (recurrent(cell_type, unroll=u, **options) for u in (False, True))
    y = to_numpy(flat(loop(sequences(), mask=MASK)))
    assert_within(to_numpy(flat(unrolled(sequences(), mask=MASK))), y, 1e-6)


@every_cell
def test_backwards_is_the_reversed_sequence(cell_type):
    forwards, backwards = (recurrent(cell_type, go_backwards=b) for b in (False, True))
    reverse = np.ascontiguousarray(sequences()[:, ::-1])
    assert_within(to_numpy(backwards(sequences())), to_numpy(forwards(reverse)), 1e-6)


@every_cell
def test_a_stateful_layer_goes_on_where_it_was(cell_type):
    whole = recurrent(cell_type, return_sequences=True)
    layer = recurrent(cell_type, return_sequences=True, stateful=True)
    x = sequences()
    y = to_numpy(whole(x))
    for _ in range(2):
        parts = [to_numpy(layer(part)) for part in (x[:, :2], x[:, 2:])]
        assert_within(np.concatenate(parts, axis=1), y, 1e-6)
        layer.reset_state()


@every_cell
def test_initial_state(cell_type):
    layer = recurrent(cell_type, return_state=True)
    _, *states = layer(sequences()[:, :2])
    rest = flat(layer(sequences()[:, 2:], initial_state=states))
    assert_within(to_numpy(rest), to_numpy(flat(layer(sequences()))), 1e-6)


def test_stacked_cells_are_layers_one_after_the_other():
    first = recurrent(LayerNormLSTMCell, return_sequences=True)
    second = keras.layers.RNN(LayerNormSimpleRNNCell(3))
    y = to_numpy(second(first(sequences())))
    stacked = keras.layers.RNN([LayerNormLSTMCell(UNITS), LayerNormSimpleRNNCell(3)])
    stacked.build((None, MASK.shape[1], FEATURES))
    stacked.set_weights(first.get_weights() + second.get_weights())
    assert_within(to_numpy(stacked(sequences())), y, 1e-6)


@every_cell
def test_both_directions(cell_type):
    layer = keras.layers.Bidirectional(recurrent(cell_type, return_sequences=True))
    y = to_numpy(layer(sequences()))
    there, back = (
        to_numpy(one(sequences())) for one in (layer.forward_layer, layer.backward_layer)
    )
    assert_within(y, np.concatenate([there, back[:, ::-1]], axis=-1), 1e-6)
    again = keras.layers.Bidirectional.from_config(layer.get_config())
    assert type(again.backward_layer.cell) is cell_type


@every_cell
def test_unknown_batch_and_length(cell_type):
    layer = recurrent(cell_type)
    inputs = keras.Input((None, FEATURES))
    model = keras.Model(inputs, layer(inputs))
    assert model.output_shape == (None, UNITS)
    for batch, steps in [(2, 3), (4, 5)]:
        x = sequences(batch, steps)
        wanted = reference(cell_type, x, layer.get_weights())
        last = wanted[: batch * steps * UNITS].reshape(batch, steps, UNITS)[:, -1]
        assert_within(to_numpy(model(x)), last, 1e-5)


# Dropout.


@every_cell
def test_one_mask_drops_inputs_and_one_drops_h_in_every_step(cell_type):
    options = {"return_sequences": True, "return_state": True}
    layer, twin = (recurrent(cell_type, {**RATES, "seed": 3}, **options) for _ in range(2))
    x = sequences(batch=20)
    h = np.zeros((len(x), UNITS), "float32")
    # In the order in which the layer draws them.
    drops = [twin.cell.get_dropout_mask(x[:, 0]), twin.cell.get_recurrent_dropout_mask(h)]
    drops = [to_numpy(drop) for drop in drops]
    for drop in drops:
        assert set(np.unique(drop).round(5)) == {0, np.float32(1 / 0.6).round(5)}
    right = reference(cell_type, x, layer.get_weights(), drops=drops)
    assert_within(to_numpy(flat(layer(x, training=True))), right, 1e-5)


@every_cell
def test_dropout_follows_the_seed_and_changes_with_every_call(cell_type):
    layers = [recurrent(cell_type, {**RATES, "seed": seed}) for seed in (3, 3, 4)]
    first, same, other = (to_numpy(layer(sequences(), training=True)) for layer in layers)
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, other)
    assert not np.allclose(first, to_numpy(layers[0](sequences(), training=True)))
    plain = to_numpy(recurrent(cell_type)(sequences()))
    np.testing.assert_array_equal(to_numpy(layers[0](sequences(), training=False)), plain)
    np.testing.assert_array_equal(to_numpy(layers[0](sequences())), plain)


@every_cell
def test_a_cell_of_another_policy_than_its_layer_drops_in_its_own(cell_type):
    cell = cell_type(UNITS, **RATES, dtype="mixed_float16")
    y = keras.layers.RNN(cell)(sequences(), training=True)
    assert keras.backend.standardize_dtype(y.dtype) == "float32"
    assert np.isfinite(to_numpy(y)).all()
