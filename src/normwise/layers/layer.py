"""Layer norm and RMS norm."""

import warnings
from typing import Any

import keras

from normwise import geometry, ops
from normwise.geometry import Geometry
from normwise.kernels import composite
from normwise.layers.affine import Affine, Parameter, given
from normwise.norm import (
    Operands,
    check_dtype,
    check_mask,
    check_shapes,
    mask_beside,
    sum_dtype,
)
from normwise.typing import Activation, Axis, Constraint, Initializer, Regularizer, Shape, Tensor


class _OverAxes(Affine):
    """A norm over any axes, named when it is made: an int, or a list as configs keep it."""

    def __init__(self, *, axis: Axis, **kwargs: Any):
        checked = geometry.check_axes(axis)
        super().__init__(axis=checked if isinstance(checked, int) else list(checked), **kwargs)

    def geometry(self, input_shape: Shape) -> Geometry:
        """Which elements of an input of this shape share their statistics."""
        return geometry.layer(input_shape, self.axis)


@keras.saving.register_keras_serializable("normwise")
class LayerNormalization(_OverAxes):
    """Layer norm: normalize over the axes named, every other position by itself.

        y = activation(gamma * (x - mean) / sqrt(var + epsilon) + beta)

    with the mean and the variance over `axis`. `axis=-1` on an image normalizes each pixel over its
    channels; all activations of a sample are `axis=[1, 2, 3]`.

    Input: rank 2 or more, any real dtype. Output: the same shape, in the layer's compute dtype. A
    mask leaves what it masks out of the statistics; a set that is masked as a whole is normalized
    with mean 0 and variance 1. Called with `residual=`, a tensor of the input's shape, the layer
    normalizes the sum of both, rounded to the dtype of the input, and returns that too: (y, sum).

    Args:
        axis: an int, or a list of axes in any order.
        epsilon: added to the variance, a number >= 0.
        center: whether to add beta.
        scale: whether to multiply by gamma.
        beta_initializer, gamma_initializer: of beta and gamma, each of the shape of the input's
            normalized axes in ascending order.
        beta_regularizer, gamma_regularizer: of beta and gamma, or None.
        beta_constraint, gamma_constraint: of beta and gamma, or None.
        activation: applied to the result, a name or a callable, or None.
        gamma_offset: added to gamma. With 1 and `gamma_initializer="zeros"` weight decay draws the
            scale to 1, not to 0.
        **kwargs: of the base layer, as `name` and `dtype`. Keras's deprecated `rms_scaling=True`
            gives gamma * x / sqrt(var + epsilon), with a warning.

    Raises:
        ValueError: on construction for an epsilon that is negative or NaN, and a gamma_offset that
            is not finite; on the first call for an axis out of range or named twice, and for
            normalized axes of unknown extent.
        TypeError: axis is neither an int nor a list of ints, or epsilon or gamma_offset no number.

    Numerics: arithmetic in float32 (float64 for float64), error of y below a small multiple of
    eps * (1 + |mean| / std): see docs/numerics.md.

    Reference: Ba et al., Layer Normalization, 2016, https://arxiv.org/abs/1607.06450

    Example:

    >>> import numpy as np, normwise
    >>> layer = normwise.layers.LayerNormalization(axis=[2, 1])
    >>> y = layer(np.ones((4, 8, 6), "float32"))
    >>> tuple(layer.gamma.shape)
    (8, 6)
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
        rms_scaling = bool(options.pop("rms_scaling", False))
        if rms_scaling:
            warnings.warn(
                "rms_scaling=True divides by the standard deviation, not by the root mean square, "
                "and Keras deprecates it; use RMSNormalization",
                stacklevel=2,
            )
            options |= {"center": False, "scale": True}
        super().__init__(**options)
        self.rms_scaling = rms_scaling

    def normalize(
        self, inputs: Tensor, gamma: Tensor | None, beta: Tensor | None, **options: Any
    ) -> Any:
        """Call `ops.layer_norm` with the layer's arguments, but another gamma and beta."""
        if not self.rms_scaling:
            return self._normalized(ops.layer_norm, inputs, gamma, beta, **options)
        residual = options.pop("residual", None)
        if residual is None:
            return self._divided_by_deviation(inputs, gamma, beta, **options)
        check_shapes(self.geometry(inputs.shape), Operands(residual=residual))
        dtype = sum_dtype(check_dtype(inputs.dtype), options["dtype"])
        total = composite.summed(inputs, residual, dtype)
        return self._divided_by_deviation(total, gamma, beta, **options), total

    def _divided_by_deviation(
        self,
        inputs: Tensor,
        gamma: Tensor,
        beta: Tensor | None,
        *,
        gamma_offset: float,
        mask: Tensor | None,
        dtype: str,
    ) -> Tensor:
        # Layer norm of a further element that is 0, and masked so that the statistics are those of
        # the others, is what the mean adds: -mean / sqrt(var + epsilon).
        found = self.geometry(inputs.shape)
        axis = found.set_axes[-1]
        further = [(0, int(each == axis)) for each in range(len(inputs.shape))]
        wide = keras.backend.result_type(check_dtype(inputs.dtype), "float32")
        x = keras.ops.cast(inputs, wide)
        keep = keras.ops.ones_like(x, "bool")
        if mask is not None:
            check_mask(found, mask)
            keep = keras.ops.logical_and(keep, mask_beside(inputs, mask))
        y = ops.layer_norm(
            keras.ops.pad(x, further),
            axis=self.axis,
            epsilon=self.epsilon,
            mask=keras.ops.pad(keep, further),
            dtype=wide,
        )
        before = (slice(None),) * axis
        y = y[(*before, slice(None, -1))] - y[(*before, slice(-1, None))]
        y = y * (composite.spread(keras.ops.cast(gamma, wide), found) + gamma_offset)
        if beta is not None:
            y = y + composite.spread(keras.ops.cast(beta, wide), found)
        return self.activation(keras.ops.cast(y, dtype))

    def get_config(self) -> dict[str, Any]:
        """The arguments of the layer, whatever it was built on."""
        config = super().get_config()
        return {**config, "rms_scaling": True} if self.rms_scaling else config


@keras.saving.register_keras_serializable("normwise")
class RMSNormalization(_OverAxes):
    """RMS norm: divide by the root mean square over the axes named; no mean is subtracted.

        y = activation(gamma * x / sqrt(mean(x^2) + epsilon))

    Input: rank 2 or more, any real dtype. Output: the same shape, in the layer's compute dtype. A
    mask leaves what it masks out of the statistics; a set that is masked as a whole is normalized
    with mean square 1. Called with `residual=`, a tensor of the input's shape, the layer
    normalizes the sum of both, rounded to the dtype of the input, and returns that too: (y, sum).

    Args:
        axis: an int, or a list of axes in any order.
        epsilon: added to the mean square, a number >= 0.
        scale: whether to multiply by gamma.
        gamma_initializer: of gamma, which has the shape of the input's normalized axes in ascending
            order.
        gamma_regularizer, gamma_constraint: of gamma, or None.
        activation: applied to the result, a name or a callable, or None.
        gamma_offset: added to gamma. With 1 and `gamma_initializer="zeros"` weight decay draws the
            scale to 1, not to 0.
        **kwargs: of the base layer, as `name` and `dtype`.

    Raises:
        ValueError, TypeError: as LayerNormalization.

    Numerics: arithmetic in float32 (float64 for float64), error of y below a small multiple of eps.

    Reference: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019,
        https://arxiv.org/abs/1910.07467

    Example:

    >>> import numpy as np, normwise
    >>> layer = normwise.layers.RMSNormalization(axis=1)
    >>> y = layer(np.ones((4, 8, 6), "float32"))
    >>> [(w.name, tuple(w.shape)) for w in layer.weights]
    [('gamma', (8,))]
    """

    parameters = (Parameter("gamma", option="scale"),)
    subtract_mean = False

    def __init__(
        self,
        axis: Axis = -1,
        epsilon: float = 1e-6,
        scale: bool = True,
        gamma_initializer: Initializer = "ones",
        gamma_regularizer: Regularizer = None,
        gamma_constraint: Constraint = None,
        activation: Activation = None,
        gamma_offset: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(**given(locals()))

    def normalize(
        self, inputs: Tensor, gamma: Tensor | None, beta: Tensor | None, **options: Any
    ) -> Any:
        """Call `ops.rms_norm` with the layer's arguments, but another gamma and beta."""
        return self._normalized(ops.rms_norm, inputs, gamma, beta, **options)
