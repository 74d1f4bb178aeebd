"""Global response norm."""

from typing import Any

import keras

from normwise import geometry
from normwise.geometry import Geometry
from normwise.kernels import composite
from normwise.layers.affine import Parameter, Parametric, given
from normwise.norm import arithmetic_of, check_dtype, check_epsilon, check_mask, mask_beside
from normwise.typing import Axis, Constraint, Initializer, Regularizer, Shape, Tensor


@keras.saving.register_keras_serializable("normwise")
class GlobalResponseNormalization(Parametric):
    """Global response norm: let the channels of a sample compete by their length.

        y = gamma * (x * n) + beta + x,    n = g / (mean(g) + epsilon)

    with g the 2-norm of a channel over the positions of one sample, and its mean over the channels.
    What stands out among the channels is raised and the rest lowered, so that none of them goes
    quiet. Independent of the batch. gamma and beta are 0 at first, so that y is x.

    Input: (batch, ..., channels, ...), rank 2 or more, any real dtype; of rank 2 a channel's norm
    is its absolute value. Output: the same shape, in the layer's compute dtype. A mask leaves what
    it masks out of g.

    gamma and beta, each (channels,), are what timm calls `weight` and `bias`, in the same order.

    Args:
        epsilon: added to the mean of g, a number >= 0; where both are 0, so is n.
        axis: the channel axis, an int or a list of one; any but the batch.
        beta_initializer, gamma_initializer: of beta and gamma.
        beta_regularizer, gamma_regularizer: of beta and gamma, or None.
        beta_constraint, gamma_constraint: of beta and gamma, or None.
        **kwargs: of the base layer, as `name` and `dtype`.

    Raises:
        ValueError: on construction for the batch axis, and an epsilon that is negative or NaN; on
            the first call for channels of unknown number, an axis out of range, and a mask that
            does not fit.
        TypeError: axis is no int, epsilon no number, or the input complex.

    Numerics: arithmetic in float32 (float64 for float64), error of y below a small multiple of eps
    where the squares neither overflow nor underflow. A channel of zeros has norm 0 and adds nothing
    to the gradient by it.

    Reference: Woo et al., ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders,
        2023, https://arxiv.org/abs/2301.00808

    Example:

    >>> import numpy as np, normwise
    >>> layer = normwise.layers.GlobalResponseNormalization(gamma_initializer="ones")
    >>> y = layer(np.array([[[3.0, 0.0, 1.0], [4.0, 0.0, 0.0]]]))
    >>> keras.ops.convert_to_numpy(y).round(3).tolist()
    [[[10.5, 0.0, 1.5], [14.0, 0.0, 0.0]]]
    """

    parameters = (Parameter("gamma"), Parameter("beta"))

    def __init__(
        self,
        epsilon: float = 1e-6,
        axis: Axis = -1,
        beta_initializer: Initializer = "zeros",
        gamma_initializer: Initializer = "zeros",
        beta_regularizer: Regularizer = None,
        gamma_regularizer: Regularizer = None,
        beta_constraint: Constraint = None,
        gamma_constraint: Constraint = None,
        **kwargs: Any,
    ):
        options = given(locals())
        epsilon, axis = options.pop("epsilon"), options.pop("axis")
        super().__init__(**options)
        self.epsilon = check_epsilon(epsilon)
        self.axis = geometry.check_channel_axis(axis)

    def geometry(self, input_shape: Shape) -> Geometry:
        """Which elements of an input of this shape share a norm."""
        return geometry.group(input_shape, self.axis, geometry.INSTANCE)

    def build(self, input_shape: Shape) -> None:
        """Create gamma and beta for inputs of this shape."""
        shape = self.geometry(input_shape).parameter_shape
        self._add_weights(shape)
        self.input_spec = keras.InputSpec(ndim=len(input_shape), axes={self.axis: shape[0]})

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scale `inputs` by their norms; `mask` (True = keep) leaves elements out of these."""
        arithmetic = arithmetic_of(check_dtype(inputs.dtype), self.compute_dtype)
        sets = self.geometry(inputs.shape)
        x = kept = keras.ops.cast(inputs, arithmetic)
        if mask is not None:
            check_mask(sets, mask)
            x, keep = composite.readable(x, mask_beside(x, mask))
            kept = keras.ops.where(keep, x, 0)
        gamma, beta = (
            composite.spread(keras.ops.cast(weight, arithmetic), sets)
            for weight in (self.gamma, self.beta)
        )
        y = gamma * (x * self._response(kept, sets)) + beta + x
        return keras.ops.cast(y, self.compute_dtype)

    def _response(self, x: Tensor, sets: Geometry) -> Tensor:
        """The norm of each channel of a sample, divided by the mean of the sample's norms."""
        square = composite.total(keras.ops.square(x), sets)
        # The root has no derivative at 0, where a channel of zeros has nothing to say.
        silent = square == 0
        norm = keras.ops.where(silent, 0, keras.ops.sqrt(keras.ops.where(silent, 1, square)))
        (channel,) = sets.parameter_axes
        # Not ops.mean, which on PyTorch takes that of float64 in float32.
        mean = keras.ops.sum(norm, axis=channel, keepdims=True) / sets.groups
        divisor = mean + self.epsilon
        return norm / keras.ops.where(divisor == 0, 1, divisor)

    def compute_output_shape(self, input_shape: Shape) -> tuple[int | None, ...]:
        """The shape of the input."""
        self.geometry(input_shape)
        return tuple(input_shape)

    def compute_output_spec(
        self, inputs: Tensor, mask: Tensor | None = None, **kwargs: Any
    ) -> keras.KerasTensor:
        """A symbol of the result, with the errors that a call would raise."""
        check_dtype(inputs.dtype)
        if mask is not None:
            check_mask(self.geometry(inputs.shape), mask)
        return super().compute_output_spec(inputs, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the layer, whatever it was built on."""
        return {**super().get_config(), "epsilon": self.epsilon, "axis": self.axis}
