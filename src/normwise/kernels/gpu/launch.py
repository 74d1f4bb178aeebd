"""A pass as launches of kernels: what is launched on which buffers, and what it is compiled to.

A kernel's parameters come in this order: the buffers that it reads, those that it writes, numbers,
and constants, which it is compiled for.
"""

import functools
import inspect
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from normwise.norm import Norm

# What loads of 16 bytes need to know of an address, or of a distance between two.
_ALIGNMENT = 16
_TYPES = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


class Device(NamedTuple):
    """What plans depend on.

    Args:
        backend: "cuda" or "hip".
        arch: as Triton names it, 90 or "gfx942".
        warp_size: the threads of a warp, 32 or 64.
        multiprocessors: how many of them there are.
    """

    backend: str
    arch: Any
    warp_size: int
    multiprocessors: int

    @property
    def target(self) -> GPUTarget:
        """The same as Triton's compiler asks for it."""
        return GPUTarget(self.backend, self.arch, self.warp_size)


class Launch(NamedTuple):
    """One launch of a kernel.

    Args:
        kernel: the function that triton.jit made.
        programs: how many run.
        reads, writes: the names of the buffers, None for one that is absent.
        numbers: int and float.
        constants: by their names.
        threads: of a program.
    """

    kernel: Any
    programs: int
    reads: tuple
    writes: tuple
    numbers: tuple
    constants: dict
    threads: int

    @property
    def buffers(self) -> tuple:
        """Their names in the order of the parameters."""
        return self.reads + self.writes

    def arguments(self, buffers: dict) -> list:
        """All arguments in the order of the parameters, for buffers by their names."""
        given = [None if name is None else buffers[name] for name in self.buffers]
        return [*given, *self.numbers, *self.constants.values()]

    def source(self, dtypes: dict, aligned: bool = True) -> ASTSource:
        """What is compiled, for buffers of these dtypes."""
        signature, constants, attributes = {}, {}, {}
        names = self.kernel.arg_names
        values = (*self.buffers, *self.numbers, *self.constants.values())
        for place, (name, value) in enumerate(zip(names, values, strict=True)):
            if isinstance(value, str) and place < len(self.buffers):
                signature[name] = _TYPES[dtypes[value]]
                divisible = aligned
            elif place < len(self.buffers) + len(self.numbers) and value is not None:
                signature[name], divisible = _number(value)
            else:
                signature[name], divisible = "constexpr", False
            if signature[name] == "constexpr":
                constants[name] = value
            elif divisible:
                attributes[(place,)] = [["tt.divisibility", _ALIGNMENT]]
        return ASTSource(self.kernel, signature, constants, attributes)


def _number(value):
    """The type of a number, and whether it is a multiple of the alignment. 1 is compiled in."""
    if isinstance(value, float):
        return "fp32", False
    if value == 1:
        return "constexpr", False
    return "i32" if value < 2**31 else "i64", value % _ALIGNMENT == 0


class Pass(NamedTuple):
    """The forward or the backward pass of a norm: launches, one after another.

    Args:
        launches: in order.
        scratch: float32 buffers between them, the number of elements by the name.
    """

    launches: tuple[Launch, ...]
    scratch: dict[str, int]


_compiled: dict = {}


def compiled(
    launch: Launch,
    dtypes: dict,
    device: Device,
    aligned: bool = True,
    index: int | None = None,
    **options,
):
    """The kernel of a launch as Triton compiles it, once for all launches that are alike.

    Args:
        launch: what is launched.
        dtypes: of the buffers, by their names.
        device: what it is compiled for.
        aligned: whether the buffers' addresses are multiples of 16.
        index: of the device that it is loaded on; each has a copy of its own.
        **options: of Triton's compiler.
    """
    source = launch.source(dtypes, aligned)
    signature = (*source.signature.values(), *source.constants.items(), *source.attrs)
    key = (launch.kernel, signature, launch.threads, device, index, *options.items())
    if key not in _compiled:
        options["num_warps"] = max(1, launch.threads // device.warp_size)
        _compiled[key] = triton.compile(source, target=device.target, options=options)
    return _compiled[key]


@functools.cache
def parameters_of(kernel) -> tuple[list[str], list[str]]:
    """The names of a kernel's buffers and numbers, and those of its constants."""
    parameters = inspect.signature(kernel.fn).parameters
    constants = [name for name, p in parameters.items() if p.annotation is tl.constexpr]
    return [name for name in parameters if name not in constants], constants


def power_of_2(number: int) -> int:
    """The least power of 2 that is not less."""
    return 1 << max(0, number - 1).bit_length()


def divided(number: int, by: int) -> int:
    """The quotient, rounded up."""
    return -(-number // by)


def dtypes_of(norm: Norm) -> dict[str, str]:
    """The dtypes of the buffers of a norm's passes, by their names."""
    like_x = dict.fromkeys(("x", "residual", "sum", "y", "dy", "dsum", "dx"), norm.dtype)
    others = ("gamma", "beta", "dgamma", "dbeta", "statistics", "parts", "sums", "means")
    return {**like_x, **dict.fromkeys(others, norm.arithmetic)}
