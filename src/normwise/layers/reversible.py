"""Reversible instance norm."""

from collections.abc import Sequence
from typing import Any

import keras

from normwise import geometry, ops
from normwise.geometry import Geometry
from normwise.layers.affine import Parameter, Parametric, given
from normwise.norm import arithmetic_of, check_dtype, check_epsilon, check_mask, fits
from normwise.typing import Constraint, Initializer, Regularizer, Shape, Tensor

# What a forecast is divided by is no nearer to 0: it would be thrown out of all proportion.
_SMALLEST_GAMMA = 1e-5


@keras.saving.register_keras_serializable("normwise")
class ReversibleInstanceNormalization(Parametric):
    """Reversible instance norm (RevIN): take level and scale out of a series, and put them back.

        y = gamma * (x - mean) / deviation + beta,    deviation = sqrt(var + epsilon)
        x = (y - beta) / gamma * deviation + mean

    with the mean and the variance of one sample's feature over time. A model between the two sees
    series that are alike, however their distribution shifts, and its forecast returns to the level
    of the series that it was made for.

        y, statistics = norm(series)
        forecast = norm.invert(model(y), statistics)

    Input: (batch, time, features), or (batch, features, time) with axis=2, any real dtype. Output:
    a tensor of the same shape in the layer's compute dtype, and the statistics, a tuple of mean and
    deviation of shape (batch, 1, features), in the dtype of the arithmetic. A mask leaves padded
    steps out of the statistics.

    Args:
        axis: the time axis, 1 or 2 or as a negative number.
        epsilon: added to the variance, a number >= 0.
        affine: whether there are gamma and beta.
        beta_initializer, gamma_initializer: of beta and gamma, each (features,).
        beta_regularizer, gamma_regularizer: of beta and gamma, or None.
        beta_constraint, gamma_constraint: of beta and gamma, or None.
        **kwargs: of the base layer, as `name` and `dtype`.

    Raises:
        ValueError: on construction for another axis, and an epsilon that is negative or NaN; on a
            call for an input of another rank, features of unknown number, and a mask or statistics
            that do not fit.
        TypeError: axis is no int, epsilon no number, affine no bool, or the input complex.

    Numerics: arithmetic in float32 (float64 for float64). A series comes back to within a small
    multiple of eps * (|x| + |mean| + deviation * |beta / gamma|), a constant one as it was.

    Differences from the authors' program: it divides by gamma + epsilon^2 on the way back, and we
    by gamma itself, so that the way there is undone; where |gamma| is below 1e-5 it counts as 1e-5,
    which bounds what comes back. Its gradients take mean and deviation as constants, of which the
    paper says nothing; ours flow through them. That alters the gradient of x alone, and so the
    training of nothing but what stands before the norm.

    Reference: Kim et al., Reversible Instance Normalization for Accurate Time-Series Forecasting
        against Distribution Shift, 2022, https://openreview.net/forum?id=cGDAkQo1C0p

    Example:

    >>> import numpy as np, normwise
    >>> norm = normwise.layers.ReversibleInstanceNormalization()
    >>> y, statistics = norm(np.array([[[10.0], [14.0], [12.0]]]))
    >>> forecast = norm.invert(y[:, -1:], statistics)
    >>> keras.ops.convert_to_numpy(forecast).round(3).tolist()
    [[[12.0]]]
    """

    parameters = (Parameter("gamma"), Parameter("beta"))
    gamma: keras.Variable | None = None
    beta: keras.Variable | None = None

    # What `explain` asks of a norm.
    subtract_mean = True
    learned_epsilon = False

    def __init__(
        self,
        axis: int = 1,
        epsilon: float = 1e-5,
        affine: bool = True,
        beta_initializer: Initializer = "zeros",
        gamma_initializer: Initializer = "ones",
        beta_regularizer: Regularizer = None,
        gamma_regularizer: Regularizer = None,
        beta_constraint: Constraint = None,
        gamma_constraint: Constraint = None,
        **kwargs: Any,
    ):
        options = given(locals())
        for name in ("axis", "epsilon", "affine"):
            del options[name]
        super().__init__(**options)
        self.axis = _check_time_axis(axis)
        self.epsilon = check_epsilon(epsilon)
        if not isinstance(affine, bool):
            raise TypeError(f"affine={affine!r} is neither True nor False; use one of them")
        self.affine = affine

    @property
    def _features_axis(self) -> int:
        return 3 - self.axis % 3

    def geometry(self, input_shape: Shape) -> Geometry:
        """Which elements of an input of this shape share their statistics."""
        if len(input_shape) != 3:
            raise ValueError(
                f"shape {tuple(input_shape)} has rank {len(input_shape)}, but a series is of shape "
                "(batch, time, features); give it an axis for each, as in x[..., None]"
            )
        return geometry.group(input_shape, self._features_axis, geometry.INSTANCE)

    def build(self, input_shape: Shape) -> None:
        """Create gamma and beta for inputs of this shape."""
        shape = self.geometry(input_shape).parameter_shape
        self._add_weights(shape)
        self.input_spec = keras.InputSpec(ndim=3, axes={self._features_axis: shape[0]})

    def _wanted(self) -> list[Parameter]:
        return super()._wanted() if self.affine else []

    def call(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        statistics: Sequence[Tensor] | None = None,
    ) -> Any:
        """Normalize `inputs`, or with `statistics` do what `invert` does.

        Args:
            inputs: the series.
            mask: bool, of the shape of the inputs or of their first axes, as (batch, time) where
                axis is 1, True = keep; leaves elements out of the statistics.
            statistics: those of a series that was normalized.

        Returns:
            The normalized series and the statistics (mean, deviation); or a series.
        """
        if statistics is not None:
            self._check_statistics(inputs, statistics)
            return self._inverted(inputs, *statistics)
        y, *others = ops.instance_norm(
            inputs,
            self.gamma,
            self.beta,
            axis=self._features_axis,
            epsilon=self.epsilon,
            mask=mask,
            return_statistics=True,
            dtype=self.compute_dtype,
        )
        return y, tuple(others)

    def invert(self, y: Tensor, statistics: Sequence[Tensor]) -> Tensor:
        """Give a normalized series, as a forecast, the level and scale of the one it came of.

            x = (y - beta) / gamma * deviation + mean

        In a functional model it is a call of this layer more, which is saved with the model.

        Args:
            y: tensor (batch, time, features), or as `axis` has it, of any number of time steps.
            statistics: what the call on the series returned, (mean, deviation).

        Returns:
            A tensor of the shape of y and the dtype of the statistics, which may be wider than the
            layer's compute dtype: a series need not fit into float16.

        Raises:
            ValueError: the statistics do not fit y.
        """
        return self(y, statistics=statistics)

    def _inverted(self, y: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
        arithmetic = keras.backend.standardize_dtype(mean.dtype)
        y = keras.ops.cast(y, arithmetic)
        if self.gamma is not None:
            shape = self.geometry(y.shape).broadcast_shape(self.gamma.shape)
            gamma, beta = (
                keras.ops.reshape(keras.ops.cast(weight, arithmetic), shape)
                for weight in (self.gamma, self.beta)
            )
            y = (y - beta) / _away_from_zero(gamma)
        return y * deviation + mean

    def _check_statistics(self, y: Tensor, statistics: Sequence[Tensor]) -> None:
        wanted = self.geometry(y.shape).broadcast_statistics_shape
        shapes = [tuple(each.shape) for each in statistics]
        if len(shapes) != 2 or not all(fits(shape, wanted) for shape in shapes):
            raise ValueError(
                f"statistics have the shapes {shapes}, but y of shape {tuple(y.shape)} needs a "
                f"mean and a deviation of shape {wanted}; pass what the call on the series returned"
            )

    def compute_output_shape(self, input_shape: Shape) -> tuple[Any, ...]:
        """The shape of the normalized series, and those of the statistics."""
        statistics = self.geometry(input_shape).broadcast_statistics_shape
        return tuple(input_shape), (statistics, statistics)

    def compute_output_spec(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        statistics: Sequence[Tensor] | None = None,
    ) -> Any:
        """A symbol of each result, with the errors that a call would raise."""
        given = check_dtype(inputs.dtype)
        if statistics is not None:
            self._check_statistics(inputs, statistics)
            return keras.KerasTensor(inputs.shape, dtype=statistics[0].dtype)
        if mask is not None:
            check_mask(self.geometry(inputs.shape), mask)
        arithmetic = arithmetic_of(given, self.compute_dtype)
        shape, of_statistics = self.compute_output_shape(inputs.shape)
        return keras.KerasTensor(shape, dtype=self.compute_dtype), tuple(
            keras.KerasTensor(each, dtype=arithmetic) for each in of_statistics
        )

    def get_config(self) -> dict[str, Any]:
        """The arguments of the layer, whatever it was built on."""
        config = {"axis": self.axis, "epsilon": self.epsilon, "affine": self.affine}
        return {**super().get_config(), **config}


def _check_time_axis(axis: Any) -> int:
    """Return `axis` as an int if it can be the time axis of a series."""
    axes = geometry.check_axes(axis)
    if axes not in (1, 2, -1, -2):
        raise ValueError(
            f"axis={axis} is no time axis of a series; use axis=1 for (batch, time, features), "
            "axis=2 for (batch, features, time)"
        )
    return axes


def _away_from_zero(gamma: Tensor) -> Tensor:
    """Gamma, but of no smaller absolute value than _SMALLEST_GAMMA."""
    smallest = keras.ops.where(gamma < 0, -_SMALLEST_GAMMA, _SMALLEST_GAMMA)
    smallest = keras.ops.cast(smallest, gamma.dtype)
    return keras.ops.where(keras.ops.abs(gamma) < _SMALLEST_GAMMA, smallest, gamma)
