"""Time normwise's layers against every other way to the same norm, on the Keras backend in use.

    KERAS_BACKEND=jax python benchmarks/kernels.py [--json FILE] [--chart FILE.png]
    python benchmarks/kernels.py --from build/kernels-*.json --chart FILE.png

Every peer is first held against the float64 reference, output and gradients, by the very functions
that are timed after. Then all run in one process, in random order, again and again. Ratios are of
medians, the peer's time over normwise's: more than 1 means that normwise is faster. A layer is
compared with a layer, and a function, as torch's own are, with `op`, the function of normwise.ops:
calling any Keras layer takes 0.1 to 0.3 ms. "-" stands for a peer that raises or is wrong; the JSON
says which, and no mean counts it.

The share of copy speed is the time of a plain copy of as many bytes as the norm must move at least,
over normwise's time: forward reads x and writes y, which is one copy of x; backward reads x and dy
and writes dx, which is one and a half. "kernel alone" is that share for the library's own functions
called on arrays that exist: what lies between the two is the framework's call, and memory that it
asks the system for anew. Both are in the time of "its copy" too, the framework's own of x, and of
x and dy, which are half a copy less than forward and backward must move.
"""

import argparse
import functools
import json
import math
import pathlib
import re
import statistics
import sys

import keras
import measuring
import numpy as np
import peers
from peers import Case
from rich.table import Table

import normwise

sys.path.insert(0, str(measuring.ROOT / "tests"))

import frameworks
import reference

CASES = [
    Case("tutorial-group", "group", (32, 26, 26, 10), groups=5),
    Case("tutorial-instance", "instance", (32, 26, 26, 10)),
    Case("tutorial-layer", "layer", (32, 26, 26, 10)),
    Case("tutorial-rms", "rms", (32, 26, 26, 10)),
    Case("resnet", "group", (16, 28, 28, 128), groups=32),
    Case("unet-last", "group", (4, 64, 64, 256), groups=32),
    Case("unet-first", "group", (4, 256, 64, 64), axis=1, groups=32),
    Case("single", "group", (1, 128, 128, 128), groups=32),
    Case("volume", "instance", (2, 32, 32, 32, 32)),
    Case("instance-first", "instance", (4, 64, 96, 96), axis=1),
    Case("bert", "layer", (8, 512, 768)),
    Case("convnext-last", "layer", (8, 56, 56, 96)),
    Case("convnext-first", "layer", (8, 96, 56, 56), axis=1),
    Case("llm", "rms", (4, 512, 2048)),
    Case("wide-group", "group", (8, 64, 64, 256), groups=32),
    Case("wide-instance", "instance", (8, 64, 64, 256)),
    Case("wide-layer", "layer", (8, 64, 64, 256)),
    Case("wide-rms", "rms", (8, 64, 64, 256)),
]
# Passes over memory, each as long as x.
PASSES = {"forward": 2, "forward+backward": 5}
COPY_PASSES = 2

# These are compared with the layer, the others with `op` where there is one.
LAYERS = ("composite", "Keras", "Keras XLA", "op")

# Half an ulp of 1. normwise calculates in float32 and rounds once; a peer may calculate in the
# dtype itself, and Keras's float32 sums lose 17 roundings at 4,096 positions.
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
OUR_EPS = ROUNDING["float32"]
PEER_EPS = {"float32": 16 * ROUNDING["float32"], "bfloat16": ROUNDING["bfloat16"]}
SMALLEST = 2.0**-126
# The reference takes a second for so many elements.
CHECKED_ELEMENTS = 2**18


@functools.lru_cache(maxsize=1)
def labels(case: Case, samples: int):
    """Which elements of the first samples share their statistics."""
    shape = (samples, *case.shape[1:])
    if case.norm in ("group", "instance"):
        return reference.group_labels(shape, case.axis, case.groups or case.channels)
    return reference.layer_labels(shape, (case.axis,))


class Problem:
    """A case with its data in one dtype, its layers, and what the reference says of it.

    The peers are called on the whole batch and compared on its first samples. There `probe`, the dy
    of the comparison, is dy, and elsewhere 0, so that gamma's and beta's gradients come from them.
    """

    def __init__(self, case: Case, dtype: str):
        self.case, self.dtype = case, dtype
        self.layers = case.layers(dtype)
        rng = np.random.default_rng(0)
        weights = rng.uniform(0.5, 1.5, (2, case.channels)).astype("float32")
        for layer in self.layers:
            layer.build(case.shape)
            layer.set_weights(weights[: len(layer.weights)])
        self.samples = max(1, min(case.shape[0], CHECKED_ELEMENTS // math.prod(case.shape[1:])))
        x, dy = (rng.normal(mean, 2, case.shape).astype("float32") for mean in (1, 0))
        probe = dy.copy()
        probe[self.samples :] = 0
        self.x, self.dy, self.probe = (keras.ops.cast(array, dtype) for array in (x, dy, probe))
        gamma, beta = weights if len(self.layers[0].weights) == 2 else (weights[0], None)
        self.norm = reference.Norm(
            self.first(self.x),
            gamma,
            beta,
            labels(case, self.samples),
            (case.axis,),
            self.layers[0].epsilon,
            centred=case.norm != "rms",
        )

    def first(self, tensor):
        """The samples that are compared."""
        return frameworks.to_numpy(tensor[: self.samples])

    def check(self, peer: peers.Peer, eps: float):
        """Raise AssertionError unless the peer is right within the roundings of `eps`."""
        dy = self.first(self.probe)
        y_tolerance = self.norm.y_tolerance(eps)
        self._within(self.first(peer.forward(self.x)), self.norm.y, y_tolerance, "y")
        y, (dx, *dweights) = peer.train(self.x, self.probe)
        dtypes = {keras.backend.standardize_dtype(tensor.dtype) for tensor in (y, dx)}
        if dtypes != {self.dtype}:
            raise AssertionError(f"y and dx have dtype {dtypes}, not {self.dtype}")
        self._within(self.first(y), self.norm.y, y_tolerance, "y in training")
        found = [self.first(dx), *map(frameworks.to_numpy, dweights)]
        gradients = self.norm.gradients(dy), self.norm.gradient_tolerances(dy, eps)
        for name, gradient, wanted, tolerance in zip(
            ("dx", "dgamma", "dbeta"), found, *gradients, strict=False
        ):
            self._within(gradient, wanted, tolerance, name)

    def _within(self, found, expected, tolerance, name):
        tolerance = tolerance + 2 * ROUNDING[self.dtype] * np.abs(expected) + SMALLEST
        frameworks.assert_within(found, expected, tolerance, name)


def checked_peers(problem: Problem):
    """The peers that are right, and what is the matter with each of Keras's that is not."""
    right, notes = {}, {}
    for name, make in peers.makers(problem.case, *problem.layers).items():
        try:
            peer = make()
            problem.check(peer, OUR_EPS if name in peers.OURS else PEER_EPS[problem.dtype])
        except Exception as error:
            if name not in peers.MAY_FAIL:
                error.add_note(f"This is {name} in {problem.case.name}, {problem.dtype}.")
                raise
            wrong = "is wrong" if isinstance(error, AssertionError) else "raises"
            # Keras prints its messages in bold and over many lines.
            words = " ".join(re.sub(r"\x1b\[\d+m", "", str(error)).split())
            notes[name] = f"{wrong}: {type(error).__name__}: {words[:200]}"
        else:
            right[name] = peer
    return right, notes


def measure(case: Case, dtype: str, seconds: float):
    """A row of the result for each direction."""
    problem = Problem(case, dtype)
    right, notes = checked_peers(problem)
    x, dy = problem.x, problem.dy
    x_bytes = math.prod(case.shape) * (2 if dtype == "bfloat16" else 4)
    copies = peers.copies(x_bytes)
    timed = right | {"its copy": peers.framework_copy()}
    arrays = (frameworks.to_numpy(tensor) for tensor in (x, dy))
    alone = peers.alone(problem.layers[0], *arrays, dtype)
    for direction, passes in PASSES.items():
        calls = {
            name: functools.partial(peer.forward, x)
            if direction == "forward"
            else functools.partial(peer.train, x, dy)
            for name, peer in timed.items()
        }
        kernel = {"kernel": alone[direction]} if alone else {}
        ms = measuring.medians_ms(calls | copies | kernel, seconds)
        copy_ms = min(ms.pop(name) for name in copies)
        least_ms = copy_ms * passes / COPY_PASSES
        alone_ms = ms.pop("kernel", None)
        ours_ms = ms.get("op", ms["normwise"])
        yield {
            "case": case.name,
            "norm": case.norm,
            "shape": case.shape,
            "axis": case.axis,
            "groups": case.groups,
            "dtype": dtype,
            "direction": direction,
            "kernel": normwise.explain(problem.layers[0], case.shape, dtype).kernel,
            "ms": ms,
            "copy_ms": copy_ms,
            "ratios": {
                name: ms[name] / (ms["normwise"] if name in LAYERS else ours_ms)
                for name in ms
                if name != "normwise"
            },
            "bytes_moved": passes * x_bytes,
            "share_of_copy_speed": least_ms / ours_ms,
            "share_of_copy_speed_alone": None if alone_ms is None else least_ms / alone_ms,
            "notes": notes,
        }


def means(rows):
    """The geometric mean of the ratios to each peer, and its worst case."""
    kinds = dict.fromkeys((r["dtype"], r["direction"], n) for r in rows for n in r["ratios"])
    for dtype, direction, peer in kinds:
        ratios = {
            row["case"]: row["ratios"][peer]
            for row in rows
            if (row["dtype"], row["direction"]) == (dtype, direction) and peer in row["ratios"]
        }
        worst = min(ratios, key=ratios.get)
        yield {
            "peer": peer,
            "dtype": dtype,
            "direction": direction,
            "mean": statistics.geometric_mean(ratios.values()),
            "cases": len(ratios),
            "worst_case": worst,
            "worst_ratio": ratios[worst],
        }


def table_of(rows):
    """Every row, a peer's time with its ratio in brackets."""
    names = list(dict.fromkeys(name for row in rows for name in (*row["ratios"], *row["notes"])))
    table = Table(title=f"ms, and (peer's / normwise's), on {peers.BACKEND}", title_justify="left")
    for column in ("case", "dtype", "direction"):
        table.add_column(column)
    for column in ("normwise", *names, "share of copy", "kernel alone"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [
            f"{row['ms'][name]:.3f} ({row['ratios'][name]:.2f})" if name in row["ms"] else "-"
            for name in names
        ]
        shares = row["share_of_copy_speed"], row["share_of_copy_speed_alone"]
        shares = ("-" if share is None else f"{share:.0%}" for share in shares)
        kind = row["case"], row["dtype"], row["direction"]
        table.add_row(*kind, f"{row['ms']['normwise']:.3f}", *cells, *shares)
    return table


def table_of_means(found):
    """The geometric means and worst cases."""
    table = Table(title="peer's time / normwise's, geometric means", title_justify="left")
    for column in ("peer", "dtype", "direction", "mean", "cases", "worst", "at"):
        number = column in ("mean", "cases", "worst")
        table.add_column(column, justify="right" if number else "left")
    for mean in found:
        numbers = f"{mean['mean']:.2f}", str(mean["cases"]), f"{mean['worst_ratio']:.2f}"
        kind = mean["peer"], mean["dtype"], mean["direction"]
        table.add_row(*kind, *numbers, mean["worst_case"])
    return table


def run(cases, dtypes, seconds):
    """Check and time the cases, print the tables, and return everything."""
    console = measuring.console(140)
    rows = []
    for case in cases:
        for dtype in dtypes:
            with console.status(f"{case.name}, {dtype}"):
                rows.extend(measure(case, dtype, seconds))
    found = list(means(rows))
    console.print(table_of(rows), table_of_means(found))
    notes = {(row["case"], peer, note) for row in rows for peer, note in row["notes"].items()}
    for case, peer, note in sorted(notes):
        console.print(f"{case}: {peer} {note}", markup=False, highlight=False)
    return {"versions": measuring.versions(), "rows": rows, "means": found}


def main():
    """Measure, or read what was measured; then write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [case.name for case in CASES]
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here")
    parser.add_argument("--chart", type=pathlib.Path, help="draw Keras's time over normwise's here")
    parser.add_argument(
        "--from",
        dest="sources",
        nargs="+",
        type=pathlib.Path,
        help="measure nothing and draw these JSON files",
    )
    parser.add_argument("--case", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--dtype", nargs="+", choices=list(ROUNDING), default=list(ROUNDING))
    parser.add_argument("--seconds", type=float, default=3.0, help="time budget of a row")
    parser.add_argument("--busy", type=int, default=0, help="processes that spin meanwhile")
    arguments = parser.parse_args()

    if arguments.sources:
        reports = [json.loads(source.read_text()) for source in arguments.sources]
    else:
        cases = [case for case in CASES if case.name in arguments.case]
        with measuring.busy(arguments.busy):
            reports = [run(cases, arguments.dtype, arguments.seconds)]
        measuring.write(reports[0], arguments.json)
    if arguments.chart:
        import chart

        arguments.chart.parent.mkdir(parents=True, exist_ok=True)
        chart.draw(reports, arguments.chart)


if __name__ == "__main__":
    main()
