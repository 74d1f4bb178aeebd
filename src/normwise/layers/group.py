"""Group norm and instance norm."""

import warnings

import keras

from normwise import geometry, ops
from normwise.layers.affine import Affine


@keras.saving.register_keras_serializable("normwise")
class GroupNormalization(Affine):
    """Group norm: normalize each sample over groups of its channels.

        y = activation(gamma * (x - mean) / sqrt(var + epsilon) + beta)

    with the mean and the variance of one sample's elements in one group of neighbouring channels.
    Independent of the batch, so it serves where batches are small. With one group it is nearly
    layer norm over the whole sample, but gamma and beta have one value per channel.

    Input: (batch, ..., channels, ...), rank 2 or more, any real dtype. Output: the same shape, in
    the layer's compute dtype. A mask leaves what it masks out of the statistics.

    Args:
        groups: the number of groups; must divide the channels. -1 makes a group of every channel.
        axis: the channel axis, an int or a list of one; any but the batch.
        epsilon: added to the variance, a number >= 0.
        center: whether to add beta.
        scale: whether to multiply by gamma.
        beta_initializer, gamma_initializer: of beta and gamma, each (channels,).
        beta_regularizer, gamma_regularizer: of beta and gamma, or None.
        beta_constraint, gamma_constraint: of beta and gamma, or None.
        activation: applied to the result, a name or a callable, or None.
        **kwargs: of the base layer, as `name` and `dtype`.

    Raises:
        ValueError: on construction for groups that is 0, below -1 or no int, the batch axis, and an
            epsilon that is negative or NaN; on the first call for groups that do not divide the
            channels, channels of unknown number, and an axis out of range.
        TypeError: axis is no int, or epsilon no number.

    Numerics: arithmetic in float32 (float64 for float64), error of y below a small multiple of
    eps * (1 + |mean| / std): see docs/numerics.md.

    Reference: Wu and He, Group Normalization, 2018, https://arxiv.org/abs/1803.08494

    Example:

    >>> import numpy as np, normwise
    >>> layer = normwise.layers.GroupNormalization(groups=2, axis=-1)
    >>> y = layer(np.random.default_rng(0).normal(3.0, 2.0, (4, 8, 8, 6)))
    >>> [(w.name, tuple(w.shape)) for w in layer.weights]
    [('gamma', (6,)), ('beta', (6,))]
    """

    def __init__(
        self,
        groups=32,
        axis=-1,
        epsilon=1e-3,
        center=True,
        scale=True,
        beta_initializer="zeros",
        gamma_initializer="ones",
        beta_regularizer=None,
        gamma_regularizer=None,
        beta_constraint=None,
        gamma_constraint=None,
        activation=None,
        **kwargs,
    ):
        super().__init__(
            axis=geometry.check_channel_axis(axis),
            epsilon=epsilon,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            activation=activation,
            **kwargs,
        )
        self.groups = geometry.check_groups(groups)

    def geometry(self, input_shape) -> geometry.Geometry:
        """Which elements of an input of this shape share their statistics."""
        return geometry.group(input_shape, self.axis, self.groups)

    def build(self, input_shape):
        """Create gamma and beta for inputs of this shape."""
        super().build(input_shape)
        channels = input_shape[self.axis]
        self.input_spec = keras.InputSpec(ndim=len(input_shape), axes={self.axis: channels})

    def call(self, inputs, mask=None):
        """Normalize `inputs`; `mask` (True = keep) leaves elements out of the statistics."""
        return ops.group_norm(
            inputs,
            self.gamma,
            self.beta,
            groups=self.groups,
            axis=self.axis,
            epsilon=self.epsilon,
            activation=self.activation,
            mask=mask,
            dtype=self.compute_dtype,
        )

    def get_config(self):
        """The arguments of the layer, whatever it was built on."""
        return {**super().get_config(), "groups": self.groups}


@keras.saving.register_keras_serializable("normwise")
class InstanceNormalization(GroupNormalization):
    """Instance norm: normalize each channel of each sample over its positions.

        y = activation(gamma * (x - mean) / sqrt(var + epsilon) + beta)

    with the mean and the variance of one sample's elements in one channel: group norm with a group
    per channel. It takes contrast and style out of an image.

    Input: (batch, ..., channels, ...), rank 2 or more, any real dtype. Output: the same shape, in
    the layer's compute dtype. A mask leaves what it masks out of the statistics.

    Args:
        axis, epsilon, center, scale, beta_initializer, gamma_initializer, beta_regularizer,
        gamma_regularizer, beta_constraint, gamma_constraint, activation: as in GroupNormalization.
        **kwargs: of the base layer, as `name` and `dtype`. `groups`, which configs saved by
            TensorFlow Addons carry, is ignored with a warning.

    Raises:
        ValueError, TypeError: as GroupNormalization.

    Numerics: as GroupNormalization.

    Reference: Ulyanov et al., Instance Normalization, 2016, https://arxiv.org/abs/1607.08022

    Example:

    >>> import numpy as np, normwise
    >>> layer = normwise.layers.InstanceNormalization(center=False, scale=False)
    >>> y = np.asarray(layer(np.random.default_rng(0).normal(3.0, 2.0, (4, 8, 8, 6))))
    >>> bool(abs(y.mean(axis=(1, 2))).max() < 1e-6)
    True
    """

    def __init__(
        self,
        axis=-1,
        epsilon=1e-3,
        center=True,
        scale=True,
        beta_initializer="zeros",
        gamma_initializer="ones",
        beta_regularizer=None,
        gamma_regularizer=None,
        beta_constraint=None,
        gamma_constraint=None,
        activation=None,
        **kwargs,
    ):
        groups = kwargs.pop("groups", geometry.INSTANCE)
        if groups != geometry.INSTANCE:
            warnings.warn(
                f"InstanceNormalization ignores groups={groups}: its groups are its channels; "
                "leave groups out, or use GroupNormalization",
                stacklevel=2,
            )
        super().__init__(
            groups=geometry.INSTANCE,
            axis=axis,
            epsilon=epsilon,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            activation=activation,
            **kwargs,
        )

    def get_config(self):
        """The arguments of the layer, whatever it was built on."""
        config = super().get_config()
        del config["groups"]
        return config


# Models saved by TensorFlow Addons name their layers so.
for _layer in (GroupNormalization, InstanceNormalization):
    keras.saving.get_custom_objects()[f"Addons>{_layer.__name__}"] = _layer
