"""Which kernel runs, decided in one place and with a reason."""

import dataclasses
import os

import keras

from normwise import kernels
from normwise.geometry import Geometry
from normwise.kernels import library

MODES = ("auto", "native", "composite")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel by its name, and why it was chosen.

    Args:
        kernel: "native" (csrc/), "torch" (PyTorch's own fused norms) or "composite" (keras.ops).
        reason: in words.
    """

    kernel: str
    reason: str


_NATIVE = Choice("native", "the native kernels can take it")


def _check_mode(mode, source: str) -> str:
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

    def __init__(self, mode: str):
        global _mode
        self._before = _mode
        _mode = _check_mode(mode, "mode")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        global _mode
        _mode = self._before


def choose(
    geometry: Geometry,
    *,
    dtype: str,
    epsilon: float | None,
    masked: bool,
    centred: bool = True,
    x=None,
) -> Choice:
    """Choose the kernel for one call on Keras's backend.

    Args:
        geometry: of the input.
        dtype: that the kernel would read and write.
        epsilon: added to the variance, None where it is a tensor.
        masked: whether the call has a mask.
        centred: whether the mean is subtracted.
        x: the input, None to ask about any that lies on the CPU and is not traced.

    Raises:
        RuntimeError: the native kernels were asked for and cannot run.

    Example:

    >>> from normwise import geometry
    >>> plan = geometry.layer((8, 4, 4, 6), axis=(1, 3))
    >>> choose(plan, dtype="float32", epsilon=1e-3, masked=False).kernel
    'composite'
    """
    backend = keras.backend.backend()
    if _mode == "composite":
        obstacle = "use_kernels('composite') is in force"
    elif masked:
        obstacle = "the native kernels take no mask"
    elif epsilon is None:
        obstacle = "the native kernels take no learned epsilon"
    else:
        obstacle = library.obstacle(geometry, dtype)
    if obstacle is None and x is not None:
        obstacle = kernels.obstacle(backend)(x)
    if obstacle is None:
        return _NATIVE
    if _mode == "native":
        raise RuntimeError(
            f"use_kernels('native') is in force, but {obstacle}; use_kernels('auto') takes the "
            "next best kernel here"
        )
    if backend == "torch" and _torch_is_right(geometry, epsilon, masked, centred):
        return Choice("torch", f"torch's own fused norm, since {obstacle}")
    return Choice("composite", obstacle)


def _torch_is_right(geometry: Geometry, epsilon: float | None, masked: bool, centred: bool) -> bool:
    # torch's norms take no mask, and give NaN for equal elements at epsilon 0 and NaN gradients for
    # empty inputs. They know trailing axes, and groups of channels whose mean is subtracted.
    return (
        not masked
        and epsilon is not None
        and epsilon > 0
        and 0 not in geometry.shape
        and (geometry.trailing or (centred and geometry.per == ("outer", "groups")))
    )
