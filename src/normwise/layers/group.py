"""Group norm and instance norm."""

import warnings
from typing import Any

import keras

from normwise import geometry, ops
from normwise.geometry import Geometry
from normwise.layers.affine import Affine, given
from normwise.typing import Activation, Axis, Constraint, Initializer, Regularizer, Shape, Tensor


@keras.saving.register_keras_serializable("normwise")
class GroupNormalization(Affine):
    """Group norm: normalize each sample over groups of its channels.

        y = activation(gamma * (x - mean) / sqrt(var + epsilon) + beta)

    with the mean and the variance of one sample's elements in one group of neighbouring channels.
    Independent of the batch, so it serves where batches are small. With one group it is nearly
    layer norm over the whole sample, but gamma and beta have one value per channel.

    Input: (batch, ..., channels, ...), rank 2 or more, any real dtype. Output: the same shape, in
    the layer's compute dtype. A mask leaves what it masks out of the statistics. Called with
    `residual=`, a tensor of the input's shape, the layer normalizes the sum of both, rounded to the
    dtype of the input, and returns that too: (y, sum).

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
        gamma_offset: added to gamma. With 1 and `gamma_initializer="zeros"` weight decay draws the
            scale to 1, not to 0.
        **kwargs: of the base layer, as `name` and `dtype`.

    Raises:
        ValueError: on construction for groups that is 0, below -1 or no int, the batch axis, and an
            epsilon that is negative or NaN, or a gamma_offset that is not finite; on the first call
            for groups that do not divide the channels, channels of unknown number, and an axis out
            of range.
        TypeError: axis is no int, or epsilon or gamma_offset no number.

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

    axis: int

    def __init__(
        self,
        groups: int = 32,
        axis: Axis = -1,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Initializer = "zeros",
        gamma_initializer: Initializer = "ones",
        beta_regularizer: Regularizer = None,
        gamma_regularizer: Regularizer = None,
        beta_constraint: Constraint = None,
        gamma_constraint: Constraint = None,
        activation: Activation = None,
        gamma_offset: float = 0.0,
        **kwargs: Any,
    ):
        options = given(locals())
        options["axis"] = geometry.check_channel_axis(axis)
        groups = options.pop("groups")
        super().__init__(**options)
        self.groups = geometry.check_groups(groups)

    def geometry(self, input_shape: Shape) -> Geometry:
        """Which elements of an input of this shape share their statistics."""
        return geometry.group(input_shape, self.axis, self.groups)

    def build(self, input_shape: Shape) -> None:
        """Create gamma and beta for inputs of this shape."""
        super().build(input_shape)
        channels = input_shape[self.axis]
        self.input_spec = keras.InputSpec(ndim=len(input_shape), axes={self.axis: channels})

    def normalize(
        self, inputs: Tensor, gamma: Tensor | None, beta: Tensor | None, **options: Any
    ) -> Any:
        """Call `ops.group_norm` with the layer's arguments, but another gamma and beta."""
        options["groups"] = self.groups
        return self._normalized(ops.group_norm, inputs, gamma, beta, **options)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the layer, whatever it was built on."""
        return {**super().get_config(), "groups": self.groups}


@keras.saving.register_keras_serializable("normwise")
class InstanceNormalization(GroupNormalization):
    """Instance norm: normalize each channel of each sample over its positions.

        y = activation(gamma * (x - mean) / sqrt(var + epsilon) + beta)

    with the mean and the variance of one sample's elements in one channel: group norm with a group
    per channel. It takes contrast and style out of an image.

    Input: (batch, ..., channels, ...), rank 2 or more, any real dtype. Output: the same shape, in
    the layer's compute dtype. A mask leaves what it masks out of the statistics. Called with
    `residual=`, a tensor of the input's shape, the layer normalizes the sum of both, rounded to the
    dtype of the input, and returns that too: (y, sum).

    Args:
        axis, epsilon, center, scale, beta_initializer, gamma_initializer, beta_regularizer,
        gamma_regularizer, beta_constraint, gamma_constraint, activation, gamma_offset: as in
        GroupNormalization.
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
        axis: Axis = -1,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Initializer = "zeros",
        gamma_initializer: Initializer = "ones",
        beta_regularizer: Regularizer = None,
        gamma_regularizer: Regularizer = None,
        beta_constraint: Constraint = None,
        gamma_constraint: Constraint = None,
        activation: Activation = None,
        gamma_offset: float = 0.0,
        **kwargs: Any,
    ):
        options = given(locals())
        groups = options.pop("groups", geometry.INSTANCE)
        if groups != geometry.INSTANCE:
            warnings.warn(
                f"InstanceNormalization ignores groups={groups}: its groups are its channels; "
                "leave groups out, or use GroupNormalization",
                stacklevel=2,
            )
        super().__init__(groups=geometry.INSTANCE, **options)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the layer, whatever it was built on."""
        # Not that of group norm: the groups are no argument.
        return super(GroupNormalization, self).get_config()


# Models saved by TensorFlow Addons name their layers so.
for _layer in (GroupNormalization, InstanceNormalization):
    keras.saving.get_custom_objects()[f"Addons>{_layer.__name__}"] = _layer
