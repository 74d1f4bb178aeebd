"""Every norm once: how tests make its layer and op, and what the reference says of it."""

import dataclasses

import keras
import numpy as np
import pytest
from frameworks import to_numpy
from reference import Norm, group_labels, layer_labels

from normwise import layers, ops


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, its op, and options that fit an input of 6 channels on the last axis."""

    layer: type
    op: callable
    options: dict

    @property
    def weights(self):
        return ("gamma",) if self.layer is layers.RMSNormalization else ("gamma", "beta")

    @property
    def keras_layer(self):
        """Keras's layer of the name, None where it has none."""
        return getattr(keras.layers, self.layer.__name__, None)

    def make(self, **options):
        return self.layer(**{**self.options, **options})


NORMS = {
    "group": Case(layers.GroupNormalization, ops.group_norm, {"groups": 3}),
    "instance": Case(layers.InstanceNormalization, ops.instance_norm, {}),
    "layer": Case(layers.LayerNormalization, ops.layer_norm, {}),
    "rms": Case(layers.RMSNormalization, ops.rms_norm, {}),
}

every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())


def samples(shape=(2, 5, 6), seed=0, dtype="float32"):
    """Values of mean 3 and deviation 2."""
    return np.random.default_rng(seed).normal(3.0, 2.0, shape).astype(dtype)


def randomize(layer, seed=1):
    """Give gamma and beta values that no initializer gives."""
    rng = np.random.default_rng(seed)
    layer.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layer.weights])
    return layer


def expected(layer, x, keep=None):
    """What the reference says of `x` through a built layer."""
    axes = layer.axis if isinstance(layer.axis, list) else [layer.axis]
    epsilon = layer.epsilon
    if isinstance(layer, layers.FilterResponseNormalization):
        axes = [a for a in range(1, x.ndim) if a not in {axis % x.ndim for axis in axes}]
        labels = group_labels(x.shape, axes[0], x.shape[axes[0]])
        if layer.learned_epsilon:
            epsilon += abs(to_numpy(layer.eps_learned)[0])
    elif isinstance(layer, layers.GroupNormalization):
        groups = x.shape[layer.axis] if layer.groups == -1 else layer.groups
        labels = group_labels(x.shape, layer.axis, groups)
    else:
        labels = layer_labels(x.shape, axes)
    own = (layer.gamma, layer.beta)
    # Flat: filter response norm keeps them in the rank of its input.
    shape = tuple(x.shape[axis] for axis in sorted(a % x.ndim for a in axes))
    gamma, beta = (None if w is None else to_numpy(w).reshape(shape) for w in own)
    centred = not isinstance(layer, (layers.RMSNormalization, layers.FilterResponseNormalization))
    return Norm(x, gamma, beta, labels, tuple(axes), epsilon, centred, keep)
