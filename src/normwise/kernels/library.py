"""The native library: where it is, what it offers, and how a call to it is described.

The library is plain C (csrc/normwise.h) and knows no framework; the modules named after one hand it
their tensors.
"""

import ctypes
import dataclasses
import functools
import importlib
import importlib.metadata
import os
import pathlib
from collections.abc import Callable

import keras

from normwise.geometry import Geometry

# As enum NormwiseDtype and enum NormwiseActivation in csrc/normwise.h.
DTYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
_IDENTITY, _LEAKY_RELU, _SIGMOID, _TANH, _SILU, _GELU, _GELU_TANH = range(7)


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation that the kernels fuse.

    Args:
        code: its number in enum NormwiseActivation.
        slope: of a leaky relu at negative numbers.
        function: the same on Keras tensors.
    """

    code: int
    slope: float
    function: Callable


IDENTITY = Activation(_IDENTITY, 0.0, keras.activations.linear)


@functools.lru_cache(maxsize=256)
def activation(function: Callable | None) -> Activation | None:
    """What the kernels fuse for a function of keras.activations, None if they do not know it.

    functools.partial with `negative_slope` of leaky_relu or `approximate` of gelu is known too.
    """
    activations = keras.activations
    options = {}
    original = function
    if isinstance(function, functools.partial) and not function.args:
        function, options = function.func, dict(function.keywords)
    slope = 0.0
    if function is None or function is activations.linear:
        code = _IDENTITY
    elif function is activations.leaky_relu:
        code, slope = _LEAKY_RELU, float(options.pop("negative_slope", 0.2))
    elif function is activations.gelu:
        code = _GELU_TANH if options.pop("approximate", False) else _GELU
    else:
        known = ("relu", _LEAKY_RELU), ("sigmoid", _SIGMOID), ("tanh", _TANH), ("silu", _SILU)
        code = {getattr(activations, name): code for name, code in known}.get(function)
    if code is None or options:
        return None
    return Activation(code, slope, activations.linear if original is None else original)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of x form the five extents, whatever the lengths of the axes are.

    Axes before `outer_end` form outer, from there to `before_end` before, from there to
    `channels_end` groups and members together, and the rest after.
    """

    outer_end: int
    before_end: int
    channels_end: int
    groups: int
    keeps_after: bool

    def statistics_shape(self, shape):
        """The shape of the statistics of an x of this shape: means, then 1 / standard deviations.

        It leads with the axes of outer, so that whoever splits a batch splits these alike.
        """
        kept = tuple(shape[self.channels_end :]) if self.keeps_after else (self.groups,)
        return (*shape[: self.outer_end], 2, *kept)


def layout(geometry: Geometry) -> Layout:
    """How the kernels read an input of this geometry, which lies in memory in one piece."""
    first, last = geometry.parameter_axes[0], geometry.parameter_axes[-1]
    if "groups" in geometry.per:
        return Layout(1, first, last + 1, geometry.groups, False)
    return Layout(first, first, last + 1, 1, "after" in geometry.per)


class Norm(ctypes.Structure):
    """struct NormwiseNorm of csrc/normwise.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("outer", "before", "groups", "members", "after")),
        *((name, ctypes.c_int32) for name in ("keeps_after", "centred", "dtype", "activation")),
        *((name, ctypes.c_double) for name in ("epsilon", "slope")),
        *((name, ctypes.c_int32) for name in ("threads", "reserved")),
    )


def norm(
    geometry: Geometry,
    dtype: str,
    *,
    epsilon: float,
    centred: bool,
    activation: Activation = IDENTITY,
) -> Norm:
    """What the library is told of a norm; the lengths of all axes are known."""
    return Norm(
        *geometry.extents,
        layout(geometry).keeps_after,
        centred,
        DTYPES[dtype],
        activation.code,
        epsilon,
        activation.slope,
    )


_NAME = "libnormwise.so"


def _find() -> pathlib.Path | None:
    beside = pathlib.Path(__file__).with_name(_NAME)
    if beside.exists():
        return beside
    # An editable install leaves the sources where they are and puts what it builds elsewhere.
    try:
        installed = importlib.metadata.distribution("normwise")
    except importlib.metadata.PackageNotFoundError:
        return None
    elsewhere = pathlib.Path(installed.locate_file(f"normwise/kernels/{_NAME}"))
    return elsewhere if elsewhere.exists() else None


# Sought once, at import: torch.compile traces through a functools.cache, and knows no file system.
_PATH = _find()


def path() -> pathlib.Path | None:
    """The library's file, None where it was not built."""
    return _PATH


def obstacle(geometry: Geometry, dtype: str) -> str | None:
    """Why the kernels cannot calculate a norm of this geometry and dtype anywhere, or None."""
    if missing() is not None:
        return missing()
    if geometry.permutation is not None:
        return "the sets are not neighbouring axes"
    if dtype not in DTYPES:
        return f"{dtype} has no native kernel"
    return None


def missing() -> str | None:
    """What keeps this machine from having the library, or None."""
    if path() is not None:
        return None
    return (
        "the native library was not built, for want of a C++ compiler or because compiling failed; "
        "install one (g++, clang++) and then normwise again, with pip's --force-reinstall --verbose"
    )


def instructions() -> str:
    """The instruction set that the library runs on here: "avx512", "avx2" or "baseline"."""
    return load().normwise_instructions().decode()


def threads() -> int:
    """How many threads a call may use, by NORMWISE_NUM_THREADS and the CPU affinity."""
    return load().normwise_threads()


def check_environment():
    """Check the environment variables that the library reads, which itself cannot complain."""
    threads = os.environ.get("NORMWISE_NUM_THREADS")
    if threads is not None and not (threads.isdecimal() and int(threads) > 0):
        raise ValueError(
            f"NORMWISE_NUM_THREADS={threads!r} is no number of threads; use a positive int, or "
            "unset it to have one for each CPU"
        )
    wanted, known = os.environ.get("NORMWISE_INSTRUCTIONS"), ("avx512", "avx2", "baseline")
    if wanted not in (None, *known):
        raise ValueError(
            f"NORMWISE_INSTRUCTIONS={wanted!r} names no instruction set; use {', '.join(known)}, "
            "or unset it to have the widest that the CPU has"
        )


@functools.cache
def load() -> ctypes.CDLL:
    """The library, loaded once per process."""
    check_environment()
    if keras.backend.backend() == "tensorflow":
        # TensorFlow only sees the ops of a library that it is itself the first to load.
        importlib.import_module("tensorflow").load_op_library(str(path()))
    library = ctypes.CDLL(str(path()))
    pointers = [ctypes.c_void_p] * 8
    library.normwise_forward.argtypes = [ctypes.c_void_p, *pointers[:5]]
    library.normwise_forward.restype = None
    library.normwise_backward.argtypes = [ctypes.c_void_p, *pointers]
    library.normwise_backward.restype = None
    library.normwise_instructions.restype = ctypes.c_char_p
    return library
