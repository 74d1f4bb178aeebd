"""The Triton kernels on PyTorch: compiled for a device, launched on its current stream."""

import functools
import operator

import torch

from normwise.kernels import gpu
from normwise.kernels.kernel import Engine
from normwise.norm import Norm

_FORWARD = ("x", "gamma", "beta", "y", "statistics")
_BACKWARD = ("x", "gamma", "beta", "statistics", "dy", "dx", "dgamma", "dbeta")
# What follows them where there is a residual.
_FORWARD_ADDING = ("residual", "sum")
_BACKWARD_ADDING = ("dsum",)
# Of buffers that are one after another in one allocation, in float32.
_APART = 32


@functools.cache
def engine(device: torch.device) -> Engine:
    """The engine of one device."""
    plan = functools.partial(_Plan, device=device)
    return Engine(gpu.NAME, gpu.why_not, None, None, plan, adds=True)


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why no kernel can be launched on a device, or None: Triton compiles its own driver in C."""
    try:
        with _current(device):
            _facts(device)
    except Exception as error:
        return f"Triton cannot drive {device}: {error}"
    return None


@functools.cache
def _facts(device: torch.device):
    """What plans depend on, of a device."""
    from triton.runtime import driver

    from normwise.kernels.gpu.launch import Device

    if gpu.interpreted():
        return Device("cuda", 90, 32, multiprocessors=4)
    target = driver.active.get_current_target()
    properties = torch.cuda.get_device_properties(device)
    return Device(target.backend, target.arch, target.warp_size, properties.multi_processor_count)


class _Plan:
    """A norm of one shape on one device, and its two passes on buffers."""

    def __init__(self, norm: Norm, device: torch.device):
        from normwise.kernels.gpu import plan

        self._facts = _facts(device)
        self._norm, self._device = norm, device
        self._plan = plan
        adds = norm.operands.residual
        names = (*_FORWARD, *_FORWARD_ADDING) if adds else _FORWARD
        self.forward = self._ready(plan.forward(norm, self._facts), names)
        self._backward, self._names = {}, (*_BACKWARD, *_BACKWARD_ADDING) if adds else _BACKWARD

    def backward(self, *buffers):
        """Engine.backward of this norm."""
        # Of dgamma, dbeta, and dsum where there is a residual.
        wanted = tuple([buffer is not None for buffer in buffers[6:]])
        if wanted not in self._backward:
            launches = self._plan.backward(self._norm, self._facts, *wanted)
            self._backward[wanted] = self._ready(launches, self._names)
        self._backward[wanted](*buffers)

    def _ready(self, launches, names):
        kind = _Interpreted if gpu.interpreted() else _Compiled
        return kind(launches, names, self._norm, self._facts, self._device)

    @staticmethod
    def buffers(*tensors):
        """What the passes are called with."""
        if gpu.interpreted():
            return tensors
        return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


class _Interpreted:
    """A pass in Triton's interpreter, on tensors of the CPU."""

    def __init__(self, launches, names, norm, facts, device):
        self._launches, self._names = launches, names

    def __call__(self, *tensors):
        buffers = dict(zip(self._names, tensors, strict=True))
        for name, elements in self._launches.scratch.items():
            # Where a kernel reads what none has written it shows.
            buffers[name] = torch.full((elements,), torch.nan)
        for launch in self._launches.launches:
            launch.kernel[(launch.programs,)](*launch.arguments(buffers))


class _Compiled:
    """A pass whose kernels are compiled, on addresses."""

    def __init__(self, launches, names, norm, facts, device):
        from normwise.kernels.gpu.launch import divided

        self._launches, self._names = launches, (*names, *launches.scratch)
        self._norm, self._facts, self._device = norm, facts, device
        self._offsets, self._scratch = [], 0
        for elements in launches.scratch.values():
            self._offsets.append(4 * self._scratch)
            self._scratch += divided(elements, _APART) * _APART
        self._steps = {}

    def __call__(self, *addresses):
        misaligned = functools.reduce(operator.or_, (a for a in addresses if a is not None)) & 15
        if torch.cuda.current_device() == self._device.index:
            self._launch(addresses, not misaligned)
        else:
            with _current(self._device):
                self._launch(addresses, not misaligned)

    def _launch(self, addresses, aligned):
        if aligned not in self._steps:
            from triton.runtime import driver

            self._stream = driver.active.get_current_stream
            self._steps[aligned] = list(self._compiled(aligned))
        if self._scratch:
            scratch = torch.empty(self._scratch, dtype=torch.float32, device=self._device)
            start = scratch.data_ptr()
            addresses = (*addresses, *[start + offset for offset in self._offsets])
        stream = self._stream(self._device.index)
        for run, places, others in self._steps[aligned]:
            run(*[None if i is None else addresses[i] for i in places], *others, stream=stream)

    def _compiled(self, aligned):
        """Of each launch what is called, which addresses come first, and what follows them."""
        from normwise.kernels.gpu.launch import compiled, dtypes_of

        dtypes = dtypes_of(self._norm)
        for launch in self._launches.launches:
            kernel = compiled(launch, dtypes, self._facts, aligned, self._device.index)
            places = [None if n is None else self._names.index(n) for n in launch.buffers]
            others = (*launch.numbers, *launch.constants.values())
            yield kernel[(launch.programs, 1, 1)], places, others


def _current(device: torch.device):
    """The context in which a device is the current one."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
