"""The recurrent cells in float64 NumPy, and how tests make layers of them."""

import keras
import numpy as np
import pytest

from normwise.rnn import LayerNormLSTMCell, LayerNormSimpleRNNCell

CELLS = [LayerNormLSTMCell, LayerNormSimpleRNNCell]
every_cell = pytest.mark.parametrize("cell_type", CELLS, ids=["lstm", "simple"])

UNITS, FEATURES = 4, 3
RATES = {"dropout": 0.4, "recurrent_dropout": 0.4}
# Nothing masked, the last steps, the first, one in between.
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 0, 1, 1, 1]], bool)


def normalized(x, epsilon):
    deviation = x - x.mean(-1, keepdims=True)
    return deviation / np.sqrt((deviation**2).mean(-1, keepdims=True) + epsilon)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softsign(x):
    return x / (1 + np.abs(x))


def lstm_step(x, states, weights, activation, epsilon=1e-3):
    h, c = states
    kernel, recurrent_kernel, bias, *norms = weights
    gamma_x, beta_x, gamma_h, beta_h, gamma_c, beta_c = norms
    z = gamma_x * normalized(x @ kernel, epsilon) + beta_x + bias
    z = z + gamma_h * normalized(h @ recurrent_kernel, epsilon) + beta_h
    i, f, candidate, o = np.split(z, 4, axis=1)
    carry = sigmoid(f) * c + sigmoid(i) * activation(candidate)
    c = gamma_c * normalized(carry, epsilon) + beta_c
    h = sigmoid(o) * activation(c)
    return h, [h, c]


def simple_step(x, states, weights, activation, epsilon=1e-5):
    kernel, recurrent_kernel, bias, gamma = weights
    z = normalized(x @ kernel + states[0] @ recurrent_kernel, epsilon)
    h = activation(gamma * z + bias)
    return h, [h]


STEPS = {LayerNormLSTMCell: (lstm_step, 2), LayerNormSimpleRNNCell: (simple_step, 1)}


def reference(cell_type, x, weights, mask=None, drops=(1.0, 1.0), activation=np.tanh):
    """The sequence of outputs and the last states, as one vector; a masked step repeats the last.

    `drops` are the dropout masks of the inputs and of h.
    """
    step, number_of_states = STEPS[cell_type]
    x, *weights = (np.asarray(a, np.float64) for a in (x, *weights))
    mask = np.ones(x.shape[:2], bool) if mask is None else mask
    y = np.zeros((len(x), weights[1].shape[0]))
    states, outputs = [y] * number_of_states, []
    for t in range(x.shape[1]):
        keep = mask[:, t, None]
        dropped = [states[0] * drops[1], *states[1:]]
        new, new_states = step(x[:, t] * drops[0], dropped, weights, activation)
        y = np.where(keep, new, y)
        states = [np.where(keep, a, b) for a, b in zip(new_states, states, strict=True)]
        outputs.append(y)
    return np.concatenate([np.stack(outputs, 1).ravel(), *(s.ravel() for s in states)])


def slopes(function, arrays, step=1e-5):
    """The gradients of a scalar function of float64 arrays, by central differences."""
    arrays, found = [np.array(a, np.float64) for a in arrays], []
    for array in arrays:
        gradient = np.empty_like(array)
        for index in np.ndindex(array.shape):
            here = array[index]
            ends = []
            for array[index] in (here + step, here - step):
                ends.append(function(*arrays))
            array[index] = here
            gradient[index] = (ends[0] - ends[1]) / (2 * step)
        found.append(gradient)
    return found


def sequences(batch=4, steps=5, features=FEATURES, seed=0, dtype="float32"):
    return np.random.default_rng(seed).normal(size=(batch, steps, features)).astype(dtype)


def recurrent(cell_type, cell=None, **options):
    """A built layer around the cell, with weights that no initializer gives."""
    dtype = options.get("dtype")
    layer = keras.layers.RNN(cell_type(UNITS, dtype=dtype, **(cell or {})), **options)
    layer.build((None if not layer.stateful else len(MASK), MASK.shape[1], FEATURES))
    return randomize(layer)


def randomize(layer, seed=1):
    rng = np.random.default_rng(seed)
    layer.set_weights([rng.uniform(0.5, 1.5, w.shape) * signs(w, rng) for w in layer.weights])
    return layer


def signs(weight, rng):
    return 1.0 if weight.name == "gamma" else rng.choice([-1.0, 1.0], weight.shape)


def flat(outputs):
    parts = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return keras.ops.concatenate([keras.ops.reshape(part, (-1,)) for part in parts])
