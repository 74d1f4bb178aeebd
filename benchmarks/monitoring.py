"""Time a training with NormMonitor, once an epoch, and without: what it adds.

    KERAS_BACKEND=jax python benchmarks/monitoring.py [--json FILE] [--seconds S] [--case tutorial]

The cases are the tutorial's model on 28 x 28 images, and ResNet50V2, with its 49 batch norms, on
64 x 64. `fit` is timed with the monitor and without it, over one epoch, in random order again and
again, and so is a reading by itself: of a batch as large as a step's, with gradients. As a whole
epoch is too long to be repeated, those here are short; a reading costs the same at the end of a
long one. So the table has both: how much longer a short `fit` was, which noise blurs, and

    reading / (steps of a whole epoch * step)

The first reading of a training compiles; that is timed once and stated beside.
"""

import argparse
import functools
import pathlib
import time

import keras
import measuring
import numpy as np
from rich.table import Table

from normwise.models import NormMonitor
from normwise.tutorial import model as tutorial

BACKEND = keras.backend.backend()
LIMIT_PERCENT = 3.0


def tutorial_model():
    """The tutorial's model with group norm."""
    return tutorial.build("group", (28, 28)), (28, 28)


def resnet():
    """A larger network, of Keras's own."""
    shape = (64, 64, 3)
    model = keras.applications.ResNet50V2(weights=None, input_shape=shape, classes=10)
    model.compile("adam", "sparse_categorical_crossentropy")
    return model, shape


# By name: the model, the size of a batch, the steps that are timed, and those of an epoch of MNIST
# and of CIFAR-10.
CASES = {"tutorial": (tutorial_model, 32, 200, 1875), "ResNet50V2": (resnet, 8, 20, 6250)}


def measure(name, seconds):
    """The times of one case, after a check that the monitor saw each norm."""
    make, batch, timed, steps = CASES[name]
    model, shape = make()
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(timed * batch, *shape)).astype("float32")
    y = rng.integers(0, 10, timed * batch)
    fit = functools.partial(model.fit, x, y, batch_size=batch, verbose=0, shuffle=False)
    fit()

    monitor = NormMonitor(x[:batch], y[:batch])
    monitor.set_model(model)
    start = time.perf_counter()
    monitor.on_train_begin()
    first_s = time.perf_counter() - start
    assert all(each.spread > 0 and each.gamma_gradient >= 0 for each in monitor.records)

    functions = {
        "without": fit,
        "with": functools.partial(fit, callbacks=[monitor]),
        "reading": functools.partial(monitor.on_epoch_end, 0, {}),
    }
    ms = measuring.medians_ms(functions, seconds)
    step_ms = ms["without"] / timed
    return {
        "case": name,
        "norms": len(monitor.layers),
        "batch": batch,
        "timed_steps": timed,
        "steps": steps,
        "step_ms": step_ms,
        "reading_ms": ms["reading"],
        "first_reading_s": first_s,
        "fit_longer_percent": 100 * (ms["with"] / ms["without"] - 1),
        "added_percent": 100 * ms["reading"] / (steps * step_ms),
        "fewest_steps": 100 * ms["reading"] / step_ms / LIMIT_PERCENT,
    }


COLUMNS = {
    "case": ("case", ""),
    "norms": ("norms", "d"),
    "step_ms": ("step\nms", ".2f"),
    "reading_ms": ("reading\nms", ".2f"),
    "first_reading_s": ("the first\ns", ".1f"),
    "timed_steps": ("timed\nsteps", "d"),
    "fit_longer_percent": ("longer\n%", "+.1f"),
    "steps": ("epoch's\nsteps", "d"),
    "added_percent": ("adds\n%", ".3f"),
    "fewest_steps": (f"under {LIMIT_PERCENT:g} %\nfrom steps", ".0f"),
}


def table_of(rows):
    """The times as a table."""
    table = Table(title=f"NormMonitor once an epoch on {BACKEND}", title_justify="left")
    for name, (heading, _) in COLUMNS.items():
        table.add_column(heading, justify="left" if name == "case" else "right")
    for row in rows:
        table.add_row(*(format(row[name], form) for name, (_, form) in COLUMNS.items()))
    return table


def main():
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here")
    parser.add_argument("--seconds", type=float, default=30.0, help="time budget of each case")
    parser.add_argument("--case", choices=CASES, help="this one alone")
    arguments = parser.parse_args()
    names = [arguments.case] if arguments.case else list(CASES)
    rows = [measure(name, arguments.seconds) for name in names]
    measuring.console(100).print(table_of(rows))
    measuring.write({"versions": measuring.versions(), "rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
