"""Measure how exact the layers stay as the mean grows, Keras's beside ours, and draw it.

    python benchmarks/accuracy.py docs/pictures/accuracy.png [--json FILE]

The input has standard deviation 1 and a mean from 1 to 1e6. Each backend runs in a process of its
own. The error is the largest |y - reference|, the reference in float64 of the same float32 input;
the bound is eps * (1 + |mean| / std), which is what one rounding of the input costs.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
BACKENDS = ("tensorflow", "jax", "torch")
MEANS = [10.0**exponent for exponent in np.arange(0, 6.25, 0.5)]
SHAPE, GROUPS, EPSILON = (4, 64, 64, 32), 8, 1e-3
EPS = 2.0**-24
NORMS = ("group", "instance", "layer")


def measure():
    """The largest error of every layer at every mean, on the Keras backend in use."""
    import keras

    import normwise

    sys.path.insert(0, str(ROOT / "tests"))
    import reference

    axis = len(SHAPE) - 1
    cases = {
        "group": (reference.group_labels(SHAPE, axis, GROUPS), "GroupNormalization", GROUPS),
        "instance": (reference.group_labels(SHAPE, axis, SHAPE[-1]), "GroupNormalization", -1),
        "layer": (reference.layer_labels(SHAPE, (axis,)), "LayerNormalization", None),
    }
    errors = {}
    for norm, (labels, name, groups) in cases.items():
        options = {"epsilon": EPSILON} | ({} if groups is None else {"groups": groups})
        for library, layers in (("Keras", keras.layers), ("normwise", normwise.layers)):
            layer = getattr(layers, name)(**options)
            found = errors[f"{library} {norm}"] = []
            for mean in MEANS:
                x = np.random.default_rng(0).normal(mean, 1, SHAPE).astype("float32")
                y = keras.ops.convert_to_numpy(layer(x))
                wanted = reference.Norm(x, None, None, labels, (axis,), EPSILON).y
                # No number can stand for NaN in JSON or on a logarithmic axis.
                error = float(np.abs(y - wanted).max())
                found.append(error if math.isfinite(error) else None)
    return errors


def draw(results, path):
    """One panel a norm, one line a library and backend; NaN is a cross at the top."""
    from matplotlib.figure import Figure

    colours = {"tensorflow": "#e69f00", "jax": "#0072b2", "torch": "#d55e00"}
    figure = Figure(figsize=(9.6, 4.0), dpi=140, facecolor="white", layout="constrained")
    for axes, norm in zip(figure.subplots(1, 3, sharey=True), NORMS, strict=True):
        bound = [EPS * (1 + mean) for mean in MEANS]
        axes.loglog(
            MEANS, bound, color="#999999", linewidth=6, alpha=0.5, label="eps (1 + |mean| / std)"
        )
        for backend, errors in results.items():
            for library, style in (("Keras", "--"), ("normwise", "-")):
                found = np.array(errors[f"{library} {norm}"], float)
                axes.loglog(
                    MEANS,
                    np.maximum(found, 1e-8),
                    style,
                    color=colours[backend],
                    marker=".",
                    linewidth=1.8,
                    label=f"{library}, {backend}",
                )
                lost = np.isnan(found)
                # Side by side, where two backends give NaN at the same means.
                axes.loglog(
                    np.array(MEANS)[lost], np.full(lost.sum(), 40), "x", color=colours[backend]
                )
        axes.set_title(f"{norm} norm", fontweight="bold")
        axes.set_xlabel("|mean| / std")
        axes.set_ylim(1e-8, 100)
        axes.grid(color="#e5e5e5")
    axes = figure.axes[0]
    axes.set_ylabel("largest error of y")
    axes.annotate("x: NaN", (1.2, 30), fontsize=9)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def main():
    """Measure on every backend, write the picture and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", nargs="?", type=pathlib.Path)
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here")
    arguments = parser.parse_args()
    if arguments.picture is None:
        print(json.dumps(measure()))
        return
    results = {}
    for backend in BACKENDS:
        run = subprocess.run(
            [sys.executable, __file__],
            env={**os.environ, "KERAS_BACKEND": backend},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        results[backend] = json.loads(run.stdout.splitlines()[-1])
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(results, arguments.picture)
    if arguments.json:
        arguments.json.write_text(json.dumps({"means": MEANS, "errors": results}, indent=1) + "\n")
    for backend, errors in results.items():
        for name, found in errors.items():
            shown = " ".join("NaN" if error is None else f"{error:.1e}" for error in found[::2])
            print(f"{backend:11}{name:18}{shown}")


if __name__ == "__main__":
    main()
