"""What the arguments of a norm must be; its axes and groups are for the geometry to check."""

import functools
import math
import numbers

import keras

from normwise.geometry import Geometry


def check_epsilon(epsilon) -> float:
    """Return `epsilon` as a float if it can be added to a variance."""
    remedy = "expected a number >= 0, as in epsilon=1e-3"
    # To be a float takes no abstract class to find out, which is 0.2 us of a tiny norm's 11.
    if isinstance(epsilon, bool) or not isinstance(epsilon, (float, numbers.Real)):
        raise TypeError(f"epsilon={epsilon!r} is no number; {remedy}")
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon={epsilon} cannot be added to a variance; {remedy}")
    return float(epsilon)


@functools.cache
def dtype_name(dtype) -> str:
    """Keras's name for a framework's dtype. Of a tiny norm's 22 us Keras took 2 to find them."""
    return keras.backend.standardize_dtype(dtype)


def check_dtype(x) -> str:
    """Return the dtype of `x` if a norm is defined on its numbers."""
    dtype = dtype_name(x.dtype)
    if "complex" in dtype:
        raise TypeError(
            f"x has dtype {dtype}, and no norm is defined on complex numbers; normalize its real "
            "and imaginary parts, or its modulus"
        )
    return dtype


def check_mask(plan: Geometry, mask):
    """Check that `mask` fits the input of a geometry."""
    shape = tuple(keras.ops.shape(mask))
    leading = tuple(
        1 if isinstance(extent, int) and extent == 1 else full
        for extent, full in zip(shape, plan.shape, strict=False)
    )
    if not 0 < len(shape) <= len(plan.shape) or not _fits(shape, leading):
        raise ValueError(
            f"mask has shape {shape}, which does not fit x of shape {plan.shape}; pass the shape "
            "of x or of its first axes, an extent of 1 standing for all"
        )


def check_shapes(plan: Geometry, gamma, beta, mask, learned_epsilon):
    """Check that the tensors that come with the input of a geometry fit it; each may be None."""
    expected = plan.parameter_shape
    for name, parameter in (("gamma", gamma), ("beta", beta)):
        shape = None if parameter is None else tuple(parameter.shape)
        if shape is not None and not _fits(shape, expected):
            raise ValueError(
                f"{name} has shape {shape}, but axis {list(plan.parameter_axes)} of shape "
                f"{plan.shape} needs {expected}"
            )
    if mask is not None:
        check_mask(plan, mask)
    if learned_epsilon is not None and tuple(learned_epsilon.shape) not in ((), (1,)):
        raise ValueError(
            f"learned_epsilon has shape {tuple(learned_epsilon.shape)}, but it is one number for "
            "all channels; pass a tensor of shape () or (1,)"
        )


def _fits(shape, expected) -> bool:
    """Whether two shapes are equal as far as their extents are known."""
    return shape == expected or (
        len(shape) == len(expected)
        and all(
            e == s
            for s, e in zip(shape, expected, strict=True)
            if isinstance(s, int) and e is not None
        )
    )
