"""Accelerate whole models: that they predict and train the same, and what a step then takes.

    KERAS_BACKEND=jax python benchmarks/whole_models.py [--seconds S] [--json FILE]

First, for each family of keras.applications, with random weights and small images: `accelerate`,
which compares the predictions itself, and a step of training of both models, whose losses and
weights must agree. Then ConvNeXtTiny on 8 images of 224 x 224: steps of `train_on_batch` of both
models, in random order, and their medians.
"""

import argparse
import functools
import pathlib

import keras
import measuring
import numpy as np
from rich.table import Table

from normwise.models import accelerate

BACKEND = keras.backend.backend()
SIDES = {"ResNet50V2": 32, "EfficientNetV2B0": 32, "ConvNeXtTiny": 32, "MobileNetV3Small": 32}
# Of the largest value of a weight: what rounding may make of a step's gradient.
TOLERANCE = 1e-4
BATCH, SIDE = 8, 224


def build(name, side):
    """A model of keras.applications with random weights, for ten classes."""
    keras.utils.set_random_seed(0)
    return getattr(keras.applications, name)(
        weights=None, input_shape=(side, side, 3), classes=10, classifier_activation="softmax"
    )


def compiled(model):
    """The model, compiled with plain SGD: what a step changes is its gradient, to a factor."""
    model.compile(keras.optimizers.SGD(0.01), "sparse_categorical_crossentropy")
    return model


def data(count, side):
    """Random images and labels."""
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (count, side, side, 3)).astype("float32")
    return images, rng.integers(0, 10, count)


def check(name):
    """The largest difference of a weight after a step, by its size, and how many norms changed."""
    model = compiled(build(name, SIDES[name]))
    faster, report = accelerate(model)
    images, labels = data(4, SIDES[name])
    losses = []
    for each in (faster, model):
        keras.utils.set_random_seed(1)  # PyTorch drops out by its own global generator
        losses.append(float(each.train_on_batch(images, labels)))
    difference = max(
        float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3))
        for a, b in zip(faster.get_weights(), model.get_weights(), strict=True)
        if a.size
    )
    alike = abs(losses[0] - losses[1]) <= TOLERANCE * abs(losses[1]) and difference <= TOLERANCE
    return len(report.changed), len(report), difference, alike


def main():
    """Check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of timing")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    table = Table("model", "norms changed", "largest difference after a step", title=BACKEND)
    rows = {}
    for name in SIDES:
        changed, norms, difference, alike = check(name)
        rows[name] = {"changed": changed, "norms": norms, "difference": difference, "alike": alike}
        words = f"{difference:.1e}" + ("" if alike else ": NOT ALIKE")
        table.add_row(name, f"{changed} of {norms}", words)
    console = measuring.console(100)
    console.print(table)
    if not all(row["alike"] for row in rows.values()):
        raise SystemExit("a model trains otherwise: nothing was timed")
    model = compiled(build("ConvNeXtTiny", SIDE))
    images, labels = data(BATCH, SIDE)
    steps = {
        name: functools.partial(each.train_on_batch, images, labels)
        for name, each in (("Keras", model), ("normwise", accelerate(model)[0]))
    }
    times_ms = measuring.medians_ms(steps, arguments.seconds)
    ratio = times_ms["Keras"] / times_ms["normwise"]
    console.print(
        f"ConvNeXtTiny, {BATCH} images of {SIDE} x {SIDE}, ms a step: "
        f"Keras {times_ms['Keras']:.0f}, normwise {times_ms['normwise']:.0f}, ratio {ratio:.2f}"
    )
    report = {"versions": measuring.versions(), "models": rows, "step_ms": times_ms}
    measuring.write(report, arguments.json)


if __name__ == "__main__":
    main()
