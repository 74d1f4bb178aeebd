"""The norms written in keras.ops: runs on every backend, device and geometry.

This is the readable meaning of every faster kernel. It works on the input in its own shape, so no
large tensor is ever reshaped or transposed, and unknown extents and sharded axes stay as they are.
"""

import functools
from collections.abc import Callable

import keras
from keras import ops

from normwise.geometry import Geometry
from normwise.kernels.kernel import Kernel
from normwise.norm import NONE, Norm, Operands

# The smallest normal numbers: an epsilon below may count as 0, as processors flush it.
SMALLEST = {"float32": 2.0**-126, "float64": 2.0**-1022}

# By the backend, if its compiler carries on more digits than a dtype has, what takes them away.
ROUNDED: dict[str, Callable] = {}


def run(norm: Norm, x, operands: Operands, *, how=None):
    """A norm as `norm` describes it, from `norm.x_dtype` to `norm.y_dtype`.

    Args:
        norm: what the call is.
        x: tensor of `norm.geometry.shape`.
        operands: the tensors that come with it.
        how: what `normalize` does, by other means.

    Returns:
        A tensor of the shape of x.
    """
    if norm.x_dtype != norm.arithmetic:
        x = ops.cast(x, norm.arithmetic)
    y = norm.activation((how or normalize)(norm, x, operands))
    return y if norm.y_dtype == norm.arithmetic else ops.cast(y, norm.y_dtype)


def run_for_inference(norm: Norm, x, operands: Operands):
    """The same without terms that only serve derivatives.

    They are 0, of which a converter to integers makes a scale that no number fits.
    """
    return run(norm, x, operands, how=functools.partial(normalize, differentiable=False))


def summed(x, residual, dtype):
    """The sum of x and the residual, made in the wider dtype and rounded once, to `dtype`."""
    total = ops.cast(ops.add(x, residual), dtype)
    rounded = ROUNDED.get(keras.backend.backend())
    return total if rounded is None else rounded(total)


def normalize(norm: Norm, x, operands: Operands, *, differentiable=True):
    """Normalize every set of `x` and apply gamma and beta, all in the dtype of the arithmetic.

    Numerics: the mean is taken of x - x0, where x0 is an element of the set, and the variance of
    what is left when that mean is subtracted too. So equal elements give exactly beta, and no sum
    ever grows with the mean: see docs/numerics.md. With a mask a set with no element left has mean
    0 and variance 1, and a NaN or an infinity that is masked is read as 0.
    """
    geometry, (gamma, beta, mask, *_) = norm.geometry, operands
    per_channel = geometry.parameter_axes != geometry.set_axes
    if mask is not None:
        _, deviation, variance = _masked_moments(x, mask, geometry, norm.subtract_mean)
    elif not norm.subtract_mean:
        deviation = x
        variance = total(ops.square(x), geometry) / set_size(x, geometry)
    elif per_channel and differentiable:
        return _normalize_channels(norm, x, operands)
    else:
        deviation, variance = _moments(x, geometry)

    scale = inverse_root(norm, variance, operands)
    if gamma is None:
        y = deviation * scale
    elif norm.subtract_mean or per_channel:
        y = deviation * (scale * spread(gamma, geometry))
    else:
        # The product of scale and gamma would be as large as x, and RMS norm gains nothing by it.
        # Layer norm does: `make bench` has both.
        y = deviation * scale * spread(gamma, geometry)
    return y if beta is None else y + spread(beta, geometry)


def statistics(norm: Norm, x):
    """What an engine keeps of the forward pass, as csrc/normwise.h defines it.

    Returns:
        A tensor of `norm.geometry.statistics_shape(x.shape)` and the dtype of the arithmetic.
    """
    count = set_size(x, norm.geometry)
    _, mean, variance = moments(norm, x, lambda x: total(x, norm.geometry), count)
    return stack(norm, ops.shape(x), mean, inverse_root(norm, variance, NONE))


def mean_and_deviation(norm: Norm, x, operands: Operands):
    """The mean of each set, 0 where none is subtracted, and what its elements are divided by.

    Returns:
        Two tensors that broadcast against x, of the dtype of the arithmetic, differentiable.
    """
    geometry = norm.geometry
    if operands.mask is not None:
        x = ops.cast(x, norm.arithmetic)
        mean, _, variance = _masked_moments(x, operands.mask, geometry, norm.subtract_mean)
    else:
        count = set_size(x, geometry)
        _, mean, variance = moments(norm, x, lambda x: total(x, geometry), count)
    radicand = _radicand(norm, variance, operands)
    # The root has no derivative at 0, and equal elements none to either side.
    defined = radicand > 0
    return mean, ops.where(defined, ops.sqrt(ops.where(defined, radicand, 1)), 0)


def moments(norm: Norm, x, total, count):
    """The deviation of `x` from the mean of its set, that mean, and the variance.

    Args:
        norm: what the call is; where it subtracts no mean, that is 0.
        x: the input.
        total: gives the sums over each set.
        count: the number of elements of a set.
    """
    x = ops.cast(x, norm.arithmetic)
    mean = total(x) / count
    if norm.subtract_mean:
        x = x - mean
        rest = total(x) / count
        x, mean = x - rest, mean + rest
    else:
        mean = ops.zeros_like(mean)
    return x, mean, total(ops.square(x)) / count


def stack(norm: Norm, shape, mean, inv_std):
    """The statistics of an x of this shape, of means and inverse deviations that broadcast to x."""
    geometry = norm.geometry
    kept = list(geometry.statistics_shape(shape))
    del kept[geometry.ends[0]]
    each = (mean, inv_std)
    if geometry.splits_channels:
        # One of the members of a group, which all have its statistics.
        (channel,) = geometry.parameter_axes
        members = (slice(None),) * channel + (slice(None, None, geometry.members),)
        each = (tensor[members] for tensor in each)
    return ops.stack([ops.reshape(tensor, kept) for tensor in each], axis=geometry.ends[0])


def _moments(x, geometry: Geometry):
    """The deviation of `x` from the mean of its set, and the variance: two passes over x - x0."""
    count = set_size(x, geometry)
    # In place on PyTorch, where the temporary is ours, and a plain rebinding elsewhere: one tensor
    # of the input's size less to allocate.
    deviation = x - ops.stop_gradient(_first(x, geometry))
    deviation -= total(deviation, geometry) / count
    return deviation, total(ops.square(deviation), geometry) / count


def _normalize_channels(norm: Norm, x, operands: Operands):
    """_moments and their use, where gamma and beta are per channel: small tensors beside x.

    The gradient of the mean takes its way through these small tensors, in `rest`, instead of
    through x, which spares training a pass over x. With centre = stop(mean) and
    rest = mean - centre, which is also the mean of shifted - centre, the variance is
    mean((shifted - centre)^2) - rest^2: as functions, with all their derivatives, not only at the
    value rest = 0.
    """
    geometry, (gamma, beta, *_) = norm.geometry, operands
    count = set_size(x, geometry)
    shifted = x - ops.stop_gradient(_first(x, geometry))
    mean = total(shifted, geometry) / count
    centre = ops.stop_gradient(mean)
    rest = mean - centre
    variance = total(ops.square(shifted - centre), geometry) / count - ops.square(rest)

    scale = inverse_root(norm, variance, operands)
    if gamma is not None:
        scale = scale * spread(gamma, geometry)
    offset = mean * scale
    return shifted * scale - (offset if beta is None else offset - spread(beta, geometry))


def _masked_moments(x, mask, geometry: Geometry, subtract_mean: bool):
    """The mean of what `mask` keeps, the deviation of all of `x` from it, and the variance."""
    x, keep = readable(x, mask)
    count = total(ops.cast(keep, x.dtype), geometry)
    some = count > 0
    count = ops.maximum(count, 1)
    mean, deviation = ops.zeros_like(count), x
    if subtract_mean:
        # The first element may be masked, so the shift is the mean: rounded as it is, and without
        # an element kept 0. The mean of what it leaves is subtracted too.
        mean = ops.stop_gradient(total(ops.where(keep, x, 0), geometry) / count)
        deviation = x - mean
        rest = total(ops.where(keep, deviation, 0), geometry) / count
        mean, deviation = mean + rest, deviation - rest
    # Masked before it is squared: a square that overflows would reach the gradient as 0 * inf.
    kept = ops.where(keep, deviation, 0)
    variance = total(ops.square(kept), geometry) / count
    return mean, deviation, ops.where(some, variance, 1)


def readable(x, mask):
    """`x` with 0 for what is masked and not finite, and which of its elements are kept.

    Else a masked NaN would reach every gradient of its set as 0 * NaN.
    """
    keep = ops.broadcast_to(mask, ops.shape(x))
    return ops.where(ops.logical_or(keep, ops.isfinite(x)), x, 0), keep


def spread(parameter, geometry: Geometry):
    """Gamma or beta in the shape that broadcasts against x."""
    return ops.reshape(parameter, geometry.broadcast_shape(ops.shape(parameter)))


def inverse_root(norm: Norm, variance, operands: Operands):
    """1 / sqrt(variance + epsilon), and 0 where that has no value: equal elements at epsilon 0.

    By a root and a quotient: XLA makes a reciprocal root of them, but finds a shorter derivative
    than that of `rsqrt`.
    """
    radicand = _radicand(norm, variance, operands)
    if operands.learned_epsilon is None and norm.epsilon >= SMALLEST[norm.arithmetic]:
        return 1 / ops.sqrt(radicand)
    defined = radicand != 0
    return ops.where(defined, ops.rsqrt(ops.where(defined, radicand, 1)), 0)


def _radicand(norm: Norm, variance, operands: Operands):
    if operands.learned_epsilon is None:
        return variance + norm.epsilon
    return variance + (norm.epsilon + ops.abs(ops.reshape(operands.learned_epsilon, ())))


def total(x, geometry: Geometry):
    """The sum over each set, in a shape that broadcasts against the input.

    Axis by axis, the last first: TensorFlow takes longer over two axes at a time. Where a set takes
    some of the channels, the members of a group go last, for a sum over both would walk memory in
    steps of a few elements, as Keras does. docs/kernels.md has the times.
    """
    for axis in reversed(geometry.set_axes):
        x = ops.sum(x, axis=axis, keepdims=True)
    if not geometry.splits_channels:
        return x
    (channel,) = geometry.parameter_axes
    extents = [-1 if extent is None else extent for extent in x.shape]
    extents[channel : channel + 1] = [geometry.groups, geometry.members]
    x = ops.sum(ops.reshape(x, extents), axis=channel + 1)
    return ops.repeat(x, geometry.members, axis=channel)


def _first(x, geometry: Geometry):
    """The first element of each set, in a shape that broadcasts against the input."""
    index = [
        slice(0, 1) if axis in geometry.set_axes else slice(None) for axis in range(len(x.shape))
    ]
    if not geometry.splits_channels:
        return x[tuple(index)]
    (channel,) = geometry.parameter_axes
    index[channel] = slice(None, None, geometry.members)
    return ops.repeat(x[tuple(index)], geometry.members, axis=channel)


def set_size(x, geometry: Geometry):
    """The number of elements in a set, at least 1: an empty set sums to 0, and has mean 0."""
    if geometry.set_size is not None:
        return max(geometry.set_size, 1)
    extents = ops.shape(x)
    size = geometry.members if geometry.splits_channels else 1
    for axis in geometry.set_axes:
        size = size * extents[axis]
    if hasattr(size, "node"):  # a symbol of torch's exporters, which is to stay one
        return max(size, 1)
    return ops.maximum(ops.cast(size, x.dtype), 1)


COMPOSITE = Kernel("composite", lambda norm, x: None, run, engine=False)
