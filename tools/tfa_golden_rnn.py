"""Make tests/golden/rnn.json and rnn.npz: what TensorFlow Addons computes for its recurrent cells.

It needs an environment of its own, with Keras 2 (tensorflow-cpu==2.14.1,
tensorflow-addons==0.23.0, numpy<2):

    python tools/tfa_golden_rnn.py
"""

import json
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_addons as tfa

FOLDER = Path(__file__).parents[1] / "tests" / "golden"
FEATURES = 3

# Steps that are masked: none, the last, and one in between.
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 1]], bool)

# A name, the cell, its arguments, those of the RNN layer.
CASES = [
    ("lstm", "LayerNormLSTMCell", {"units": 5}, {}),
    (
        "lstm_options",
        "LayerNormLSTMCell",
        {
            "units": 4,
            "activation": "softsign",
            "recurrent_activation": "tanh",
            "use_bias": False,
            "kernel_regularizer": tf.keras.regularizers.L2(0.1),
            "recurrent_constraint": tf.keras.constraints.MaxNorm(0.9, axis=0),
            "norm_epsilon": 0.01,
        },
        {"go_backwards": True},
    ),
    ("simple", "LayerNormSimpleRNNCell", {"units": 5}, {}),
    (
        "simple_options",
        "LayerNormSimpleRNNCell",
        {
            "units": 4,
            "activation": "softsign",
            "use_bias": False,
            "gamma_regularizer": tf.keras.regularizers.L2(0.1),
            "gamma_constraint": tf.keras.constraints.MaxNorm(0.9, axis=0),
            "layernorm_epsilon": 0.01,
        },
        {"go_backwards": True},
    ),
]


def run(name, cell_name, cell_options, rnn_options, rng):
    """One case: its description, and its arrays by name."""

    def make(**options):
        cell = getattr(tfa.rnn, cell_name)(**cell_options)
        return tf.keras.layers.RNN(cell, **rnn_options, **options)

    layer = make(return_sequences=True, return_state=True)
    x = rng.normal(size=(*MASK.shape, FEATURES)).astype("float32")
    layer.build(x.shape)
    weights = [rng.uniform(0.5, 1.5, w.shape) * signs(w, rng) for w in layer.weights]
    weights = [w.astype("float32") for w in weights]
    layer.set_weights(weights)

    with tf.GradientTape() as tape:
        inputs = tf.constant(x)
        tape.watch(inputs)
        y, *states = layer(inputs, mask=tf.constant(MASK))
        parts = [tf.reshape(part, [-1]) for part in (y, *states)]
        outputs = tf.concat(parts, 0)
        cotangent = rng.normal(size=outputs.shape).astype("float32")
        total = tf.reduce_sum(outputs * cotangent)
    dx, *dw = tape.gradient(total, [inputs, *layer.weights])

    trained = make()
    masked = np.where(MASK[..., None], x, 0)
    model = tf.keras.Sequential([tf.keras.Input(x.shape[1:]), tf.keras.layers.Masking(), trained])
    model.compile(tf.keras.optimizers.SGD(0.1), "mse")
    trained.set_weights(weights)
    target = rng.normal(size=(len(x), layer.cell.units)).astype("float32")
    for _ in range(3):
        model.train_on_batch(masked, target)

    arrays = {"x": x, "outputs": outputs, "cotangent": cotangent, "dx": dx, "target": target}
    for i, weight in enumerate(weights):
        arrays |= {f"w{i}": weight, f"dw{i}": dw[i], f"trained{i}": trained.get_weights()[i]}
    described = {
        "name": name,
        "cell": cell_name,
        "config": layer.cell.get_config(),
        "rnn": rnn_options,
        "weights": [w.name for w in layer.weights],
    }
    return described, {f"{name}/{key}": np.asarray(value) for key, value in arrays.items()}


def signs(weight, rng):
    """Gammas stay positive; all else has either sign."""
    if "gamma" in weight.name:
        return 1.0
    return rng.choice([-1.0, 1.0], weight.shape)


def main():
    """Write both files."""
    rng = np.random.default_rng(0)
    found = [run(*case, rng) for case in CASES]
    FOLDER.mkdir(exist_ok=True)
    arrays = {key: value for _, stored in found for key, value in stored.items()}
    np.savez_compressed(FOLDER / "rnn.npz", mask=MASK, **arrays)
    text = json.dumps([described for described, _ in found], indent=1, default=list)
    (FOLDER / "rnn.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
