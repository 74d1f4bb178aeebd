"""The kernels on PyTorch: the native ones, and torch's own fused norms where those cannot go.

The native kernels are called through ctypes from an autograd function: 10 us a call, and 5 without
a gradient, where the same as an op of `torch.library` took 17 to 30, and 10. Traces (torch.compile,
export) see keras.ops or torch's own norms instead, which Inductor fuses and every runtime knows.
"""

import ctypes
import functools
import sys

import torch

from normwise import geometry as geometries
from normwise.geometry import Geometry
from normwise.kernels import composite, library

# Channels last, torch's group norm works along the channels; with fewer than a few vectors of them
# a copy to channels first is sooner done: 0.2 ms for 1.0 at (32, 26, 26, 10), 5 groups.
_FEW_CHANNELS = 32


def obstacle(x) -> str | None:
    """Why the native kernels cannot take `x` here and now, or None."""
    if x.device.type not in ("cpu", "meta"):
        return f"the native kernels run on the CPU, and x is on {x.device}"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "this call is traced, by torch.compile or for an export"
    if type(x) not in (torch.Tensor, torch.nn.Parameter):
        return f"x is a {type(x).__name__}, which has no memory of its own"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms this call, and sees into torch's own functions only"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode derivatives are taken, and only torch's own functions have them"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode watches this call, and sees torch's own functions only"
    return None


def normalize(
    x,
    gamma,
    beta,
    geometry: Geometry,
    *,
    epsilon: float,
    centred: bool,
    activation=library.IDENTITY,
):
    """Normalize every set of `x`, apply gamma and beta, then the activation.

    Args:
        x: float16, bfloat16, float32 or float64 tensor of `geometry.shape`.
        gamma, beta: tensors of `geometry.parameter_shape` and the dtype of the arithmetic, or None.
        geometry: which elements share their statistics; in the order of memory.
        epsilon, centred: as in composite.normalize.
        activation: a library.Activation.

    Returns:
        A tensor of the shape and dtype of x, and of its memory format.
    """
    if x.device.type == "meta":
        return torch.empty_like(x)
    # Then the memory is taken as it lies, in the order of its axes: no element is copied.
    moved = not x.is_contiguous() and geometry.parameter_axes == (1,) and _is_channels_last(x)
    if moved:
        x, geometry = x.movedim(1, -1), _moved(geometry)
    x = x.contiguous()
    gamma, beta = _beside(x, "gamma", gamma), _beside(x, "beta", beta)
    plan = _plan(geometry, x.dtype, epsilon, centred, activation)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gamma, beta)):
        y = _Norm.apply(x, gamma, beta, plan)
    else:
        y, _ = _forward(x, gamma, beta, plan)
    return y.movedim(-1, 1) if moved else y


def fused(x, gamma, beta, geometry: Geometry, *, epsilon: float, centred: bool):
    """Call the fused norm of torch itself; arguments and result are those of composite.normalize.

    Layer norm and RMS norm do as they are: (x - mean) * inv_std, with Welford's moments. Group
    norm calculates x * scale + shift, where at mean 1e4 beta loses half its digits, and channels
    last takes E[x^2] - E[x]^2, where none is left; so it is given x - mean.
    """
    if "groups" in geometry.per:
        return _fused_group_norm(x, gamma, beta, geometry, epsilon)
    functional = torch.nn.functional
    shape = geometry.parameter_shape
    if centred:
        return functional.layer_norm(x, shape, gamma, beta, epsilon)
    if torch.jit.is_tracing():
        # For ONNX, mostly, to which torch 2.13 exports no rms_norm.
        return composite.normalize(x, gamma, beta, geometry, epsilon=epsilon, centred=False)
    y = functional.rms_norm(x, shape, gamma, epsilon)
    return y if beta is None else y + beta


def _fused_group_norm(x, gamma, beta, geometry: Geometry, epsilon: float):
    if gamma is None and beta is not None:
        # torch 2.13's backward of beta alone fails: "tensor does not have a device".
        gamma = torch.ones_like(beta)
    (channel,) = geometry.parameter_axes
    # Any shift leaves y as it is, so no gradient need pass through this one.
    mean = composite.total(x.detach(), geometry) / composite.set_size(x, geometry)
    deviation = (x - mean).movedim(channel, 1)
    if deviation.shape[1] < _FEW_CHANNELS:
        deviation = deviation.contiguous()
    return torch.group_norm(deviation, geometry.groups, gamma, beta, epsilon).movedim(1, channel)


class _Plan:
    """One norm of one shape, as the library reads it."""

    def __init__(self, geometry, dtype, epsilon, centred, activation):
        self.geometry, self.activation = geometry, activation
        self.options = {"epsilon": epsilon, "centred": centred}
        self.arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
        self.statistics_shape = library.layout(geometry).statistics_shape(geometry.shape)
        name = str(dtype).removeprefix("torch.")
        self.norm = library.norm(geometry, name, activation=activation, **self.options)
        self.address = ctypes.addressof(self.norm)
        native = _library()
        self.forward, self.backward = native.normwise_forward, native.normwise_backward


@functools.cache
def _library():
    """The library, on the threads that torch's own functions run on where those are OpenMP's."""
    native = library.load()
    if sys.platform != "win32" and "OpenMP" in torch.__config__.parallel_info():
        # Where torch's OpenMP is not GCC's the name may be missing, and the library's pool serves.
        parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
        if parallel is not None:
            native.normwise_use_openmp(ctypes.cast(parallel, ctypes.c_void_p))
    return native


@functools.lru_cache(maxsize=1024)
def _plan(geometry, dtype, epsilon, centred, activation) -> _Plan:
    return _Plan(geometry, dtype, epsilon, centred, activation)


@functools.lru_cache(maxsize=1024)
def _moved(geometry: Geometry) -> Geometry:
    """The geometry of the same norm after its axis 1 became the last."""
    shape = (geometry.shape[0], *geometry.shape[2:], geometry.shape[1])
    if "groups" in geometry.per:
        return geometries.group(shape, -1, geometry.groups)
    return geometries.layer(shape, -1)


def _beside(x, name: str, parameter):
    """Gamma or beta in one piece, if it is where x is: the kernels are given its address."""
    if parameter is None:
        return None
    if parameter.device != x.device:
        raise ValueError(
            f"{name} is on {parameter.device}, and x on {x.device}; move one to the other, as in "
            f"{name}.to(x.device)"
        )
    return parameter.contiguous()


def _is_channels_last(x) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim])


def _pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def _forward(x, gamma, beta, plan: _Plan):
    plan.norm.threads = torch.get_num_threads()
    y = torch.empty_like(x)
    # Where x is: the default device may be another one.
    statistics = torch.empty(plan.statistics_shape, dtype=plan.arithmetic, device=x.device)
    plan.forward(
        plan.address,
        x.data_ptr(),
        _pointer(gamma),
        _pointer(beta),
        y.data_ptr(),
        statistics.data_ptr(),
    )
    return y, statistics


def _is_batch(dy) -> bool:
    """Whether `dy` is many in one, for many backward passes at a time.

    The first kind is torch.func.vmap's, the second that of torch.autograd: is_grads_batched=True,
    and jacobian(vectorize=True).
    """
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(dy) or functorch.is_legacy_batchedtensor(dy)


def _backward(x, gamma, beta, dy, statistics, plan: _Plan):
    plan.norm.threads = torch.get_num_threads()
    dy = dy.contiguous()
    dx = torch.empty_like(x)
    dgamma = None if gamma is None else torch.empty_like(gamma)
    dbeta = None if beta is None else torch.empty_like(beta)
    plan.backward(
        plan.address,
        x.data_ptr(),
        _pointer(gamma),
        _pointer(beta),
        statistics.data_ptr(),
        dy.data_ptr(),
        dx.data_ptr(),
        _pointer(dgamma),
        _pointer(dbeta),
    )
    return dx, dgamma, dbeta


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta, plan):
        y, statistics = _forward(x, gamma, beta, plan)
        ctx.save_for_backward(x, gamma, beta, statistics)
        ctx.plan = plan
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gamma, beta, statistics = ctx.saved_tensors
        if _is_batch(dy):
            return *_composite_backward(x, gamma, beta, dy, ctx.plan), None
        # An autograd function costs 10 us, and only a graph of the gradients needs this one.
        gradient = _NormGradient.apply if torch.is_grad_enabled() else _backward
        return *gradient(x, gamma, beta, dy, statistics, ctx.plan), None


class _NormGradient(torch.autograd.Function):
    """The gradients of sum(y * dy) by x, gamma and beta, themselves differentiable."""

    @staticmethod
    def forward(ctx, x, gamma, beta, dy, statistics, plan):
        dx, dgamma, dbeta = _backward(x, gamma, beta, dy, statistics, plan)
        ctx.save_for_backward(x, gamma, beta, dy)
        ctx.plan = plan
        return dx, dgamma, dbeta

    @staticmethod
    def backward(ctx, *cotangents):
        """Through the composite: the same function, in operations that torch can differentiate."""
        plan, further = ctx.plan, torch.is_grad_enabled()
        with torch.enable_grad():
            # Views of what has a history, so that gradients of yet higher order find it.
            x, gamma, beta, dy = inputs = [_variable(t) for t in ctx.saved_tensors]
            first = _composite_backward(x, gamma, beta, dy, plan)
            options = {"create_graph": further, "materialize_grads": True}
            second = _gradients(first, inputs, cotangents, **options)
        return *second, None, None


def _composite_backward(x, gamma, beta, dy, plan: _Plan):
    """_backward in operations of torch, which can be differentiated and take a batch of dy."""
    with torch.enable_grad():
        x, gamma, beta = inputs = [_variable(t) for t in (x, gamma, beta)]
        y = composite.normalize(x.to(plan.arithmetic), gamma, beta, plan.geometry, **plan.options)
        y = plan.activation.function(y).to(x.dtype)
        return _gradients([y], inputs, [dy], create_graph=True)


def _gradients(outputs, inputs, cotangents, **options):
    """torch.autograd.grad, where outputs may be None, and inputs, whose gradients are None too."""
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o is not None]
    outputs, cotangents = zip(*pairs, strict=True)
    given = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(outputs, given, cotangents, **options))
    return [t if t is None else next(found) for t in inputs]


def _variable(tensor):
    """The tensor as one to take gradients by, with the history that it has."""
    if tensor is None:
        return None
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
