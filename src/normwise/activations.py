"""The activations that a kernel may fuse into a norm, each a value and not a function."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import keras

from normwise.typing import Tensor


class Activation(NamedTuple):
    """An activation that kernels know.

    Args:
        name: one of NAMES.
        slope: of a leaky relu at negative numbers; relu is the one with slope 0.
    """

    name: str
    slope: float = 0.0

    @property
    def code(self) -> int:
        """Its number in enum NormwiseActivation of csrc/normwise.h."""
        return NAMES.index(self.name)

    def __call__(self, z: Tensor) -> Tensor:
        """Apply it to a tensor of Keras's backend."""
        if self.name == "leaky_relu" and self.slope:
            return keras.activations.leaky_relu(z, negative_slope=self.slope)
        return _FUNCTIONS[self.name](z)


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "leaky_relu": keras.activations.relu,
    "sigmoid": keras.activations.sigmoid,
    "tanh": keras.activations.tanh,
    "silu": keras.activations.silu,
    "gelu": lambda z: keras.activations.gelu(z, approximate=False),
    "gelu_tanh": lambda z: keras.activations.gelu(z, approximate=True),
}

# In the order of enum NormwiseActivation.
NAMES = tuple(_FUNCTIONS)

IDENTITY = Activation("identity")

# By identity: a callable of the user's need have no hash, and nothing here keeps it alive.
_KNOWN = {
    id(None): IDENTITY,
    id(keras.activations.linear): IDENTITY,
    id(keras.activations.relu): Activation("leaky_relu"),
    id(keras.activations.leaky_relu): Activation("leaky_relu", 0.2),
    id(keras.activations.sigmoid): Activation("sigmoid"),
    id(keras.activations.tanh): Activation("tanh"),
    id(keras.activations.silu): Activation("silu"),
    id(keras.activations.gelu): Activation("gelu"),
}


def find(function: Callable[..., Tensor] | None) -> Activation | None:
    """What kernels may fuse for a function of keras.activations, None if they do not know it.

    functools.partial with `negative_slope` of leaky_relu or `approximate` of gelu is known too.

    Example:

    >>> import functools, keras
    >>> find(keras.activations.relu)
    Activation(name='leaky_relu', slope=0.0)
    >>> find(functools.partial(keras.activations.gelu, approximate=True)).name
    'gelu_tanh'
    """
    if not isinstance(function, functools.partial):
        return _KNOWN.get(id(function))
    if function.args:
        return None
    options, function = function.keywords, function.func
    if options.keys() == {"negative_slope"} and function is keras.activations.leaky_relu:
        return Activation("leaky_relu", float(options["negative_slope"]))
    if options.keys() == {"approximate"} and function is keras.activations.gelu:
        return Activation("gelu_tanh" if options["approximate"] else "gelu")
    return None if options else _KNOWN.get(id(function))
