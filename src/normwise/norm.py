"""What one call of a norm is, as a value, and the checks of its arguments.

Everything about a call that is no tensor is in one `Norm`: made once in `ops`, it is what kernels
are chosen by and what they are told. Axes and groups are for the geometry to check.
"""

import dataclasses
import functools
import math
import numbers
from typing import Any, NamedTuple

import keras

from normwise.activations import IDENTITY, Activation
from normwise.geometry import Geometry, KeepsHash
from normwise.typing import DType, Shape, Tensor

# How gamma or beta lies: one for all samples, of `geometry.parameter_shape`; one for each, of that
# shape behind the batch; or one for each element, of a shape that broadcasts to that of x.
SHARED = "shared"
PER_SAMPLE = "per sample"
PER_ELEMENT = "per element"


class Operands(NamedTuple):
    """What comes with x: the tensors of a call, or in a Norm how each of them lies.

    Args:
        gamma, beta: of the dtype of the arithmetic; SHARED or, both of them, PER_SAMPLE.
        mask: bool, of the rank of x, broadcasts to it; True.
        learned_epsilon: of shape () or (1,); its absolute value is added to epsilon; True.
        residual: of the shape and dtype of x; what is normalized is the sum of both; True.
    """

    gamma: Any = None
    beta: Any = None
    mask: Any = None
    learned_epsilon: Any = None
    residual: Any = None

    def lie(self) -> "Operands":
        """How the tensors lie, each None where there is none, if gamma and beta are SHARED."""
        gamma, beta, mask, learned_epsilon, residual = self
        return Operands(
            None if gamma is None else SHARED,
            None if beta is None else SHARED,
            None if mask is None else True,
            None if learned_epsilon is None else True,
            None if residual is None else True,
        )


# x comes alone.
NONE = Operands()


@dataclasses.dataclass(frozen=True)
class Norm(KeepsHash):
    """One call of a norm but for its tensors: frozen, hashable, and all that a kernel is told.

        y = activation(gamma * (x - mean) / sqrt(var + epsilon) + beta)

    Args:
        geometry: which elements share their statistics, and how they lie in memory.
        x_dtype, y_dtype: of the input and of the result.
        epsilon: added to the variance.
        subtract_mean: whether the mean is subtracted, or only the root mean square divided by.
        activation: applied to the result.
        operands: which there are, and how each of them lies.

    Attributes:
        arithmetic: the dtype of the statistics, of the arithmetic, and of gamma and beta.
        dtype: the one for kernels that write what they read: x is cast to it, and y from it.
    """

    geometry: Geometry
    x_dtype: str
    y_dtype: str
    epsilon: float
    subtract_mean: bool = True
    activation: Activation = IDENTITY
    operands: Operands = NONE

    # What follows, kept since every call asks for it.
    arithmetic: str = dataclasses.field(init=False, repr=False, compare=False)
    dtype: str = dataclasses.field(init=False, repr=False, compare=False)
    __hash__ = KeepsHash.kept_hash

    def __post_init__(self) -> None:
        arithmetic = arithmetic_of(self.x_dtype, self.y_dtype)
        object.__setattr__(self, "arithmetic", arithmetic)
        dtype = self.x_dtype if self.x_dtype == self.y_dtype else arithmetic
        object.__setattr__(self, "dtype", dtype)

    @property
    def uniform(self) -> "Norm":
        """The same norm, which reads and writes `dtype`."""
        if self.x_dtype == self.y_dtype:
            return self
        return dataclasses.replace(self, x_dtype=self.dtype, y_dtype=self.dtype)

    def of(self, geometry: Geometry) -> "Norm":
        """The same norm of another geometry."""
        return dataclasses.replace(self, geometry=geometry)

    def with_operands(self, lie: Operands) -> "Norm":
        """The same norm with operands that lie so."""
        return self if lie == self.operands else _with_operands(self, lie)

    @property
    def per_sample(self) -> bool:
        """Whether gamma and beta, where there are any, have values of their own for each sample."""
        return PER_SAMPLE in self.operands[:2]


def arithmetic_of(x_dtype: str, y_dtype: str) -> str:
    """The dtype of the arithmetic from one dtype to another."""
    return "float64" if "float64" in (x_dtype, y_dtype) else "float32"


def sum_dtype(x_dtype: str, y_dtype: str) -> str:
    """The dtype of x + residual: that of x, and of the result where x has integers."""
    return x_dtype if "float" in x_dtype else y_dtype


@functools.lru_cache(maxsize=1024)
def _with_operands(norm: Norm, lie: Operands) -> Norm:
    return dataclasses.replace(norm, operands=lie)


def check_epsilon(epsilon: Any) -> float:
    """Return `epsilon` as a float if it can be added to a variance."""
    remedy = "expected a number >= 0, as in epsilon=1e-3"
    # To be a float takes no abstract class to find out, which takes longer.
    if isinstance(epsilon, bool) or not isinstance(epsilon, (float, numbers.Real)):
        raise TypeError(f"epsilon={epsilon!r} is no number; {remedy}")
    if not 0 <= float(epsilon) < math.inf:
        raise ValueError(f"epsilon={epsilon} cannot be added to a variance; {remedy}")
    return float(epsilon)


def check_offset(gamma_offset: Any) -> float:
    """Return `gamma_offset` as a float if it can be added to gamma."""
    remedy = "expected a number, as in gamma_offset=1.0"
    if isinstance(gamma_offset, bool) or not isinstance(gamma_offset, (float, numbers.Real)):
        raise TypeError(f"gamma_offset={gamma_offset!r} is no number; {remedy}")
    # By comparing: Dynamo traces no `isfinite` of a number that a graph keeps open.
    if not -math.inf < float(gamma_offset) < math.inf:
        raise ValueError(f"gamma_offset={gamma_offset} cannot be added to gamma; {remedy}")
    return float(gamma_offset)


@functools.cache
def dtype_name(dtype: DType) -> str:
    """Keras's name for a framework's dtype, which it takes Keras longer to find."""
    return keras.backend.standardize_dtype(dtype)


def check_dtype(dtype: DType, name: str = "x") -> str:
    """Return the name of an input's dtype if a norm is defined on its numbers."""
    dtype = dtype_name(dtype)
    if "complex" in dtype:
        raise TypeError(
            f"{name} has dtype {dtype}, and no norm is defined on complex numbers; normalize its "
            "real and imaginary parts, or its modulus"
        )
    return dtype


def check_mask(geometry: Geometry, mask: Tensor) -> None:
    """Check that `mask` fits the input of a geometry."""
    shape = tuple(keras.ops.shape(mask))
    leading = tuple(
        1 if isinstance(extent, int) and extent == 1 else full
        for extent, full in zip(shape, geometry.shape, strict=False)
    )
    if not 0 < len(shape) <= len(geometry.shape) or not fits(shape, leading):
        raise ValueError(
            f"mask has shape {shape}, which does not fit x of shape {geometry.shape}; pass the "
            "shape of x or of its first axes, an extent of 1 standing for all"
        )


def mask_beside(x: Tensor, mask: Tensor) -> Tensor:
    """The mask as bool and with as many axes as `x`, whose first ones it has."""
    trailing = (1,) * (len(x.shape) - len(mask.shape))
    return keras.ops.cast(keras.ops.reshape(mask, keras.ops.shape(mask) + trailing), "bool")


def check_shapes(geometry: Geometry, operands: Operands) -> Operands:
    """How the tensors lie that come with the input of a geometry, if they fit it."""
    gamma, beta, mask, learned_epsilon, residual = operands
    lie = operands.lie()
    expected = geometry.parameter_shape
    if gamma is not None and not fits(gamma.shape, expected):
        lie = lie._replace(gamma=_lies(geometry, "gamma", gamma.shape))
    if beta is not None and not fits(beta.shape, expected):
        lie = lie._replace(beta=_lies(geometry, "beta", beta.shape))
    if mask is not None:
        check_mask(geometry, mask)
    if learned_epsilon is not None and tuple(learned_epsilon.shape) not in ((), (1,)):
        raise ValueError(
            f"learned_epsilon has shape {tuple(learned_epsilon.shape)}, but it is one number for "
            "all channels; pass a tensor of shape () or (1,)"
        )
    if residual is not None:
        _check_residual(geometry, residual)
    return lie


def _check_residual(geometry: Geometry, residual: Tensor) -> None:
    check_dtype(residual.dtype, "residual")
    if not fits(residual.shape, geometry.shape):
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}, but it is added to x of shape "
            f"{geometry.shape}; pass a tensor of that shape"
        )


def _lies(geometry: Geometry, name: str, shape: Shape) -> str:
    """How a gamma or beta lies that is not of the parameters' shape."""
    expected, full = geometry.parameter_shape, geometry.shape
    for_each = (full[0], *expected)
    if 0 not in geometry.parameter_axes and fits(shape, for_each):
        return PER_SAMPLE
    broadcast = (
        1 if isinstance(s, int) and s == 1 else e for s, e in zip(shape, full, strict=False)
    )
    if len(shape) == len(full) and fits(shape, tuple(broadcast)):
        return PER_ELEMENT
    raise ValueError(
        f"{name} has shape {tuple(shape)}, but axis {list(geometry.parameter_axes)} of shape "
        f"{full} needs {expected}, or {for_each} for values of each sample's own"
    )


def fits(shape: Shape, expected: Shape) -> bool:
    """Whether two shapes are equal as far as their extents are known."""
    # Lengths first: to compare a symbol of torch's exporters with a number would bind it.
    return len(shape) == len(expected) and (
        shape == expected
        or all(
            e == s
            for s, e in zip(shape, expected, strict=True)
            if isinstance(s, int) and e is not None
        )
    )
