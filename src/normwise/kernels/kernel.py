"""What a kernel says of itself, and what an engine is: a kernel that knows no framework."""

import dataclasses
from collections.abc import Callable

from normwise.norm import Norm


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """One way to calculate a norm on one backend.

    Args:
        name: as `normwise.explain` says it.
        why_not: called with a Norm and x; says in words why this kernel cannot calculate it here
            and now, or None. Without an x, which is None, the question is about one on the device
            that the backend would use, outside of a trace.
        run: called with a Norm, x of `norm.x_dtype` and Operands; returns y of `norm.y_dtype`.
        engine: whether it is an engine's, or made of the framework's own operations.
        since: of one that is no engine's, what is said where it is chosen; {} is the reasons
            against the engines.
        is_elsewhere: called with x, or None as `why_not`; whether this kernel is for other devices
            than that of x, which is no reason for another to be chosen.
        adds: called with a Norm, x and a residual of one dtype, which y has too; whether `run`
            takes it here, and then returns the sum as well. Else the sum is made before.

    Example:

    >>> from normwise import kernels
    >>> composite = kernels.listed()[-1]
    >>> composite.name, composite.engine
    ('composite', False)
    """

    name: str
    why_not: Callable
    run: Callable
    engine: bool = True
    since: str = "{}"
    is_elsewhere: Callable = lambda x: False
    adds: Callable = lambda norm, x, residual: False


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
    """A forward and a backward pass over plain buffers, of which a backend makes a Kernel.

    The backend's module in this package brings derivatives of every order, tracing and export.
    A buffer is contiguous, an operand that is absent is None, and results are written in place:

        forward(norm, x, gamma, beta, y, statistics)
        backward(norm, x, gamma, beta, statistics, dy, dx, dgamma, dbeta)

    or with a residual, which one that `adds` is given,

        forward(norm, x, gamma, beta, y, statistics, residual, sum)
        backward(norm, x, gamma, beta, statistics, dy, dx, dgamma, dbeta, dsum)

    where x is the sum in the backward pass, and dsum, which may be None, is added to dx.

    x, y, dy, dx, residual, sum and dsum have `norm.dtype` and the shape of x; gamma, beta and their
    gradients `norm.arithmetic`; so have the statistics, of
    `norm.geometry.statistics_shape(x.shape)`, which belong to the engine between its two passes.
    dgamma or dbeta is None where nobody asks for it.

    Args:
        name: as `normwise.explain` says it.
        why_not: called with a Norm; says why the engine cannot calculate it anywhere, or None. It
            has to look at all of it: `norm.operands` says what comes with x, and `norm.per_sample`
            whether gamma and beta have the batch in front of their shape.
        forward, backward: the passes. Buffers are NumPy arrays, bfloat16 ones of ml_dtypes.
        plan: None, or what gives for a Norm an object whose `forward` and `backward` are the same
            without it; then the buffers are addresses.
        adds: whether the passes take a residual. For one that does not the sum is made before.

    Example:

    >>> def forward(norm, x, gamma, beta, y, statistics):
    ...     y[...] = x - x.mean(-1, keepdims=True)
    >>> engine = Engine("half", lambda norm: None, forward, backward=None)
    >>> engine.name, engine.adds
    ('half', False)
    """

    name: str
    why_not: Callable
    forward: Callable
    backward: Callable
    plan: Callable | None = None
    adds: bool = False


def why_not_operands(norm: Norm, kernels: str) -> str | None:
    """Why kernels that take no mask and no learned epsilon cannot calculate a norm, or None."""
    if norm.operands.mask:
        return f"the {kernels} kernels take no mask"
    if norm.operands.learned_epsilon:
        return f"the {kernels} kernels take no learned epsilon"
    return None
