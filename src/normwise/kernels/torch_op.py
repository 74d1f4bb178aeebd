"""The engines as operators of torch.library, which torch.compile keeps whole in its graphs.

In eager an autograd function costs less, and has the derivatives of higher order; a compiled graph
asks for the first alone.
"""

import functools

import torch

from normwise.activations import Activation
from normwise.geometry import Geometry
from normwise.norm import PER_SAMPLE, SHARED, Norm, Operands

_TENSORS = "Tensor x, Tensor? gamma, Tensor? beta"
_LIBRARY = torch.library.Library("normwise", "DEF")
# The numbers that a graph may keep open, and the rest as `_text` has it: the dispatcher takes a
# microsecond for each argument.
_NORM = "str norm, SymInt groups, float epsilon, float slope"
_LIBRARY.define(f"forward({_TENSORS}, {_NORM}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"backward({_TENSORS}, Tensor dy, Tensor statistics, bool[] needs, {_NORM}) "
    "-> (Tensor, Tensor, Tensor)"
)


def run(norm: Norm, x, operands: Operands):
    """The result of the operator, for x of `norm.dtype`."""
    gamma, beta, *_ = operands
    described = _text(norm), norm.geometry.groups, norm.epsilon, norm.activation.slope
    if torch.is_grad_enabled():
        return _Function.apply(x, gamma, beta, *described)
    return torch.ops.normwise.forward(x, gamma, beta, *described)[0]


class _Function(torch.autograd.Function):
    """The operators' derivative, which Dynamo writes into its graph.

    `torch.library.register_autograd` would put it into every call, where it takes longer than a
    small norm.
    """

    @staticmethod
    def forward(ctx, x, gamma, beta, *norm):
        y, statistics = torch.ops.normwise.forward(x, gamma, beta, *norm)
        ctx.save_for_backward(x, gamma, beta, statistics)
        ctx.norm = norm
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gamma, beta, statistics = ctx.saved_tensors
        needs = [p is not None and p.requires_grad for p in (gamma, beta)]
        found = torch.ops.normwise.backward(x, gamma, beta, dy, statistics, needs, *ctx.norm)
        dx, dgamma, dbeta = found
        none = [None] * len(ctx.norm)
        return dx, dgamma if needs[0] else None, dbeta if needs[1] else None, *none


def implement(call_of, beside):
    """Have the operators do what an engine does.

    Args:
        call_of: gives for a Norm and x an object with both passes.
        beside: gives for x, a name and a parameter the latter in one piece, where it is beside x.
    """

    def forward(x, gamma, beta, *norm):
        x = beside(x, "x", x)
        gamma, beta = beside(x, "gamma", gamma), beside(x, "beta", beta)
        y, statistics, _ = call_of(_norm(x, gamma, beta, norm), x).forward(x, gamma, beta)
        return y, statistics

    def backward(x, gamma, beta, dy, statistics, needs, *norm):
        x = beside(x, "x", x)
        gamma, beta = beside(x, "gamma", gamma), beside(x, "beta", beta)
        call = call_of(_norm(x, gamma, beta, norm), x)
        found = call.backward(x, gamma, beta, dy, statistics, (True, *needs))
        # An operator has no result that is None.
        return tuple(x.new_empty(0) if each is None else each for each in found)

    for key in ("CPU", "CUDA"):
        _LIBRARY.impl("forward", forward, key)
        _LIBRARY.impl("backward", backward, key)


def _text(norm: Norm) -> str:
    """What is fixed in a graph: the norm but for its numbers, and the extents and dtype of x."""
    geometry = norm.geometry
    outer_end, before_end, channels_end = geometry.ends
    flags = f"{int(geometry.keeps_after)} {int(norm.subtract_mean)} {int(norm.per_sample)}"
    return f"{outer_end} {before_end} {channels_end} {flags} {norm.activation.name}"


def _parsed(text: str) -> tuple[tuple[int, int, int], bool, bool, bool, str]:
    """What `_text` wrote: the ends, three facts of the norm and the activation's name."""
    *numbers, activation = text.split()
    *ends, keeps_after, subtract_mean, per_sample = map(int, numbers)
    return tuple(ends), bool(keeps_after), bool(subtract_mean), bool(per_sample), activation


def _norm(x, gamma, beta, norm) -> Norm:
    return _norm_of(tuple(x.shape), x.dtype, gamma is not None, beta is not None, *norm)


@functools.lru_cache(maxsize=1024)
def _norm_of(shape, dtype, has_gamma, has_beta, text, groups, epsilon, slope) -> Norm:
    ends, keeps_after, subtract_mean, per_sample, activation = _parsed(text)
    per = ("outer", "after" if keeps_after else "groups")
    name = str(dtype).removeprefix("torch.")
    lies = PER_SAMPLE if per_sample else SHARED
    return Norm(
        Geometry(shape, ends, groups, per),
        name,
        name,
        epsilon,
        subtract_mean,
        Activation(activation, slope),
        Operands(lies if has_gamma else None, lies if has_beta else None),
    )


@torch.library.register_fake("normwise::forward", lib=_LIBRARY)
def _(x, gamma, beta, norm, groups, epsilon, slope):
    (outer_end, _, channels_end), keeps_after, *_ = _parsed(norm)
    kept = x.shape[channels_end:] if keeps_after else (groups,)
    arithmetic = torch.float64 if x.dtype == torch.float64 else torch.float32
    statistics = x.new_empty((*x.shape[:outer_end], 2, *kept), dtype=arithmetic)
    return x.new_empty(x.shape), statistics


@torch.library.register_fake("normwise::backward", lib=_LIBRARY)
def _(x, gamma, beta, dy, statistics, needs, *norm):
    parameters = (
        p.new_empty(p.shape) if needed else x.new_empty(0)
        for p, needed in zip((gamma, beta), needs, strict=True)
    )
    return x.new_empty(x.shape), *parameters
