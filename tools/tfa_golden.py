"""Make tests/golden/wrappers.json and wrappers.npz: what TensorFlow Addons' wrappers compute.

It needs an environment of its own, with Keras 2 (tensorflow-cpu==2.14.1,
tensorflow-addons==0.23.0, numpy<2):

    python tools/tfa_golden.py

Of each case: the weights before, the inputs, outputs and targets of three steps of gradient descent
that start from them, with the gradients of half the squared error, the weights after, and what the
trained layer then predicts of the first input.
"""

import json
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_addons as tfa

FOLDER = Path(__file__).parents[1] / "tests" / "golden"
STEPS = 3
LEARNING_RATE = 0.01

layers = tf.keras.layers

# A name, how to make the layer, the input's shape; integers below 7 for an embedding.
WRAPPED = {
    "dense": (lambda: layers.Dense(4, activation="tanh"), (5, 3)),
    "conv2d": (lambda: layers.Conv2D(4, 3, strides=2, activation="relu"), (2, 7, 6, 3)),
    "conv2d_transpose": (lambda: layers.Conv2DTranspose(3, 2, strides=2), (2, 3, 4, 3)),
    "lstm": (lambda: layers.RNN(layers.LSTMCell(3), return_sequences=True), (3, 4, 2)),
    "embedding": (lambda: layers.Embedding(7, 4), (3, 5)),
}
CASES = [
    *(
        (f"weight_{name}{'_data' if data_init else ''}", "WeightNormalization", name, options)
        for name in ("dense", "conv2d", "conv2d_transpose", "lstm")
        for data_init in (False, True)
        for options in ({"data_init": data_init},)
    ),
    *(
        (f"spectral_{name}", "SpectralNormalization", name, options)
        for name, options in (
            ("dense", {"power_iterations": 3}),
            ("conv2d", {}),
            ("conv2d_transpose", {}),
            ("embedding", {}),
        )
    ),
]


def run(wrapper, wrapped, options, rng):
    """One case: its description, and its arrays by name."""
    make, shape = WRAPPED[wrapped]
    layer = getattr(tfa.layers, wrapper)(make(), **options)
    whole = wrapped == "embedding"
    x = rng.integers(0, 7, (STEPS, *shape)) if whole else rng.normal(0.5, 1.5, (STEPS, *shape))
    x = x.astype("int32" if whole else "float32")
    layer.build(shape)
    variables = {short(w): w for w in layer.trainable_weights + layer.non_trainable_weights}
    for name, weight in variables.items():
        if name in ("bias", "kernel", "recurrent_kernel"):
            weight.assign(rng.normal(0, 0.7, weight.shape))
    if options.get("data_init"):
        layer._naked_clone_layer.set_weights(layer.layer.get_weights())
    kept = {name: weight for name, weight in variables.items() if "data_dep_init" not in name}
    arrays = {f"before/{name}": weight.numpy() for name, weight in kept.items()}
    trained = list(variables)[: len(layer.trainable_weights)]
    sources = [variables[name] for name in trained]
    steps = {"x": x}
    for step in range(STEPS):
        inputs = tf.constant(x[step])
        with tf.GradientTape() as tape:
            if not whole:
                tape.watch(inputs)
            y = layer(inputs, **({"training": True} if wrapper.startswith("Spectral") else {}))
            target = tf.constant(rng.normal(size=y.shape).astype("float32"))
            loss = tf.reduce_sum(tf.square(y - target)) / 2
        found = tape.gradient(loss, sources + ([] if whole else [inputs]))
        found = [tf.convert_to_tensor(gradient).numpy() for gradient in found]
        computed = {"target": target.numpy(), "y": y.numpy()}
        computed |= {f"d_{name}": g for name, g in zip([*trained, "x"], found, strict=False)}
        for name, value in computed.items():
            steps.setdefault(name, []).append(value)
        for weight, gradient in zip(sources, found, strict=False):
            weight.assign_sub(LEARNING_RATE * gradient)
    arrays |= {name: np.stack(values) for name, values in steps.items()}
    arrays |= {f"after/{name}": weight.numpy() for name, weight in kept.items()}
    arrays["prediction"] = layer(tf.constant(x[0])).numpy()
    description = {
        "wrapper": wrapper,
        "config": layer.get_config(),
        "learning_rate": LEARNING_RATE,
        "trained": trained,
        "state": list(variables)[len(trained) :],
    }
    return description, arrays


def short(weight):
    """The last part of a weight's name, with `data_dep_init/` before it where it has that."""
    *parts, name = weight.name.removesuffix(":0").split("/")
    return f"data_dep_init/{name}" if "data_dep_init" in parts else name


def main():
    """Run every case from its own seed, and write the two files."""
    descriptions, arrays = {}, {}
    for seed, (name, wrapper, wrapped, options) in enumerate(CASES):
        tf.keras.utils.set_random_seed(seed)
        rng = np.random.default_rng(seed)
        descriptions[name], found = run(wrapper, wrapped, options, rng)
        arrays |= {f"{name}/{key}": value for key, value in found.items()}
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "wrappers.json").write_text(json.dumps(descriptions, indent=1) + "\n")
    np.savez_compressed(FOLDER / "wrappers.npz", **arrays)


if __name__ == "__main__":
    main()
