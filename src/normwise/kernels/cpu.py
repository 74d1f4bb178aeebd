"""The engine of the CPU: the native library through its C interface, csrc/normwise.h."""

import ctypes
import functools
import struct

from normwise import activations
from normwise.geometry import Geometry
from normwise.kernels import library
from normwise.kernels.kernel import Engine, why_not_operands
from normwise.norm import PER_SAMPLE, SHARED, Norm, Operands

# As enum NormwiseDtype.
DTYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
_INVALID = 1  # of enum NormwiseStatus


class Description(ctypes.Structure):
    """struct NormwiseNorm: a norm, whatever the extents of its input are."""

    _fields_ = (
        ("size", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("outer_end", "before_end", "channels_end")),
        ("keeps_after", ctypes.c_int32),
        ("groups", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("subtract_mean", "activation")),
        *((name, ctypes.c_double) for name in ("epsilon", "slope")),
        *((name, ctypes.c_int32) for name in ("per_sample", "reserved")),
    )


# struct NormwiseOperands: its size, the extents of x, rank, dtype, threads, nothing, the tensors.
_OPERANDS = struct.Struct("QQiiii12Q")


def why_not(norm: Norm) -> str | None:
    """Why the library cannot calculate this norm anywhere, or None."""
    if (reason := why_not_operands(norm, "native")) is not None:
        return reason
    if library.missing() is not None:
        return library.missing()
    if norm.geometry.permutation is not None:
        return "the sets are not neighbouring axes"
    if norm.dtype not in DTYPES:
        return f"{norm.dtype} has no native kernel"
    return None


def describe(norm: Norm) -> Description:
    """What the library is told of a norm before its input is known."""
    geometry = norm.geometry
    return Description(
        ctypes.sizeof(Description),
        *geometry.ends,
        geometry.keeps_after,
        geometry.groups,
        norm.subtract_mean,
        norm.activation.code,
        norm.epsilon,
        norm.activation.slope,
        norm.per_sample,
    )


def norm_of(description: bytes, shape, dtype: str, has_gamma: bool, has_beta: bool) -> Norm:
    """The norm of a description: the inverse of `describe`, for an x of this shape and dtype."""
    known = Description.from_buffer_copy(description)
    ends = (known.outer_end, known.before_end, known.channels_end)
    per = ("outer", "after") if known.keeps_after else ("outer", "groups")
    lies = PER_SAMPLE if known.per_sample else SHARED
    return Norm(
        Geometry(tuple(shape), ends, known.groups, per),
        dtype,
        dtype,
        known.epsilon,
        bool(known.subtract_mean),
        activations.Activation(activations.NAMES[known.activation], known.slope),
        Operands(lies if has_gamma else None, lies if has_beta else None),
    )


class _Plan:
    """A norm of one shape as the library reads it, and its two passes on addresses."""

    def __init__(self, norm: Norm):
        self.description = describe(norm)
        self.address = ctypes.addressof(self.description)
        shape = norm.geometry.shape
        self.extents = (ctypes.c_int64 * len(shape))(*shape)
        size, extents = _OPERANDS.size, ctypes.addressof(self.extents)
        self.head = (size, extents, len(shape), DTYPES[norm.dtype])
        native = library.load()
        self.native_forward = native.normwise_forward
        self.native_backward = native.normwise_backward

    def forward(self, x, gamma, beta, y, statistics, residual=0, total=0):
        """Engine.forward of this norm."""
        tensors = (x, gamma or 0, beta or 0, y, statistics, 0, 0, 0, 0, residual, total, 0)
        operands = _OPERANDS.pack(*self.head, most_threads(), 0, *tensors)
        if status := self.native_forward(self.address, operands):
            _fail(status)

    def backward(self, x, gamma, beta, statistics, dy, dx, dgamma, dbeta, dsum=None):
        """Engine.backward of this norm."""
        gradients = (dy, dx, dgamma or 0, dbeta or 0, 0, 0, dsum or 0)
        tensors = (x, gamma or 0, beta or 0, 0, statistics, *gradients)
        operands = _OPERANDS.pack(*self.head, most_threads(), 0, *tensors)
        if status := self.native_backward(self.address, operands):
            _fail(status)


plan = functools.lru_cache(maxsize=1024)(_Plan)


def most_threads() -> int:
    """The most threads that a call may use, 0 for as many as there are; a framework may set it."""
    return 0


def _fail(status: int):
    message = library.load().normwise_message().decode()
    raise (ValueError if status == _INVALID else MemoryError)(f"the native kernels: {message}")


ENGINE = Engine(
    "native",
    why_not,
    lambda norm, *addresses: plan(norm).forward(*addresses),
    lambda norm, *addresses: plan(norm).backward(*addresses),
    plan=plan,
    adds=True,
)
