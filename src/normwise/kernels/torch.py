"""The kernels on PyTorch: engines, and torch's own fused norms where those cannot go.

An engine is called from an autograd function, which costs less than an op of `torch.library`.
Traces (torch.compile, export) see keras.ops or torch's own norms instead, which Inductor fuses and
every runtime knows.
"""

import ctypes
import dataclasses
import functools
import sys

import keras
import ml_dtypes
import torch
from torch.autograd import forward_ad

from normwise import geometry as geometries
from normwise.geometry import Geometry
from normwise.kernels import composite, cpu, gpu, library, private, torch_gpu, torch_op
from normwise.kernels.kernel import Engine, Kernel
from normwise.norm import Norm, Operands

# Channels last, torch's group norm works along the channels; with fewer than a few vectors of them
# a copy to channels first is sooner done.
_FEW_CHANNELS = 32

# With fewer elements torch's own norms of trailing axes, as Inductor compiles them, take less time
# than an operator, and those without a mean always: docs/kernels.md has the times.
_WORTH_AN_OPERATOR = 2**20

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)

_EXPORTED = "this call is traced for an export, and runs without normwise then"
_LACKS = private.missing(private.TORCH)
_interpreter, _, _modes = (private.find(name.path) for name in private.TORCH.values())


def kernel_of(engine: Engine) -> Kernel:
    """A kernel of an engine for tensors of the CPU, differentiable to any order."""

    def why_not(norm, x):
        x = _asked_about(x)
        if not (x.is_cpu or x.is_meta):
            return f"the {engine.name} kernels run on the CPU, and x does not lie there"
        if torch.compiler.is_compiling():
            return engine.why_not(norm) or _why_not_compiled(engine, norm, x)
        return engine.why_not(norm) or _why_not_here(x)

    def run(norm, x, operands):
        return _run(engine, norm, x, operands)

    def adds(norm, x, residual):
        return engine.adds and _adds_here(x, residual)

    return Kernel(engine.name, why_not, run, is_elsewhere=_is_off_cpu, adds=adds)


def _why_not_compiled(engine: Engine, norm: Norm, x) -> str | None:
    """Why torch.compile cannot have an engine of the CPU in its graph, or better not, or None."""
    if (reason := _why_not_traced()) is not None:
        return reason
    if engine is not cpu.ENGINE:
        return f"torch.compile traces this call, and knows no {engine.name} kernels"
    few = x.numel() < _WORTH_AN_OPERATOR
    if norm.geometry.trailing and (few or not norm.subtract_mean):
        return "torch.compile makes faster code of its own for this norm of trailing axes"
    return None


def _asked_about(x):
    """The tensor itself, or one where Keras puts its tensors."""
    return keras.ops.zeros((1,)) if x is None else x


def _is_off_cpu(x) -> bool:
    x = _asked_about(x)
    return not (x.is_cpu or x.is_meta)


def _is_off_gpu(x) -> bool:
    x = _asked_about(x)
    return not (x.is_cuda or (gpu.interpreted() and x.is_cpu))


def _why_not_on_gpu(norm: Norm, x) -> str | None:
    """Why the Triton kernels cannot take `x` here and now, or None."""
    x = _asked_about(x)
    if _is_off_gpu(x):
        return "the Triton kernels run on a GPU, and x does not lie there"
    if torch.compiler.is_compiling():
        return gpu.why_not(norm) or _why_not_traced() or _why_not_driven(x.device)
    return gpu.why_not(norm) or _why_not_here(x) or torch_gpu.why_not(x.device)


def _why_not_driven(device) -> str | None:
    return torch_gpu.why_not(device)


# As of `_why_not_traced`: what is asked is no part of a graph.
_why_not_driven._dynamo_marked_constant = True


def _run_on_gpu(norm: Norm, x, operands: Operands):
    return _run(torch_gpu.engine(x.device), norm, x, operands)


def _why_not_here(x) -> str | None:
    """Why no engine can take `x` here and now, or None."""
    if _LACKS is not None:
        return _LACKS
    if torch.jit.is_tracing():
        return _EXPORTED
    if type(x) not in _PLAIN_TYPES:
        return f"x is a {type(x).__name__}, which has no memory of its own"
    if (reason := _transformed()) is not None:
        return reason
    if _modes() and _is_recorded():
        return "a graph of this call is recorded, and knows torch's own functions only"
    return None


def _why_not_traced() -> str | None:
    """Why a graph of torch.compile or torch.export cannot have an operator here, or None."""
    if _LACKS is not None:
        return _LACKS
    return _EXPORTED if torch.compiler.is_exporting() else _transformed()


# Dynamo is to ask this and to keep the answer: it transforms what it traces, but traces no question
# whether it does so, and in torch 2.11 takes every trace for an export. It is what
# `torch.compiler.assume_constant_result` does, which would import all of Dynamo.
_why_not_traced._dynamo_marked_constant = True


def _transformed() -> str | None:
    """Why a call cannot be an engine's that torch takes derivatives of by other means, or None."""
    if _interpreter() is not None:
        return "torch.func transforms this call, and sees into torch's own functions only"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are taken, and only torch's own functions have them"
    return None


def _is_recorded() -> bool:
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


def _adds_here(x, residual) -> bool:
    """Whether an engine's passes can be given this residual: the operators know none."""
    return (
        type(residual) in _PLAIN_TYPES
        and residual.device == x.device
        and not (x.is_meta or torch.compiler.is_compiling())
    )


def _run(engine: Engine, norm: Norm, x, operands: Operands):
    """The result, and with a residual the sum."""
    y_dtype, residual = norm.y_dtype, operands.residual
    if norm.x_dtype != y_dtype:
        x, norm = x.to(getattr(torch, norm.dtype)), norm.uniform
    if x.is_meta:
        return torch.empty_like(x, dtype=getattr(torch, y_dtype))
    # Then the memory is taken as it lies, in the order of its axes: no element is copied.
    moved = not x.is_contiguous() and _takes_channels(norm.geometry) and _is_channels_last(x)
    if moved:
        x, norm = x.movedim(1, -1), _moved(norm)
        residual = residual if residual is None else residual.movedim(1, -1)
    if torch.compiler.is_compiling():
        y = torch_op.run(norm, x, operands)
    else:
        y = _run_now(engine, norm, x, operands._replace(residual=residual))
    if residual is not None:
        return tuple(each.movedim(-1, 1) for each in y) if moved else y
    if moved:
        y = y.movedim(-1, 1)
    return y if norm.y_dtype == y_dtype else y.to(getattr(torch, y_dtype))


def _run_now(engine: Engine, norm: Norm, x, operands: Operands):
    x = _plain(x)
    gamma, beta = _beside(x, "gamma", operands.gamma), _beside(x, "beta", operands.beta)
    residual = operands.residual if operands.residual is None else _plain(operands.residual)
    call = _call(engine, norm)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (gamma is not None and gamma.requires_grad)
        or (beta is not None and beta.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return _Function.apply(x, gamma, beta, residual, call)
    y, _, total = call.forward(x, gamma, beta, residual)
    return y if total is None else (y, total)


class _Call:
    """A norm of one shape on one engine: its passes on tensors."""

    def __init__(self, engine: Engine, norm: Norm):
        self.norm = norm
        if engine.plan is None:
            self.buffers = _arrays
            self.on_buffers = lambda *arrays: engine.forward(norm, *arrays)
            self.back_on_buffers = lambda *arrays: engine.backward(norm, *arrays)
        else:
            plan = engine.plan(norm)
            self.buffers = getattr(plan, "buffers", _addresses)
            self.on_buffers, self.back_on_buffers = plan.forward, plan.backward
        self.arithmetic = getattr(torch, norm.arithmetic)
        self.statistics_shape = norm.geometry.statistics_shape(norm.geometry.shape)

    def forward(self, x, gamma, beta, residual=None):
        """The result, the statistics that the backward pass needs, and the sum or None."""
        if _modes():
            # A mode sees torch's own functions only. What is saved for the backward pass is the
            # same as without one, since a checkpoint may be taken under a mode and resumed without.
            total = None if residual is None else x + residual
            x = x if total is None else total
            y = composite.run(self.norm, x, Operands(gamma, beta))
            return y.contiguous(), composite.statistics(self.norm, x), total
        y = torch.empty_like(x)
        # Where x is: the default device may be another one.
        statistics = torch.empty(self.statistics_shape, dtype=self.arithmetic, device=x.device)
        if residual is None:
            self.on_buffers(*self.buffers(x, gamma, beta, y, statistics))
            return y, statistics, None
        total = torch.empty_like(x)
        self.on_buffers(*self.buffers(x, gamma, beta, y, statistics, residual, total))
        return y, statistics, total

    def backward(self, x, gamma, beta, dy, statistics, needs, dsum=None):
        """The gradients by x, gamma and beta, each None where it is not needed.

        With a residual x is the sum, whose own gradient is dsum or None.
        """
        if _modes():
            return _seen_backward(self.norm, x, gamma, beta, dy, needs, dsum)
        dy = _plain(dy)
        dx = torch.empty_like(x)
        dgamma = torch.empty_like(gamma) if needs[1] else None
        dbeta = torch.empty_like(beta) if needs[2] else None
        tensors = (x, gamma, beta, statistics, dy, dx, dgamma, dbeta)
        if self.norm.operands.residual:
            tensors = (*tensors, dsum if dsum is None else _plain(dsum))
        self.back_on_buffers(*self.buffers(*tensors))
        return dx if needs[0] else None, dgamma, dbeta


_call = functools.lru_cache(maxsize=1024)(_Call)


def _call_compiled(norm: Norm, x):
    """What an operator in a compiled graph does with x."""
    on_gpu = x.is_cuda or gpu.interpreted()
    return _call(torch_gpu.engine(x.device) if on_gpu else cpu.ENGINE, norm)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta, residual, call):
        y, statistics, total = call.forward(x, gamma, beta, residual)
        ctx.call = call
        if total is None:
            ctx.save_for_backward(x, gamma, beta, statistics)
            return y
        ctx.save_for_backward(total, gamma, beta, statistics)
        # One of the two may have no gradient, and zeros take as long as another pass.
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx, dy, dsum=None):
        if dy is None:
            return dsum, None, None, dsum, None
        x, gamma, beta, statistics = ctx.saved_tensors
        of_x, *others, of_residual, _ = ctx.needs_input_grad
        call, needs = ctx.call, (of_x or of_residual, *others)
        try:
            dy.data_ptr()
            seen = forward_ad._current_level >= 0
        except RuntimeError:  # many in one, of vmap or is_grads_batched, which have no address
            seen = True
        tensors = (x, gamma, beta, dy, statistics)
        if seen:
            dx, *found = _seen_backward(call.norm, *tensors[:4], needs, dsum)
        elif torch.is_grad_enabled():
            # An autograd function costs as much as a small norm, and only a graph of the gradients
            # needs this one.
            dx, *found = _Gradient.apply(*tensors, needs, call)
            dx = dx if dsum is None or dx is None else dx + dsum
        else:
            dx, *found = call.backward(*tensors, needs, dsum)
        return dx, *found, dx if of_residual else None, None


class _Gradient(torch.autograd.Function):
    """The gradients of sum(y * dy) by x, gamma and beta, themselves differentiable."""

    @staticmethod
    def forward(ctx, x, gamma, beta, dy, statistics, needs, call):
        ctx.save_for_backward(x, gamma, beta, dy)
        ctx.call, ctx.needs = call, needs
        return call.backward(x, gamma, beta, dy, statistics, needs)

    @staticmethod
    def backward(ctx, *cotangents):
        """Through the composite: the same function, in operations that torch can differentiate."""
        further = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = [_variable(t) for t in ctx.saved_tensors]
            first = _seen_backward(ctx.call.norm, *inputs, ctx.needs)
            wanted = [t if n else None for t, n in zip(inputs, ctx.needs_input_grad, strict=False)]
            options = {"create_graph": further, "materialize_grads": True}
            second = _gradients(first, wanted, cotangents, **options)
        return *second, None, None, None


def _seen_backward(norm: Norm, x, gamma, beta, dy, needs, dsum=None):
    """The backward pass in operations of torch, differentiable and for many dy at a time."""
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        # What needs a gradient has a history; views of it, so that this graph ends there.
        inputs = [t.view_as(t) if n else t for t, n in zip((x, gamma, beta), needs, strict=True)]
        y = composite.run(norm, inputs[0], Operands(*inputs[1:]))
        wanted = [t if n else None for t, n in zip(inputs, needs, strict=True)]
        dx, *found = _gradients([y], wanted, [dy], create_graph=further)
        return [dx if dsum is None or dx is None else dx + dsum, *found]


def _gradients(outputs, inputs, cotangents, **options):
    """torch.autograd.grad, where outputs may be None, and inputs, whose gradients are None too.

    An output may be a constant: beta's gradient is one of dy alone.
    """
    pairs = [
        (o, c)
        for o, c in zip(outputs, cotangents, strict=True)
        if o is not None and o.requires_grad
    ]
    given = [t for t in inputs if t is not None]
    if not pairs:
        return [t if t is None else torch.zeros_like(t) for t in inputs]
    outputs, cotangents = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, given, cotangents, **options))
    return [t if t is None else next(found) for t in inputs]


def _variable(tensor):
    """A view of the tensor where it has a history, so that derivatives by it end there."""
    if tensor is None or not tensor.requires_grad:
        return tensor
    return tensor.view_as(tensor)


def _plain(tensor):
    """The tensor in one piece, with memory that holds its values.

    A tensor of zeros alone has none, and one with the negative bit holds the values' negatives.
    """
    tensor = tensor.contiguous()
    if tensor.data_ptr() and not tensor.is_neg():
        return tensor
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} has no memory any more, for its storage was "
            "freed, as by resize_(0); give a norm tensors whose storage is there"
        )
    return tensor.clone()


def _beside(x, name: str, parameter):
    """Gamma or beta in one piece, if it is where x is: an engine is given its address."""
    if parameter is None:
        return None
    if parameter.device != x.device:
        raise ValueError(
            f"{name} is on {parameter.device}, and x on {x.device}; move one to the other, as in "
            f"{name}.to(x.device)"
        )
    return _plain(parameter)


@functools.lru_cache(maxsize=1024)
def _moved(norm: Norm) -> Norm:
    """The same norm after axis 1 of its input became the last."""
    geometry = norm.geometry
    shape = (geometry.shape[0], *geometry.shape[2:], geometry.shape[1])
    if "groups" in geometry.per:
        return norm.of(geometries.group(shape, -1, geometry.groups))
    return norm.of(geometries.layer(shape, -1))


def _takes_channels(geometry: Geometry) -> bool:
    """Whether gamma and beta span axis 1, of samples that are normalized each by itself."""
    return geometry.parameter_axes == (1,) and "outer" in geometry.per


def _is_channels_last(x) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim])


def _array(tensor):
    """A NumPy array of the tensor's memory."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _arrays(*tensors):
    return map(_array, tensors)


def _addresses(*tensors):
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _native() -> Kernel:
    """The library's kernel, on the threads that torch's own functions run on."""
    cpu.most_threads = torch.get_num_threads
    library.after_loading.append(_share_threads)
    return kernel_of(cpu.ENGINE)


def _share_threads(native):
    """Give the library the threads of OpenMP, where torch's own functions run on those."""
    if sys.platform != "win32" and "OpenMP" in torch.__config__.parallel_info():
        # Where torch's OpenMP is not GCC's the name may be missing, and the library's pool serves.
        parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
        if parallel is not None:
            native.normwise_use_openmp(ctypes.cast(parallel, ctypes.c_void_p))


def _run_composite(norm: Norm, x, operands: Operands):
    differentiable = torch.is_grad_enabled()
    return (composite.run if differentiable else composite.run_for_inference)(norm, x, operands)


def _why_not_fused(norm: Norm, x) -> str | None:
    """Why torch's own fused norms are wrong for this one, or None."""
    geometry, operands = norm.geometry, norm.operands
    if operands.mask or operands.learned_epsilon:
        return "torch's own norms take no mask and no learned epsilon"
    if norm.per_sample:
        return "torch's own norms take one gamma and one beta for all samples"
    if norm.epsilon < composite.SMALLEST[norm.arithmetic]:
        return "torch's own norms give NaN for equal elements at epsilon 0"
    if 0 in geometry.shape:
        return "torch's own norms give NaN gradients for empty inputs"
    if geometry.trailing or (norm.subtract_mean and geometry.per == ("outer", "groups")):
        return None
    return "torch's own norms know trailing axes, and groups of channels less their mean"


def _run_fused(norm: Norm, x, operands: Operands):
    return composite.run(norm, x, operands, how=_fused)


def _fused(norm: Norm, x, operands: Operands):
    """Call the fused norm of torch itself; arguments and result are those of composite.normalize.

    Layer norm and RMS norm do as they are: (x - mean) * inv_std, with Welford's moments. Group
    norm calculates x * scale + shift, where at mean 1e4 beta loses half its digits, and channels
    last takes E[x^2] - E[x]^2, where none is left; so it is given x - mean.
    """
    geometry, gamma, beta = norm.geometry, operands.gamma, operands.beta
    if not geometry.trailing:
        return _fused_group_norm(x, gamma, beta, geometry, norm.epsilon)
    functional = torch.nn.functional
    # Where a program is exported an extent may be a symbol, which x has.
    known = zip(geometry.parameter_axes, geometry.parameter_shape, strict=True)
    shape = [x.shape[axis] if extent is None else extent for axis, extent in known]
    if norm.subtract_mean:
        return functional.layer_norm(x, shape, gamma, beta, norm.epsilon)
    if torch.jit.is_tracing():
        # For ONNX, mostly, to which torch 2.13 exports no rms_norm.
        return composite.normalize(norm, x, operands)
    y = functional.rms_norm(x, shape, gamma, norm.epsilon)
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


def _engines() -> tuple[Kernel, ...]:
    """Those of the CPU and of GPUs, of which the one that will have most calls is asked first."""
    native, on_gpu = (
        _native(),
        Kernel(
            gpu.NAME,
            _why_not_on_gpu,
            _run_on_gpu,
            is_elsewhere=_is_off_gpu,
            adds=lambda norm, x, residual: _adds_here(x, residual),
        ),
    )
    first = gpu.interpreted() or torch.cuda.is_available()
    return (on_gpu, native) if first else (native, on_gpu)


torch_op.implement(_call_compiled, _beside)


def accelerator() -> str | None:
    """The current GPU's name, None where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


KERNELS = (
    *_engines(),
    Kernel("torch", _why_not_fused, _run_fused, False, since="torch's own fused norm, since {}"),
    dataclasses.replace(composite.COMPOSITE, run=_run_composite),
)
