"""The native library: where it is, and how it is loaded. cpu.py calls it."""

import ctypes
import functools
import importlib
import importlib.metadata
import pathlib
from collections.abc import Callable

from normwise.kernels import environment

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


def missing() -> str | None:
    """What keeps this machine from having the library, or None."""
    if path() is not None:
        return None
    return (
        "the native library was not built, for want of a C++ compiler or because compiling failed; "
        "install one (g++, clang++) and then normwise again, with pip's --force-reinstall --verbose"
    )


# What a framework has done before anyone else opens the library's file, and once it is loaded.
open_first: list[Callable[[str], object]] = []
after_loading: list[Callable[[ctypes.CDLL], object]] = []


@functools.cache
def load() -> ctypes.CDLL:
    """The library, loaded once per process."""
    environment.check()
    # The module of Keras's backend says how, when it is imported.
    importlib.import_module("normwise.kernels").listed()
    for opener in open_first:
        opener(str(path()))
    library = ctypes.CDLL(str(path()))
    for function in (library.normwise_forward, library.normwise_backward):
        # A NormwiseNorm and NormwiseOperands, by address and as bytes.
        function.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        function.restype = ctypes.c_int32
    library.normwise_message.restype = ctypes.c_char_p
    library.normwise_instructions.restype = ctypes.c_char_p
    library.normwise_use_openmp.argtypes = [ctypes.c_void_p]
    library.normwise_use_openmp.restype = None
    for change in after_loading:
        change(library)
    return library


def instructions() -> str:
    """The instruction set that the library runs on here: "avx512", "avx2" or "baseline"."""
    return load().normwise_instructions().decode()


def threads() -> int:
    """How many threads a call may use, by NORMWISE_NUM_THREADS and the CPU affinity."""
    return load().normwise_threads()
