"""The norms written in keras.ops: runs on every backend, device and geometry.

This is the readable meaning of every faster kernel. It works on the input in its own shape, so no
large tensor is ever reshaped or transposed, and unknown extents and sharded axes stay as they are.
"""

from keras import ops

from normwise.geometry import Geometry


def normalize(x, gamma, beta, geometry: Geometry, *, epsilon, centred: bool, mask=None):
    """Normalize every set of `x` and apply gamma and beta.

        centred:      y = gamma * (x - mean) / sqrt(var + epsilon) + beta
        not centred:  y = gamma * x / sqrt(mean(x^2) + epsilon) + beta

    Args:
        x: float32 or float64 tensor of `geometry.shape`, the dtype of the arithmetic.
        gamma, beta: tensors of `geometry.parameter_shape` and the dtype of x, or None.
        geometry: which elements share their statistics.
        epsilon: added to the variance: a number, or a tensor () of the dtype of x.
        centred: whether the mean is subtracted.
        mask: None, or a bool tensor of the rank of x that broadcasts to it; False leaves the
            element out of the statistics. A set with no element left has mean 0 and variance 1.
            A NaN or an infinity that is masked is read as 0.

    Returns:
        A tensor of the shape and dtype of x.

    Numerics: the mean is taken of x - x0, where x0 is an element of the set, and the variance of
    what is left when that mean is subtracted too. So equal elements give exactly beta, and no sum
    ever grows with the mean: see docs/numerics.md.
    """
    if mask is not None:
        deviation, variance = _masked_moments(x, mask, geometry, centred=centred)
    elif not centred:
        deviation = x
        variance = total(ops.square(x), geometry) / set_size(x, geometry)
    elif geometry.parameter_axes == geometry.set_axes:
        deviation, variance = _moments(x, geometry)
    else:
        return _normalize_channels(x, gamma, beta, geometry, epsilon)

    scale = _inverse_root(variance, epsilon)
    if gamma is None:
        y = deviation * scale
    elif centred or geometry.parameter_axes != geometry.set_axes:
        y = deviation * (scale * _spread(gamma, geometry))
    else:
        # RMS norm's product of scale and gamma is as large as x, and JAX gains nothing by it: at
        # (8, 64, 64, 256) it trains 1.2 times as fast so. Layer norm does: its forward pass at
        # (32, 26, 26, 10) takes 0.8 of the time with the product.
        y = deviation * scale * _spread(gamma, geometry)
    return y if beta is None else y + _spread(beta, geometry)


def _moments(x, geometry: Geometry):
    """The deviation of `x` from the mean of its set, and the variance: two passes over x - x0."""
    count = set_size(x, geometry)
    # In place on PyTorch, where the temporary is ours, and a plain rebinding elsewhere: one tensor
    # of the input's size less to allocate.
    deviation = x - ops.stop_gradient(_first(x, geometry))
    deviation -= total(deviation, geometry) / count
    return deviation, total(ops.square(deviation), geometry) / count


def _normalize_channels(x, gamma, beta, geometry: Geometry, epsilon: float):
    """_moments and their use, where gamma and beta are per channel: small tensors beside x.

    The gradient of the mean takes its way through these small tensors, in `rest`, instead of
    through x: a pass less over x backward (training is 1.1 to 1.2 times as fast on TensorFlow).
    With centre = stop(mean) and rest = mean - centre, which is also the mean of shifted - centre,
    the variance is mean((shifted - centre)^2) - rest^2: as functions, with all their derivatives,
    not only at the value rest = 0.
    """
    count = set_size(x, geometry)
    shifted = x - ops.stop_gradient(_first(x, geometry))
    mean = total(shifted, geometry) / count
    centre = ops.stop_gradient(mean)
    rest = mean - centre
    variance = total(ops.square(shifted - centre), geometry) / count - ops.square(rest)

    scale = _inverse_root(variance, epsilon)
    if gamma is not None:
        scale = scale * _spread(gamma, geometry)
    offset = mean * scale
    return shifted * scale - (offset if beta is None else offset - _spread(beta, geometry))


def _masked_moments(x, mask, geometry: Geometry, *, centred: bool):
    """The deviation of all of `x`, and the variance of the elements that `mask` keeps."""
    keep = ops.broadcast_to(mask, ops.shape(x))
    # Else a masked NaN would reach every gradient of its set as 0 * NaN.
    x = ops.where(ops.logical_or(keep, ops.isfinite(x)), x, 0)
    count = total(ops.cast(keep, x.dtype), geometry)
    some = count > 0
    count = ops.maximum(count, 1)
    deviation = x
    if centred:
        # The first element may be masked, so the shift is the mean: rounded as it is, and without
        # an element kept 0. The mean of what it leaves is subtracted too.
        mean = ops.stop_gradient(total(ops.where(keep, x, 0), geometry) / count)
        deviation = x - mean
        deviation = deviation - total(ops.where(keep, deviation, 0), geometry) / count
    # Masked before it is squared: a square that overflows would reach the gradient as 0 * inf.
    kept = ops.where(keep, deviation, 0)
    variance = total(ops.square(kept), geometry) / count
    return deviation, ops.where(some, variance, 1)


def _spread(parameter, geometry: Geometry):
    """Gamma or beta in the shape that broadcasts against x."""
    return ops.reshape(parameter, geometry.broadcast_shape(ops.shape(parameter)))


def _inverse_root(variance, epsilon):
    """1 / sqrt(variance + epsilon), and 0 where that has no value: equal elements at epsilon 0.

    By a root and a quotient: XLA makes a reciprocal root of them, but finds a shorter derivative
    than that of `rsqrt` (RMS norm at (32, 26, 26, 10) trains 1.2 times as fast on JAX).
    """
    radicand = variance + epsilon
    if not ops.is_tensor(epsilon) and epsilon > 0:
        return 1 / ops.sqrt(radicand)
    defined = radicand != 0
    return ops.where(defined, ops.rsqrt(ops.where(defined, radicand, 1)), 0)


def total(x, geometry: Geometry):
    """The sum over each set, in a shape that broadcasts against the input.

    Axis by axis, the last first: over two axes at a time TensorFlow takes 1.4 times as long at
    (32, 26, 26, 10), and 1.7 times at (8, 64, 64, 256). Where a set takes some of the channels, the
    members of a group go last, for a sum over both would walk memory in steps of a few elements (as
    Keras does, 1.3 to 4 times slower on all three backends).
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
    return ops.maximum(ops.cast(size, x.dtype), 1)
