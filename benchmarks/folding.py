"""Time the inference of whole models with and without their batch norms, which are folded away.

    KERAS_BACKEND=jax python benchmarks/folding.py [--json FILE] [--seconds S] [--size N]

Each model of keras.applications has random weights, and statistics about what training leaves.
First its predictions are held against those of the folded one, then `predict_on_batch` of both is
timed in random order, on 8 random images. Beside the times stands how many batch norms were folded:
those before an activation that follows an addition cannot be.
"""

import argparse
import functools
import pathlib

import keras
import measuring
import numpy as np
from rich.table import Table

from normwise.models import fold_batch_norm, norms_of

BACKEND = keras.backend.backend()
MODELS = {
    "ResNet50V2": keras.applications.ResNet50V2,
    "MobileNetV3Small": keras.applications.MobileNetV3Small,
}
BATCH = 8
# Of the largest prediction.
TOLERANCE = 1e-5


def with_statistics(model):
    """Give the batch norms of a model what training may leave them."""
    rng = np.random.default_rng(0)
    for norm in norms_of(model):
        for weight in norm.layer.weights:
            if weight.name in ("gamma", "moving_variance"):
                weight.assign(rng.uniform(0.5, 1.5, weight.shape))
            else:
                weight.assign(rng.normal(0.0, 0.1, weight.shape))
    return model


def check(model, folded, images):
    """Hold the predictions of a folded model against those of the model, and say how far off."""
    expected, found = (each.predict_on_batch(images) for each in (model, folded))
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not error <= TOLERANCE:
        raise ValueError(f"{model.name} moves by {error:.2g} of its largest prediction")
    return error


def measure(name, size, seconds):
    """Check and time a model, and the folded one."""
    model = with_statistics(MODELS[name](weights=None, input_shape=(size, size, 3)))
    folded, report = fold_batch_norm(model)
    images = np.random.default_rng(1).normal(size=(BATCH, size, size, 3)).astype("float32")
    error = check(model, folded, images)
    calls = {
        "given": functools.partial(model.predict_on_batch, images),
        "folded": functools.partial(folded.predict_on_batch, images),
    }
    ms = measuring.medians_ms(calls, seconds)
    return {
        "model": name,
        "batch_norms": len(report),
        "folded": len(report.changed),
        "error": error,
        "jit_compile": bool(model.jit_compile),
        "ms": ms,
        "folded_over_given": ms["folded"] / ms["given"],
    }


def table_of(result):
    """The models as a table."""
    how = {"jax": "jax.jit", "tensorflow": "tf.function", "torch": "eager"}[BACKEND]
    if BACKEND == "tensorflow":
        how += f", jit_compile={result['rows'][0]['jit_compile']}"
    size = result["size"]
    table = Table(
        title=f"inference on {BACKEND} ({how}), {BATCH} images of {size} x {size}",
        title_justify="left",
    )
    table.add_column("model")
    for heading in ("norms", "folded", "error", "given\nms", "folded\nms", "folded /\ngiven"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        times = (*row["ms"].values(), row["folded_over_given"])
        counts = str(row["batch_norms"]), str(row["folded"]), f"{row['error']:.1e}"
        table.add_row(row["model"], *counts, *(f"{number:.2f}" for number in times))
    return table


def main():
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here")
    parser.add_argument("--seconds", type=float, default=30.0, help="time budget of each model")
    parser.add_argument("--size", type=int, default=224, help="the extent of the images")
    arguments = parser.parse_args()
    rows = [measure(name, arguments.size, arguments.seconds) for name in MODELS]
    result = {"versions": measuring.versions(), "size": arguments.size, "rows": rows}
    measuring.console(100).print(table_of(result))
    measuring.write(result, arguments.json)


if __name__ == "__main__":
    main()
