"""The kernels: how a norm is computed once its geometry is known.

No other package imports a framework.
"""

import functools
from collections.abc import Callable

from normwise.kernels import composite


@functools.cache
def find(name: str, backend: str) -> Callable:
    """The function that calculates a norm: `name` is that of a dispatch.Choice."""
    if name == "composite":
        return composite.normalize
    module = _module(backend)
    return {"native": module.normalize, "torch": getattr(module, "fused", None)}[name]


@functools.cache
def obstacle(backend: str) -> Callable:
    """The function of x that says why a backend cannot run the native kernels on it, or None."""
    module = _module(backend)
    if module is None:
        return lambda x: f"Keras's backend {backend} cannot call native kernels"
    return module.obstacle


def _module(backend: str):
    """The kernels of a backend, None where it has none of its own."""
    # By statements: torch.compile traces these, and breaks its graph at importlib.
    if backend == "jax":
        from normwise.kernels import jax as module
    elif backend == "tensorflow":
        from normwise.kernels import tensorflow as module
    elif backend == "torch":
        from normwise.kernels import torch as module
    else:
        module = None
    return module
