"""A wheel's library by itself: called through csrc/normwise.h, held against NumPy in float64.

    python tests/installed_library.py

It needs NumPy and nothing else, so that it runs where there is no framework, as on musl. The rest
of what a wheel brings is tested with frameworks, by `make test-wheel`.
"""

import ctypes
import importlib.util
import itertools
import pathlib

import numpy as np

SHAPE, GROUPS, EPSILON = (3, 5, 7, 12), 4, 1e-3
# For each dtype of enum NormwiseDtype that NumPy has: its number, and the error of one rounding.
DTYPES = {"float32": (0, 2**-24), "float64": (1, 2**-53), "float16": (2, 2**-11)}


def fields(kind, *names):
    """Fields of one type, as a struct has them one after another."""
    return [(name, kind) for name in names]


class Norm(ctypes.Structure):
    """Of csrc/normwise.h, as are its fields."""

    _fields_ = (
        ("size", ctypes.c_uint64),
        *fields(ctypes.c_int32, "outer_end", "before_end", "channels_end", "keeps_after"),
        ("groups", ctypes.c_int64),
        *fields(ctypes.c_int32, "subtract_mean", "activation"),
        *fields(ctypes.c_double, "epsilon", "slope"),
        *fields(ctypes.c_int32, "per_sample", "reserved"),
    )


class Operands(ctypes.Structure):
    """Of csrc/normwise.h, as are its fields."""

    _fields_ = (
        ("size", ctypes.c_uint64),
        ("extents", ctypes.POINTER(ctypes.c_int64)),
        *fields(ctypes.c_int32, "rank", "dtype", "threads", "reserved"),
        *fields(ctypes.c_void_p, "x", "gamma", "beta", "y", "statistics"),
        *fields(ctypes.c_void_p, "dy", "dx", "dgamma", "dbeta"),
    )


def library():
    """The library that is installed, without importing the package, which needs Keras."""
    package = pathlib.Path(importlib.util.find_spec("normwise").origin).parent
    if package.parent.name == "src":
        raise RuntimeError(f"normwise is that of the sources, {package}; install a wheel")
    return ctypes.CDLL(str(package / "kernels" / "libnormwise.so"))


def address(array):
    """Where an array lies, for a field of Operands."""
    return array.ctypes.data_as(ctypes.c_void_p)


def check(native, dtype, axis):
    """Group norm forward and backward over one axis, beside the same in float64."""
    number, rounding = DTYPES[dtype]
    arithmetic = "float64" if dtype == "float64" else "float32"
    shape = SHAPE if axis == -1 else (SHAPE[0], SHAPE[-1], *SHAPE[1:-1])
    channel, channels = axis % len(shape), SHAPE[-1]
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(size=shape).astype(dtype) for _ in range(2))
    gamma, beta = (rng.normal(size=channels).astype(arithmetic) for _ in range(2))
    y, dx = np.zeros_like(x), np.zeros_like(x)
    dgamma, dbeta = np.zeros_like(gamma), np.zeros_like(beta)
    statistics = np.zeros((shape[0], 2, GROUPS), arithmetic)
    size = ctypes.sizeof(Norm)
    norm = Norm(size, 1, channel, channel + 1, False, GROUPS, True, 0, EPSILON, 0.0, False, 0)
    extents = (ctypes.c_int64 * len(shape))(*shape)
    tensors = [address(each) for each in (x, gamma, beta, y, statistics, dy, dx, dgamma, dbeta)]
    operands = Operands(ctypes.sizeof(Operands), extents, len(shape), number, 0, 0, *tensors)
    for run in (native.normwise_forward, native.normwise_backward):
        status = run(ctypes.byref(norm), ctypes.byref(operands))
        if status:
            raise RuntimeError(native.normwise_message().decode())
    found = (y, dx, dgamma, dbeta)
    wanted = reference(x, gamma, beta, dy, channel)
    for name, one, other in zip(("y", "dx", "dgamma", "dbeta"), found, wanted, strict=True):
        error = np.abs(one - other).max() / max(1.0, np.abs(other).max())
        if not error <= 32 * rounding:
            raise AssertionError(f"{name} of {dtype}, axis {axis}, is {error:.1e} off")


def reference(x, gamma, beta, dy, channel):
    """The formulas of docs/numerics.md, in float64."""
    x, gamma, beta, dy = (np.asarray(each, "float64") for each in (x, gamma, beta, dy))
    last = [np.moveaxis(each, channel, -1) for each in (x, dy)]
    sets = (x.shape[0], -1, GROUPS, SHAPE[-1] // GROUPS)
    x_sets, dy_sets, scale = (each.reshape(sets) for each in (*last, gamma * np.ones_like(last[0])))
    over = {"axis": (1, 3), "keepdims": True}
    inverse = 1 / np.sqrt(x_sets.var(**over) + EPSILON)
    z, h = (x_sets - x_sets.mean(**over)) * inverse, dy_sets * scale
    dx = inverse * (h - h.mean(**over) - z * (h * z).mean(**over))

    def of_input(each):
        return np.moveaxis(each.reshape(last[0].shape), -1, channel)

    flat = [each.reshape(-1, SHAPE[-1]) for each in (z, dy_sets)]
    y = z.reshape(last[0].shape) * gamma + beta
    return np.moveaxis(y, -1, channel), of_input(dx), (flat[0] * flat[1]).sum(0), flat[1].sum(0)


def main():
    """Check every dtype on both layouts."""
    native = library()
    for name in ("normwise_message", "normwise_instructions"):
        getattr(native, name).restype = ctypes.c_char_p
    for dtype, axis in itertools.product(DTYPES, (-1, 1)):
        check(native, dtype, axis)
    print(f"the library is right, on {native.normwise_instructions().decode()} instructions")


if __name__ == "__main__":
    main()
