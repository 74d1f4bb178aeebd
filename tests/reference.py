"""The norms in float64 NumPy, forward and backward, written from the formulas.

No code is shared with the package.
Whether a number is right is decided here, and nowhere else. A norm is told by a label for every
element: equal labels share their statistics.
"""

import dataclasses

import numpy as np

# Half an ulp of 1, the rounding of a dtype; and its last digit where numbers lose digits at 0.
EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 0.0}


def group_labels(shape, axis, groups):
    """Labels of group norm: one per sample and group of neighbouring channels."""
    index = np.indices(shape)
    members = shape[axis] // groups
    return _numbered(np.stack([index[0], index[axis] // members]))


def layer_labels(shape, axes):
    """Labels of layer norm and RMS norm: one per position outside the normalized axes."""
    axes = {axis % len(shape) for axis in axes}
    index = np.indices(shape)
    kept = [index[axis] for axis in range(len(shape)) if axis not in axes]
    return _numbered(np.stack([*kept, np.zeros_like(index[0])]))


def _numbered(keys):
    flat = keys.reshape(len(keys), -1)
    if not flat.size:
        return np.zeros(keys.shape[1:], int)
    _, labels = np.unique(flat, axis=1, return_inverse=True)
    return labels.reshape(keys.shape[1:])


@dataclasses.dataclass
class Norm:
    """y = gamma * (x - mean) / sqrt(var + epsilon) + beta, and what its gradients need.

    Not centred, the mean is 0 and var is the mean square. `keep` marks the elements that count for
    the statistics; a set without any has mean 0 and variance 1. How gamma and beta lie is told by
    their shapes: of the parameter axes, of these behind the batch, or of the rank of x.
    """

    x: np.ndarray
    gamma: np.ndarray | None
    beta: np.ndarray | None
    labels: np.ndarray
    parameter_axes: tuple[int, ...]
    epsilon: float = 1e-3
    centred: bool = True
    keep: np.ndarray | None = None

    def __post_init__(self):
        self.x = np.asarray(self.x, np.float64)
        self.parameter_axes = tuple(sorted(a % self.x.ndim for a in self.parameter_axes))
        keep = np.ones(self.x.shape) if self.keep is None else np.asarray(self.keep, np.float64)
        self.keep = np.broadcast_to(keep, self.x.shape)
        kept = self.sums(self.keep)
        some, self.count = kept > 0, np.maximum(kept, 1)
        self.some = some
        values = np.where(self.keep > 0, self.x, 0)
        mean = np.where(some & self.centred, self.sums(values) / self.count, 0)
        deviation = self.x - mean
        squares = np.where(self.keep > 0, deviation, 0) ** 2
        self.mean = mean
        self.variance = np.where(some, self.sums(squares) / self.count, 1)
        self.deviation = root = np.sqrt(self.variance + self.epsilon)
        # (equal elements at epsilon 0) deviate by 0 and stay 0.
        self.inv_std = np.divide(1, root, out=np.zeros_like(root), where=root != 0)
        self.normalized = deviation * self.inv_std
        self.scale = 1.0 if self.gamma is None else self.spread(self.gamma)
        self.shift = 0.0 if self.beta is None else self.spread(self.beta)
        self.y = self.normalized * self.scale + self.shift

    def sums(self, values):
        """The sum over each element's set, at that element."""
        if not values.size:
            return np.zeros(values.shape)
        totals = np.bincount(self.labels.ravel(), weights=np.ravel(values))
        return totals[self.labels]

    def spread(self, parameter):
        """A parameter in a shape that broadcasts against x."""
        parameter = np.asarray(parameter, np.float64)
        if parameter.ndim == self.x.ndim:
            return parameter
        axes = self.parameter_axes
        spanned = (0, *axes) if parameter.ndim > len(axes) else axes
        extents = iter(parameter.shape)
        return parameter.reshape([next(extents) if a in spanned else 1 for a in range(self.x.ndim)])

    def gather(self, values, parameter=None):
        """The sum of what each element of a parameter receives, in the parameter's shape."""
        if parameter is None:
            parameter = np.empty([self.x.shape[a] for a in self.parameter_axes])
        spread = self.spread(parameter).shape
        others = tuple(a for a, n in enumerate(spread) if n != self.x.shape[a])
        return np.sum(values, axis=others, keepdims=True).reshape(np.shape(parameter))

    def per_set(self, cotangent):
        """The sum over a set of a cotangent of its mean or deviation, which broadcasts to x.

        Where several of its elements belong to one set, each of them is a copy of the same number.
        """
        copies = self.x.size / max(np.size(cotangent), 1)
        return self.sums(np.broadcast_to(cotangent, self.x.shape)) / max(copies, 1)

    def gradients(self, dy, dmean=0.0, ddeviation=0.0):
        """The gradients of sum(y * dy) + sum(mean * dmean) + sum(deviation * ddeviation).

        They are by x, gamma and beta. With h = dy * gamma, n kept elements in the set, k = 1 where
        an element is kept, else 0:

            dx = inv_std * (h - k/n * sum(h) - k/n * normalized * sum(h * normalized))
                 + k/n * sum(dmean) + k/n * normalized * sum(ddeviation)

        where the first sum is the mean's part and the second the variance's. The deviation is
        sqrt(var + epsilon); its cotangent and that of the mean are told by `per_set`.
        """
        dy = np.asarray(dy, np.float64)
        h = dy * self.scale
        share = np.where(self.some, self.keep / self.count, 0)
        dx = h - share * self.normalized * self.sums(h * self.normalized)
        if self.centred:
            dx = dx - share * self.sums(h)
        dx = dx * self.inv_std + share * self.normalized * self.per_set(ddeviation)
        if self.centred:
            dx = dx + share * self.per_set(dmean)
        dgamma = self.gather(dy * self.normalized, self.gamma)
        return dx, dgamma, self.gather(dy, self.beta)

    # Tolerances. One rounding of an operand as large as the mean moves y by eps * |mean| / std; all
    # else is a few roundings of terms as large as those listed. `units` counts the roundings. A sum
    # of n terms, in whatever order a framework adds them, may lose sqrt(n) more: mean and variance.

    def ratio(self):
        """1 + |mean| / std of each element's set: the condition of y."""
        return 1 + np.abs(self.mean) * self.inv_std

    def y_tolerance(self, eps, units=16):
        """How far a right y may be off in arithmetic of precision `eps`."""
        size = np.abs(self.scale) * (1 + np.abs(self.normalized))
        terms = np.abs(self.scale) * self.ratio() + size + np.abs(self.shift)
        return eps * (units * terms + np.sqrt(self.count) * size)

    def statistics_tolerances(self, eps, units=16):
        """How far a right mean and a right deviation may be off."""
        lost = eps * np.sqrt(self.count) * self.deviation
        mean = eps * units * (np.abs(self.mean) + self.deviation) + lost
        return mean, eps * units * self.ratio() * self.deviation + lost

    def gradient_tolerances(self, dy, eps, units=32, dmean=0.0, ddeviation=0.0):
        """The same for the gradients; sums of many terms may lose eps * sqrt(terms)."""
        h = np.abs(np.asarray(dy, np.float64) * self.scale)
        size = np.abs(self.normalized)
        per_set = np.sqrt(self.count) * units * eps
        terms = h + (self.sums(h) + size * self.sums(h * size)) / self.count
        pulled = self.per_set(np.abs(dmean)) + size * self.per_set(np.abs(ddeviation))
        dx = per_set * self.ratio() * (self.inv_std * terms + pulled / self.count)
        weight = units * eps * self.ratio() * np.abs(np.asarray(dy, np.float64))
        dgamma = self.gather(weight * (1 + size), self.gamma)
        return dx, dgamma, self.gather(weight, self.beta)
