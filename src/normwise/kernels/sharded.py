"""A norm on JAX whose sets lie on several devices: local sums, merged over the mesh.

No input is ever gathered: what devices exchange are sums, one for each set, and the statistics.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from normwise.kernels import composite
from normwise.norm import NONE, Norm


@dataclasses.dataclass(frozen=True)
class Split:
    """How one input lies on a mesh.

    Args:
        shape: of the whole input.
        names: for each of its axes, the mesh axes that it is split over.
    """

    shape: tuple[int, ...]
    names: tuple[tuple[str, ...], ...]

    def over(self, axes) -> tuple[str, ...]:
        """The mesh axes that these axes of the input are split over."""
        return tuple(name for axis in axes for name in self.names[axis])

    def add_up(self, x, axes):
        """The sums of `x` over these axes, on all devices."""
        names = self.over(axes)
        x = jnp.sum(x, axes, keepdims=True)
        return jax.lax.psum(x, names) if names else x

    def gather(self, x, channel):
        """`x`, one number for each channel as it is, with the channels of all devices."""
        names = self.over([channel])
        return jax.lax.all_gather(x, names, axis=channel, tiled=True) if names else x

    def total(self, x, geometry):
        """As composite.total, of all devices' parts of a set."""
        x = self.add_up(x, geometry.set_axes)
        if not geometry.splits_channels:
            return x
        # A group's channels may lie on several devices: each adds what it has of every group.
        (channel,) = geometry.parameter_axes
        names, own = self.over([channel]), x.shape[channel]
        first = jax.lax.axis_index(names) * own if names else 0
        group_of = (first + jnp.arange(own)) // geometry.members
        sums = jax.ops.segment_sum(jnp.moveaxis(x, channel, 0), group_of, geometry.groups)
        sums = jax.lax.psum(sums, names) if names else sums
        return jnp.moveaxis(sums[group_of], 0, channel)


def _moments(norm: Norm, x, split: Split):
    whole = dataclasses.replace(norm.geometry, shape=split.shape)
    total = functools.partial(split.total, geometry=whole)
    count = max(whole.set_size, 1)
    return total, count, composite.moments(norm, x, total, count)


def forward(norm: Norm, x, gamma, beta, residual, split: Split):
    """The forward pass on one device's parts of its operands."""
    if norm.operands.residual:
        x = residual = composite.summed(x, residual, x.dtype)
    _, _, (deviation, mean, variance) = _moments(norm, x, split)
    inv_std = composite.inverse_root(norm, variance, NONE)
    z = _affine(norm, deviation * inv_std, gamma, beta)
    channel, *others = norm.geometry.parameter_axes
    if not others and mean.shape[channel] != 1:
        mean, inv_std = (split.gather(each, channel) for each in (mean, inv_std))
    statistics = composite.stack(norm, x.shape, mean, inv_std)
    return norm.activation(z).astype(x.dtype), statistics, residual


def backward(norm: Norm, x, gamma, beta, statistics, dy, dsum, split: Split):
    """The backward pass on one device's parts of its operands."""
    total, count, (deviation, _, variance) = _moments(norm, x, split)
    inv_std = composite.inverse_root(norm, variance, NONE)
    normalized = deviation * inv_std
    z = _affine(norm, normalized, gamma, beta)
    (g,) = jax.vjp(norm.activation, z)[1](dy.astype(z.dtype))

    axes = norm.geometry.parameter_axes
    axes = (0, *axes) if norm.per_sample else axes
    others = [axis for axis in range(x.ndim) if axis not in axes]
    dgamma = split.add_up(g * normalized, others).reshape(gamma.shape) if gamma.size else gamma
    dbeta = split.add_up(g, others).reshape(beta.shape) if beta.size else beta

    g = _affine(norm, g, gamma, jnp.zeros(0))
    dx = g - normalized * (total(g * normalized) / count)
    if norm.subtract_mean:
        dx = dx - total(g) / count
    dx = dx * inv_std
    dx = dx + dsum if dsum.size else dx
    return dx.astype(x.dtype), dgamma, dbeta


def _affine(norm: Norm, x, gamma, beta):
    if gamma.size:
        x = x * composite.spread(gamma, norm.geometry)
    return x + composite.spread(beta, norm.geometry) if beta.size else x
