"""The kernels: how a norm is computed once it is known what it is.

A backend has a list of them, the best first. Whoever has an engine adds it in front:

>>> import numpy as np
>>> from normwise import kernels
>>> def forward(norm, x, gamma, beta, y, statistics):
...     y[...] = x - x.mean(-1, keepdims=True)
>>> engine = kernels.Engine("half", lambda norm: None, forward, backward=None)
>>> kernels.add(engine)
>>> [kernel.name for kernel in kernels.listed()][0]
'half'
>>> kernels.remove("half")

No other package imports a framework.
"""

import functools

import keras

from normwise.kernels import composite
from normwise.kernels.kernel import Engine, Kernel

__all__ = ["Engine", "Kernel", "accelerator", "add", "listed", "remove"]

_added: tuple[Kernel, ...] = ()
_listed: tuple[Kernel, ...] = ()


def listed() -> tuple[Kernel, ...]:
    """The kernels of Keras's backend, in the order in which they are asked.

    Example:

    >>> [kernel.name for kernel in listed()][-1]
    'composite'
    """
    global _listed
    if not _listed:
        _listed = _added + _own()
    return _listed


def add(engine: Engine) -> None:
    """Have Keras's backend ask an engine before all other kernels, from now on.

    Args:
        engine: its passes are called with NumPy arrays, on the CPU.

    Raises:
        ValueError: there is a kernel of that name already, or the backend takes no engine.

    Example:

    >>> add(Engine("none", lambda norm: "it is an example", forward=None, backward=None))
    >>> listed()[0].name
    'none'
    >>> remove("none")
    """
    global _added, _listed
    backend = keras.backend.backend()
    if engine.name in [kernel.name for kernel in listed()]:
        raise ValueError(
            f"engine {engine.name!r} has the name of another kernel; remove that one with "
            f"kernels.remove({engine.name!r}), or choose another name"
        )
    module = _module(backend)
    if module is None:
        raise ValueError(f"Keras's backend {backend} takes no engine; use tensorflow, jax or torch")
    _added, _listed = (module.kernel_of(engine), *_added), ()


def remove(name: str) -> None:
    """Take back an engine that was added, by its name.

    Raises:
        ValueError: there is none of that name.

    Example:

    >>> add(Engine("none", lambda norm: "it is an example", forward=None, backward=None))
    >>> remove("none")
    >>> "none" in [kernel.name for kernel in listed()]
    False
    """
    global _added, _listed
    names = [kernel.name for kernel in _added]
    if name not in names:
        raise ValueError(f"engine {name!r} was not added; those that were are {names}")
    _added, _listed = tuple(kernel for kernel in _added if kernel.name != name), ()


def accelerator() -> str | None:
    """The GPU that the backend puts its tensors on, by the maker's name, or None.

    Example:

    >>> isinstance(accelerator(), str | None)
    True
    """
    module = _module(keras.backend.backend())
    return None if module is None else module.accelerator()


@functools.cache
def _own() -> tuple[Kernel, ...]:
    backend = keras.backend.backend()
    module = _module(backend)
    if module is not None:
        return module.KERNELS
    reason = f"Keras's backend {backend} cannot call native kernels"
    return (Kernel("native", lambda norm, x: reason, run=None), composite.COMPOSITE)


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
