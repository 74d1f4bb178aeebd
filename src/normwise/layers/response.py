"""Filter response norm, and the thresholded linear unit made to follow it."""

from typing import Any

import keras

from normwise import geometry, ops
from normwise.geometry import Geometry
from normwise.layers.affine import Affine, Parameter, Parametric, given
from normwise.norm import arithmetic_of, check_dtype
from normwise.typing import Activation, Axis, Constraint, Initializer, Regularizer, Shape, Tensor


@keras.saving.register_keras_serializable("normwise")
class FilterResponseNormalization(Affine):
    """Filter response norm: divide each channel of each sample by its root mean square.

        y = activation(gamma * x / sqrt(mean(x^2) + epsilon + |learned_epsilon|) + beta)

    with the mean over the positions of one sample's channel; no mean is subtracted. Independent of
    the batch. Made to be followed by a TLU, whose threshold replaces the zero of a relu.

    Input: (batch, ..., channels, ...), rank 2 or more, any real dtype. Output: the same shape, in
    the layer's compute dtype. A mask leaves what it masks out of the statistics; a set that is
    masked as a whole is normalized with mean square 1. Called with `residual=`, a tensor of the
    input's shape, the layer normalizes the sum of both, rounded to the dtype of the input, and
    returns that too: (y, sum).

    gamma and beta have the rank of the input and an extent of 1 everywhere but on the channel axis:
    (1, 1, 1, channels) for images with channels last. TensorFlow Addons keeps them so, and weights
    that it saved go in as they are. With a learned epsilon the weights are learned_epsilon (1,),
    gamma and beta, in its order too.

    Args:
        epsilon: added to the mean square, a number >= 0.
        axis: the spatial axes, which are all but the batch and the channels: an int, or a list of
            axes in any order, empty for (batch, channels). [2, 3] for images with channels first.
        beta_initializer, gamma_initializer: of beta and gamma.
        beta_regularizer, gamma_regularizer: of beta and gamma, or None.
        beta_constraint, gamma_constraint: of beta and gamma, or None.
        learned_epsilon: whether the absolute value of a weight, 1e-4 at first, is added to epsilon;
            where positions are few or one, y is hardly more than the sign of x without. The native
            kernels do not take it.
        learned_epsilon_constraint: of that weight, or None.
        name: of the layer.
        activation: applied to the result, a name or a callable, or None.
        gamma_offset: added to gamma. With 1 and `gamma_initializer="zeros"` weight decay draws the
            scale to 1, not to 0.
        **kwargs: of the base layer, as `dtype`.

    Raises:
        ValueError: on construction for the batch axis, an epsilon that is negative or NaN, and a
            gamma_offset that is not finite; on the first call for axes that are not those of the
            input but two, channels of unknown number, and an axis out of range or named twice.
        TypeError: axis is neither an int nor a list of ints, or epsilon or gamma_offset no number.

    Numerics: arithmetic in float32 (float64 for float64), error of y below a small multiple of eps.

    Reference: Singh and Krishnan, Filter Response Normalization Layer, 2019,
        https://arxiv.org/abs/1911.09737

    Example:

    >>> import numpy as np, normwise
    >>> layer = normwise.layers.FilterResponseNormalization(axis=[2, 3], learned_epsilon=True)
    >>> y = layer(np.ones((4, 6, 8, 8), "float32"))
    >>> [(w.name, tuple(w.shape)) for w in layer.weights]
    [('learned_epsilon', (1,)), ('gamma', (1, 6, 1, 1)), ('beta', (1, 6, 1, 1))]
    """

    parameters = (
        Parameter(
            "learned_epsilon",
            option="learned_epsilon",
            kinds=("constraint",),
            attribute="eps_learned",
            shape=(1,),
        ),
        Parameter("gamma"),
        Parameter("beta"),
    )
    learned_epsilon_initializer = keras.initializers.Constant(1e-4)
    learned_epsilon_regularizer = None
    eps_learned = None
    subtract_mean = False

    def __init__(
        self,
        epsilon: float = 1e-6,
        axis: Axis = geometry.SPATIAL,
        beta_initializer: Initializer = "zeros",
        gamma_initializer: Initializer = "ones",
        beta_regularizer: Regularizer = None,
        gamma_regularizer: Regularizer = None,
        beta_constraint: Constraint = None,
        gamma_constraint: Constraint = None,
        learned_epsilon: bool = False,
        learned_epsilon_constraint: Constraint = None,
        name: str | None = None,
        activation: Activation = None,
        gamma_offset: float = 0.0,
        **kwargs: Any,
    ):
        options = given(locals())
        options["axis"] = list(geometry.check_spatial_axes(axis))
        options["learned_epsilon"] = bool(learned_epsilon)
        super().__init__(**options)

    def geometry(self, input_shape: Shape) -> Geometry:
        """Which elements of an input of this shape share their statistics."""
        return geometry.response(input_shape, self.axis)

    def build(self, input_shape: Shape) -> None:
        """Create the weights for inputs of this shape."""
        super().build(input_shape)
        (channel,) = self.geometry(input_shape).parameter_axes
        channels = tuple(input_shape)[channel]
        self.input_spec = keras.InputSpec(ndim=len(input_shape), axes={channel: channels})

    def _parameter_shape(self, geometry: Geometry) -> tuple[int | None, ...]:
        return geometry.broadcast_shape(geometry.parameter_shape)

    def own(self) -> tuple[Tensor | None, Tensor | None]:
        """The layer's gamma and beta, each (channels,)."""
        return keras.ops.reshape(self.gamma, (-1,)), keras.ops.reshape(self.beta, (-1,))

    def normalize(
        self, inputs: Tensor, gamma: Tensor | None, beta: Tensor | None, **options: Any
    ) -> Any:
        """Call `ops.filter_response_norm` with the layer's arguments, but another gamma and beta.

        The learned epsilon is the layer's.
        """
        options["learned_epsilon"] = self.eps_learned
        return self._normalized(ops.filter_response_norm, inputs, gamma, beta, **options)


@keras.saving.register_keras_serializable("normwise")
class TLU(Parametric):
    """Thresholded linear unit: a relu whose threshold is learned.

        y = max(x, tau),    affine: y = max(x, alpha * x + tau)

    with a tau and an alpha for every element of a sample, as TensorFlow Addons has them (the paper
    has one for every channel). Where the two are equal the whole gradient is that of x.

    Input: rank 2 or more, any real dtype, every extent but the batch known. Output: the same shape,
    in the layer's compute dtype. A mask is passed on.

    Args:
        affine: whether alpha * x is added to tau.
        tau_initializer, alpha_initializer: of tau and alpha, each of the input's shape without the
            batch.
        tau_regularizer, alpha_regularizer: of tau and alpha, or None.
        tau_constraint, alpha_constraint: of tau and alpha, or None.
        **kwargs: of the base layer, as `name` and `dtype`.

    Raises:
        ValueError: on the first call for an input of rank 1, and for extents that are unknown.
        TypeError: the input is complex.

    Numerics: arithmetic in float32, in float64 where the input or the layer is.

    Reference: Singh and Krishnan, Filter Response Normalization Layer, 2019,
        https://arxiv.org/abs/1911.09737

    Example:

    >>> import numpy as np, normwise
    >>> layer = normwise.layers.TLU(tau_initializer=keras.initializers.Constant(-1.0))
    >>> keras.ops.convert_to_numpy(layer(np.array([[-3.0, 0.5]]))).tolist()
    [[-1.0, 0.5]]
    """

    parameters = (Parameter("tau"), Parameter("alpha", option="affine"))
    tau = alpha = None

    def __init__(
        self,
        affine: bool = False,
        tau_initializer: Initializer = "zeros",
        tau_regularizer: Regularizer = None,
        tau_constraint: Constraint = None,
        alpha_initializer: Initializer = "zeros",
        alpha_regularizer: Regularizer = None,
        alpha_constraint: Constraint = None,
        **kwargs: Any,
    ):
        super().__init__(**given(locals()))

    def build(self, input_shape: Shape) -> None:
        """Create tau and alpha for inputs of this shape."""
        _, *extents = shape = tuple(input_shape)
        if not extents:
            raise ValueError(
                f"shape {shape} has rank 1, but TLU needs a batch axis and at least one more; add "
                "an axis, as in x[None, :]"
            )
        if None in extents:
            raise ValueError(
                f"shape {shape} has an unknown extent, but tau has a value for every element of a "
                "sample; give all but the batch a fixed extent, as in keras.Input((32, 32, 16))"
            )
        self._add_weights(extents)
        self.input_spec = keras.InputSpec(ndim=len(shape), axes=dict(enumerate(extents, start=1)))

    def call(self, inputs: Tensor) -> Tensor:
        """The larger of `inputs` and the threshold."""
        arithmetic = arithmetic_of(check_dtype(inputs.dtype), self.compute_dtype)
        x = keras.ops.cast(inputs, arithmetic)
        threshold = keras.ops.cast(self.tau, arithmetic)
        if self.affine:
            threshold = threshold + keras.ops.cast(self.alpha, arithmetic) * x
        # Not ops.maximum: at equal arguments TensorFlow gives x the whole gradient and JAX and
        # PyTorch half of it, and zeros at a threshold of 0 are many. A NaN in x is kept.
        above = keras.ops.logical_or(x >= threshold, keras.ops.isnan(x))
        return keras.ops.cast(keras.ops.where(above, x, threshold), self.compute_dtype)

    def compute_output_shape(self, input_shape: Shape) -> tuple[int | None, ...]:
        """The shape of the input."""
        return tuple(input_shape)


# Models saved by TensorFlow Addons name their layers so.
for _layer in (FilterResponseNormalization, TLU):
    keras.saving.get_custom_objects()[f"Addons>{_layer.__name__}"] = _layer
