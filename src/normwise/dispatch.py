"""Which kernel runs: the first of the backend's that has nothing against it."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any, Self

from normwise import kernels
from normwise.kernels import Kernel
from normwise.norm import Norm
from normwise.typing import Tensor

MODES = ("auto", "native", "composite")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel by its name, and why it was chosen. Printed, it lists the kernels before it too.

    Args:
        kernel: "native" (csrc/), "torch" (PyTorch's own fused norms), "composite" (keras.ops), or
            the name of an engine that was added.
        reason: in words.
        against: the kernels that were asked before, each with its reason against.
        run: the kernel itself, called with a Norm, x and Operands.
        adds: whether it takes a residual, called with a Norm, x and the residual.
    """

    kernel: str
    reason: str
    against: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False, repr=False)
    run: Any = dataclasses.field(default=None, compare=False, repr=False)
    adds: Any = dataclasses.field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        chosen = f"{self.kernel}: yes" + ("" if self.against else f", {self.reason}")
        return "\n".join((*(f"{name}: no, {reason}" for name, reason in self.against), chosen))


def _check_mode(mode: str, source: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{source}={mode!r} names no kernels; use 'auto', 'native' or 'composite'")
    return mode


_mode = _check_mode(os.environ.get("NORMWISE_KERNELS", "auto"), "NORMWISE_KERNELS")


def mode() -> str:
    """The mode in force."""
    return _mode


class use_kernels:  # noqa: N801 - used as a function, and in a with statement
    """Choose the kernels for the whole process, or for the length of a with statement.

    Args:
        mode: "auto" takes the native kernels wherever they can run, "composite" what runs without
            them, norms composed of the framework's own operations, and "native" the native kernels
            or an error that says why not.

    A function that was traced before (jax.jit, tf.function, a compiled model) keeps the kernels
    that it was traced with. The environment variable NORMWISE_KERNELS sets the mode at the start.

    Raises:
        ValueError: there is no such mode.

    Example:

    >>> import numpy as np, normwise
    >>> with normwise.use_kernels("composite"):
    ...     normwise.explain(normwise.layers.LayerNormalization(axis=1), (8, 16, 4)).kernel
    'composite'
    """

    def __init__(self, mode: str) -> None:
        global _mode
        self._before = _mode
        _mode = _check_mode(mode, "mode")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        global _mode
        _mode = self._before


def choose(norm: Norm, x: Tensor | None = None) -> Choice:
    """Choose the kernel for one call on Keras's backend.

    Args:
        norm: what the call is.
        x: the input, None to ask about one on the device that the backend would use, untraced.

    Raises:
        RuntimeError: the native kernels were asked for and cannot run.

    Example:

    >>> from normwise import geometry
    >>> apart = Norm(geometry.layer((8, 4, 4, 6), axis=(1, 3)), "float32", "float32", 1e-3)
    >>> choose(apart).kernel
    'composite'
    """
    against = []
    for kernel in kernels.listed():
        if not kernel.engine and _mode == "native":
            break
        if kernel.engine and _mode == "composite":
            reason = "use_kernels('composite') is in force"
        else:
            reason = kernel.why_not(norm, x)
        if reason is None:
            return _chosen(kernel, against, x) if against else _taken(kernel)
        against.append((kernel, reason))
    raise RuntimeError(
        f"use_kernels('native') is in force, but {_of_engines(against, x)}; use_kernels('auto') "
        "takes the next best kernel here"
    )


@functools.cache
def _taken(kernel: Kernel) -> Choice:
    reason = f"the {kernel.name} kernels can take it"
    return Choice(kernel.name, reason, run=kernel.run, adds=kernel.adds)


def _chosen(kernel: Kernel, against: Sequence[tuple[Kernel, str]], x: Tensor | None) -> Choice:
    """A kernel that was chosen after others: for want of an engine, or an engine itself."""
    since = _of_engines(against, x)
    reason = _taken(kernel).reason if kernel.engine else kernel.since.format(since)
    rejected = tuple((other.name, words) for other, words in against)
    return Choice(kernel.name, reason, rejected, kernel.run, kernel.adds)


def _of_engines(against: Sequence[tuple[Kernel, str]], x: Tensor | None) -> str:
    """The reasons against the engines for the device of x, or against all where there is none."""
    engines = [(kernel, reason) for kernel, reason in against if kernel.engine]
    here = [reason for kernel, reason in engines if not kernel.is_elsewhere(x)]
    return "; ".join(dict.fromkeys(here or [reason for _, reason in engines]))
