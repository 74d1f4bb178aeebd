"""Time what comes with x beside the same written by hand, on the Keras backend in use.

    KERAS_BACKEND=jax python benchmarks/operands.py [--json FILE]

The cases are those of benchmarks/kernels.py that have 4 MB or more, forward with backward:

    per sample   gamma and beta of shape (batch, channels); by hand: the op without them, times
                 gamma and plus beta in operations of the framework
    residual     the norm of x + residual, and the sum, both with a gradient; by hand: the sum, and
                 the op of it

Both ways are first held against the float64 reference, results and gradients, and then run in
random order in one process. Ratios are of medians, by hand over normwise: more than 1 means that
the operand is faster. In bytes that must move a residual by hand takes 11 passes over x, and as an
operand 8.
"""

import argparse
import math
import pathlib
import statistics

import keras
import kernels
import measuring
import numpy as np
from kernels import frameworks, reference
from peers import BACKEND, Case
from rich.table import Table

from normwise import ops

LEAST_BYTES = 4e6
BYTES = {"float32": 4, "bfloat16": 2}
OPERANDS = ("per sample", "residual")


def by_operand(case: Case, operand: str):
    """The norm of x as one op; the other tensors are its gamma, beta and residual."""
    norm, options = _op(case)
    if operand == "per sample":
        return lambda x, *parameters: (norm(x, *parameters, **options),)
    return lambda x, residual, *parameters: norm(x, *parameters, residual=residual, **options)


def by_hand(case: Case, operand: str):
    """The same of an op that knows neither operand."""
    norm, options = _op(case)

    def spread(parameter):
        shape = [1] * len(case.shape)
        shape[0], shape[case.axis] = case.shape[0], case.channels
        return keras.ops.reshape(parameter, shape)

    def modulate(x, gamma, *beta):
        y = norm(x, **options) * spread(gamma)
        return (y + spread(beta[0]) if beta else y,)

    def add(x, residual, *parameters):
        total = x + residual
        return norm(total, *parameters, **options), total

    return modulate if operand == "per sample" else add


def _bytes(case: Case, dtype: str) -> int:
    return math.prod(case.shape) * BYTES[dtype]


def _op(case: Case):
    options = {"axis": case.axis, "epsilon": 1e-3}
    if case.groups:
        options["groups"] = case.groups
    return getattr(ops, f"{case.norm}_norm"), options


def trained(function, tensors, cotangents):
    """What calls a function and takes the gradients by all its tensors, compiled by the backend."""
    if BACKEND == "jax":
        import jax

        @jax.jit
        def both(tensors, cotangents):
            results, pull = jax.vjp(lambda *tensors: tuple(function(*tensors)), *tensors)
            return results, pull(tuple(cotangents))

        return lambda: jax.block_until_ready(both(tensors, cotangents))
    if BACKEND == "tensorflow":
        import tensorflow as tf

        @tf.function(autograph=False)
        def both(tensors, cotangents):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                results = list(function(*tensors))
            return results, tape.gradient(results, tensors, output_gradients=cotangents)

        return lambda: both(tensors, cotangents)
    import torch

    def both():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        results = function(*leaves)
        return results, torch.autograd.grad(list(results), leaves, cotangents)

    return both


class Problem:
    """A case with its tensors in one dtype, for one operand."""

    def __init__(self, case: Case, dtype: str, operand: str):
        self.case, self.dtype, self.operand = case, dtype, operand
        rng = np.random.default_rng(0)
        for_each = case.shape[:1] if operand == "per sample" else ()
        count = 1 if case.norm == "rms" else 2
        parameters = rng.uniform(0.5, 1.5, (count, *for_each, case.channels))
        x, dy, residual, dsum = (rng.normal(mean, 2, case.shape) for mean in (1, 0, 0, 0))
        # A modulation is made by a layer, in its dtype; weights are float32.
        dtypes = dtype if for_each else "float32"
        self.parameters = [self._tensor(each, dtypes) for each in parameters]
        self.given = [self._tensor(x, dtype)]
        self.cotangents = [self._tensor(dy, dtype)]
        if operand == "residual":
            self.given.append(self._tensor(residual, dtype))
            self.cotangents.append(self._tensor(dsum, dtype))
        self.tensors = [*self.given, *self.parameters]

    @staticmethod
    def _tensor(array, dtype):
        return keras.ops.cast(keras.ops.convert_to_tensor(array.astype("float32")), dtype)

    def check(self, call, eps: float):
        """Raise AssertionError unless the first sample is right within the roundings of `eps`."""
        results, gradients = call()
        first = [frameworks.to_numpy(each[:1]) for each in (*results, gradients[0])]
        shape = (1, *self.case.shape[1:])
        dy, *dsum = (frameworks.to_numpy(each[:1]) for each in self.cotangents)
        parameters = [frameworks.to_numpy(each) for each in self.parameters]
        if self.operand == "per sample":
            parameters = [each[0] for each in parameters]
        x = first[1] if dsum else frameworks.to_numpy(self.given[0][:1])
        gamma, beta = (*parameters, None)[:2]
        labels = kernels.labels(self.case, 1)
        centred = self.case.norm != "rms"
        norm = reference.Norm(x, gamma, beta, labels, (self.case.axis,), 1e-3, centred=centred)
        dx, *_ = norm.gradients(dy)
        dx_tolerance, *_ = norm.gradient_tolerances(dy, eps)
        wanted = [(norm.y, norm.y_tolerance(eps)), (dx + sum(dsum), dx_tolerance)]
        for found, (value, tolerance) in zip((first[0], first[-1]), wanted, strict=True):
            rounding = 4 * kernels.ROUNDING[self.dtype] * (np.abs(value) + abs(sum(dsum)))
            frameworks.assert_within(found, np.reshape(value, shape), tolerance + rounding)


def measure(case: Case, dtype: str, operand: str, seconds: float):
    """A row of the result."""
    problem = Problem(case, dtype, operand)
    calls = {}
    for name, make, eps in (
        ("normwise", by_operand, kernels.OUR_EPS),
        ("by hand", by_hand, kernels.PEER_EPS[dtype]),
    ):
        calls[name] = trained(make(case, operand), problem.tensors, problem.cotangents)
        problem.check(calls[name], eps)
    ms = measuring.medians_ms(calls, seconds)
    ratio = ms["by hand"] / ms["normwise"]
    return {"case": case.name, "dtype": dtype, "operand": operand, "ms": ms, "ratio": ratio}


def tables(rows):
    """Every row, and the geometric means."""
    each = Table(title=f"ms, forward with backward, on {BACKEND}", title_justify="left")
    for column in ("case", "dtype", "operand"):
        each.add_column(column)
    for column in ("normwise", "by hand", "ratio"):
        each.add_column(column, justify="right")
    for row in rows:
        times = (f"{row['ms'][name]:.3f}" for name in ("normwise", "by hand"))
        each.add_row(row["case"], row["dtype"], row["operand"], *times, f"{row['ratio']:.2f}")
    means = Table(title="by hand / normwise", title_justify="left")
    for column in ("operand", "dtype", "mean", "worst"):
        means.add_column(column, justify="left" if column in ("operand", "dtype") else "right")
    for operand in OPERANDS:
        for dtype in BYTES:
            kind = operand, dtype
            ratios = [row["ratio"] for row in rows if (row["operand"], row["dtype"]) == kind]
            if ratios:
                mean = statistics.geometric_mean(ratios)
                means.add_row(operand, dtype, f"{mean:.2f}", f"{min(ratios):.2f}")
    return each, means


def main():
    """Check, measure, print and write."""
    names = [case.name for case in kernels.CASES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here")
    parser.add_argument("--case", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--dtype", nargs="+", choices=list(BYTES), default=list(BYTES))
    parser.add_argument("--seconds", type=float, default=2.0, help="time budget of a row")
    arguments = parser.parse_args()
    console = measuring.console(100)
    rows = []
    for case in kernels.CASES:
        for dtype in arguments.dtype:
            if case.name in arguments.case and _bytes(case, dtype) >= LEAST_BYTES:
                with console.status(f"{case.name}, {dtype}"):
                    rows += [measure(case, dtype, each, arguments.seconds) for each in OPERANDS]
    console.print(*tables(rows))
    measuring.write({"versions": measuring.versions(), "rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
