"""Train ResNet50V2 on batches of two images: with its batch norms, and with group norms instead.

    KERAS_BACKEND=jax python benchmarks/small_batches.py [--side N] [--epochs N] [--seeds N]

The images are scikit-learn's 1,797 digits, upscaled to 32 x 32 pixels, four of five to train on and
the rest to test. Both models begin with the same weights, by `replace_batch_norm`, and see the same
batches in the same order, under the same optimizer. Reported is the share of the test images that
are classified right, for each seed, and its mean; `--json FILE` writes it.
"""

import argparse
import pathlib

import keras
import measuring
import numpy as np
from rich.table import Table
from sklearn.datasets import load_digits

from normwise.models import replace_batch_norm

BATCH, LEARNING_RATE = 2, 3e-4
TEST_SHARE = 5


def data(side):
    """The digits, upscaled, from 0 to 1: to train on and to test."""
    digits = load_digits()
    images = np.asarray(digits.images, "float32")[..., None] / 16
    images = keras.ops.image.resize(images, (side, side), data_format="channels_last")
    images, labels = np.asarray(keras.ops.convert_to_numpy(images)), digits.target
    tested = np.arange(len(images)) % TEST_SHARE == 0
    return (images[~tested], labels[~tested]), (images[tested], labels[tested])


def models(side, seed):
    """The two models, not yet trained."""
    keras.utils.set_random_seed(seed)
    batch_norm = keras.applications.ResNet50V2(
        weights=None, input_shape=(side, side, 1), classes=10
    )
    return {"batch": batch_norm, "group": replace_batch_norm(batch_norm)[0]}


def accuracies(side, epochs, seed):
    """The share of the test images that each model has right after each epoch."""
    train, test = data(side)
    found = {}
    for name, model in models(side, seed).items():
        keras.utils.set_random_seed(seed)
        model.compile(
            keras.optimizers.Adam(LEARNING_RATE),
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
        )
        history = model.fit(
            *train, batch_size=BATCH, epochs=epochs, validation_data=test, verbose=0
        ).history
        found[name] = [float(each) for each in history["val_accuracy"]]
    return found


def table_of(rows):
    """Accuracy by seed, and the mean."""
    table = Table(title=f"ResNet50V2, batches of {BATCH}: test accuracy after each epoch")
    for heading in ("seed", "batch norm", "group norm"):
        table.add_column(heading, justify="right")
    for seed, row in rows.items():
        table.add_row(str(seed), *(" ".join(f"{a:.3f}" for a in row[n]) for n in row))
    means = (np.mean([row[name][-1] for row in rows.values()]) for name in ("batch", "group"))
    table.add_row("mean", *(f"{mean:.3f}" for mean in means))
    return table


def main():
    """Train, print the table, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    rows = {}
    for seed in range(arguments.seeds):
        rows[seed] = accuracies(arguments.side, arguments.epochs, seed)
        print(seed, rows[seed], flush=True)
    measuring.console(100).print(table_of(rows))
    report = {"versions": measuring.versions(), "side": arguments.side, "accuracy": rows}
    measuring.write(report, arguments.json)


if __name__ == "__main__":
    main()
