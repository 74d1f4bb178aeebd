"""Time normwise's layers against Keras's own, on the Keras backend in use.

    KERAS_BACKEND=jax python benchmarks/against_keras.py [--json FILE]

Each case is first checked against the float64 reference, output and gradients, and only then timed:
both layers in one process, in random order, again and again, so that what else the machine does
falls on both alike. Ratios are of medians, Keras's time over normwise's: more than 1 is faster.
"""

import argparse
import json
import pathlib
import platform
import random
import statistics
import subprocess
import sys
import time

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

import normwise

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import frameworks  # noqa: E402
import reference  # noqa: E402

TUTORIAL = (32, 26, 26, 10)
UNET = (8, 64, 64, 256)

CASES = [
    ("group", TUTORIAL, {"groups": 5}),
    ("instance", TUTORIAL, {}),
    ("layer", TUTORIAL, {}),
    ("rms", TUTORIAL, {}),
    ("group", UNET, {"groups": 32}),
    ("instance", UNET, {}),
    ("layer", UNET, {}),
    ("rms", UNET, {}),
]


def layers(norm, options):
    """The layer of this norm as Keras has it, and as normwise does."""
    if norm == "instance":
        # Keras's way to an instance norm.
        return keras.layers.GroupNormalization(groups=-1), normwise.layers.InstanceNormalization()
    name = {"group": "Group", "layer": "Layer", "rms": "RMS"}[norm] + "Normalization"
    return getattr(keras.layers, name)(**options), getattr(normwise.layers, name)(**options)


def check(layer, norm, shape, options, units):
    """Hold the layer against the reference, its error at most `units` roundings."""
    rng = np.random.default_rng(0)
    shape = (2, *shape[1:])
    x, dy = (rng.normal(size=shape).astype("float32") for _ in range(2))
    if norm in ("group", "instance"):
        labels = reference.group_labels(shape, -1, options.get("groups", shape[-1]))
    else:
        labels = reference.layer_labels(shape, (-1,))
    ones, zeros = np.ones(shape[-1]), np.zeros(shape[-1])
    expected = reference.Norm(
        x, ones, zeros, labels, (-1,), epsilon=layer.epsilon, centred=norm != "rms"
    )
    y, (dx,) = frameworks.gradients(lambda x: layer(x), [x], dy)
    eps = 2.0**-24
    frameworks.assert_within(y, expected.y, expected.y_tolerance(eps, units), f"{norm} y")
    tolerance, _, _ = expected.gradient_tolerances(dy, eps, 2 * units)
    frameworks.assert_within(dx, expected.gradients(dy)[0], tolerance, f"{norm} dx")


def steps(layer, x, dy):
    """Two functions without arguments: forward, and forward with backward to x and the weights."""
    weights = [w.value for w in layer.trainable_variables]
    if frameworks.BACKEND == "jax":
        import jax

        def apply(weights, x):
            return layer.stateless_call(weights, [], x)[0]

        def train(weights, x, dy):
            y, pull = jax.vjp(apply, weights, x)
            return y, pull(dy)

        forward, train = jax.jit(apply), jax.jit(train)
        return (
            lambda: jax.block_until_ready(forward(weights, x)),
            lambda: jax.block_until_ready(train(weights, x, dy)),
        )
    if frameworks.BACKEND == "tensorflow":
        import tensorflow as tf

        forward = tf.function(lambda x: layer(x), autograph=False)

        @tf.function(autograph=False)
        def train(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x)
            return y, tape.gradient(y, [x, *weights], output_gradients=dy)

        return lambda: forward(x), lambda: train(x)

    import torch

    def forward():
        with torch.no_grad():
            return layer(x)

    def train():
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        return torch.autograd.grad(y, [leaf, *weights], dy)

    return forward, train


def medians(functions, seconds):
    """The median time of each function in ms, all run in random order within a time budget."""
    elapsed_ms = [[] for _ in functions]
    for function in functions:
        function()
        function()
    order = list(range(len(functions)))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(elapsed_ms[0]) < 5:
        random.shuffle(order)
        for index in order:
            start = time.perf_counter()
            functions[index]()
            elapsed_ms[index].append((time.perf_counter() - start) * 1e3)
    return [statistics.median(times) for times in elapsed_ms]


def measure(norm, shape, options, seconds):
    """One row of the result for each of forward and training."""
    rng = np.random.default_rng(0)
    x, dy = (keras.ops.convert_to_tensor(rng.normal(size=shape).astype("float32")) for _ in "xy")
    pair = layers(norm, options)
    # Keras's own sums lose more digits than ours may: 17 roundings at 4,096 positions.
    for layer, units in zip(pair, (256, 16), strict=True):
        layer(x)
        check(layer, norm, shape, options, units)
    (keras_forward, keras_train), (forward, train) = (steps(layer, x, dy) for layer in pair)
    for what, functions in (
        ("forward", (keras_forward, forward)),
        ("training", (keras_train, train)),
    ):
        keras_ms, normwise_ms = medians(functions, seconds)
        yield {
            "norm": norm,
            "shape": shape,
            "what": what,
            "keras_ms": keras_ms,
            "normwise_ms": normwise_ms,
            "ratio": keras_ms / normwise_ms,
        }


def main():
    """Run every case, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    parser.add_argument("--seconds", type=float, default=4.0, help="time budget of a row")
    arguments = parser.parse_args()

    table = Table(title=f"normwise against Keras {keras.__version__} on {frameworks.BACKEND}")
    for column in ("norm", "shape", "", "Keras ms", "normwise ms", "ratio"):
        table.add_column(column, justify="right" if column not in ("norm", "") else "left")
    rows = []
    for norm, shape, options in CASES:
        for row in measure(norm, shape, options, arguments.seconds):
            rows.append(row)
            times = f"{row['keras_ms']:.2f}", f"{row['normwise_ms']:.2f}", f"{row['ratio']:.2f}"
            table.add_row(norm, str(shape), row["what"], *times)
    Console().print(table)
    if arguments.json:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        versions = {
            "python": platform.python_version(),
            "keras": keras.__version__,
            "backend": frameworks.BACKEND,
            "numpy": np.__version__,
            "normwise": normwise.__version__,
            "commit": commit.stdout.strip(),
        }
        arguments.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
