"""The layer-normalized recurrent cells of TensorFlow Addons, for `keras.layers.RNN`."""

import numbers
from collections.abc import Sequence
from typing import Any

import keras
from keras import constraints, initializers, regularizers

from normwise.layers import LayerNormalization
from normwise.layers.affine import KINDS, given
from normwise.typing import Activation, Constraint, Initializer, Regularizer, Shape, Tensor

__all__ = ["LayerNormLSTMCell", "LayerNormSimpleRNNCell"]


@keras.saving.register_keras_serializable("normwise")
class LayerNormLSTMCell(keras.layers.LSTMCell):
    """LSTM cell with layer norm before its nonlinearities.

        z = kernel_norm(x @ kernel) + recurrent_norm(h @ recurrent_kernel) + bias
        i, f, candidate, o = the quarters of z
        carry = recurrent_activation(f) * c + recurrent_activation(i) * activation(candidate)
        c = state_norm(carry)
        h = recurrent_activation(o) * activation(c)

    with three layer norms over the last axis, each with gamma and beta. As in TensorFlow Addons the
    carry that goes on to the next step is the normalized one; in the paper only h sees the norm.

    Input of a step: (batch, features) and the states [h, c], each (batch, units). Output: h and
    [h, c], in the cell's compute dtype. `keras.layers.RNN(cell)` runs it over (batch, time,
    features). Weights in order: kernel (features, 4 * units), recurrent_kernel (units, 4 * units),
    bias (4 * units,), then gamma and beta of kernel_norm and recurrent_norm (4 * units,) and of
    state_norm (units,).

    Args:
        units: the size of h and of c, a positive int.
        activation, recurrent_activation: names or callables, or None for the identity.
        use_bias: whether to add the bias.
        kernel_initializer, recurrent_initializer, bias_initializer: of the weights of these names.
        unit_forget_bias: whether the bias of the forget gate f begins at 1.
        kernel_regularizer, recurrent_regularizer, bias_regularizer: of the same, or None.
        kernel_constraint, recurrent_constraint, bias_constraint: of the same, or None.
        dropout: the share of the inputs to drop in training, >= 0 and < 1.
        recurrent_dropout: the same of h on its way to the gates.
        norm_gamma_initializer, norm_beta_initializer: of the three norms.
        norm_epsilon: added to the variances, a number >= 0.
        seed: of the dropout, an int or None.
        **kwargs: of the base layer, as `name` and `dtype`. `implementation`, which configs of
            Keras 2 carry, changes nothing.

    Raises:
        ValueError: units is no positive int, a dropout is not in [0, 1), or the epsilon is negative
            or NaN.
        TypeError: the epsilon is no number.

    Numerics: norms as in LayerNormalization, in float32 (float64 for float64) under any dtype
    policy. What is dropped is drawn once per sequence, the same for all four gates and every step.

    Reference: Ba et al., Layer Normalization, 2016, https://arxiv.org/abs/1607.06450; dropout of
        Semeniuta et al., Recurrent Dropout without Memory Loss, 2016,
        https://arxiv.org/abs/1603.05118

    Example:

    >>> import keras, numpy as np, normwise
    >>> layer = keras.layers.RNN(normwise.rnn.LayerNormLSTMCell(4), return_sequences=True)
    >>> tuple(layer(np.ones((32, 10, 8), "float32")).shape)
    (32, 10, 4)
    """

    def __init__(
        self,
        units: int,
        activation: Activation = "tanh",
        recurrent_activation: Activation = "sigmoid",
        use_bias: bool = True,
        kernel_initializer: Initializer = "glorot_uniform",
        recurrent_initializer: Initializer = "orthogonal",
        bias_initializer: Initializer = "zeros",
        unit_forget_bias: bool = True,
        kernel_regularizer: Regularizer = None,
        recurrent_regularizer: Regularizer = None,
        bias_regularizer: Regularizer = None,
        kernel_constraint: Constraint = None,
        recurrent_constraint: Constraint = None,
        bias_constraint: Constraint = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        norm_gamma_initializer: Initializer = "ones",
        norm_beta_initializer: Initializer = "zeros",
        norm_epsilon: float = 1e-3,
        seed: int | None = None,
        **kwargs: Any,
    ):
        options = given(locals())
        own = ("norm_gamma_initializer", "norm_beta_initializer", "norm_epsilon")
        super().__init__(**_of_keras(options, own))
        self.norm_gamma_initializer = initializers.get(norm_gamma_initializer)
        self.norm_beta_initializer = initializers.get(norm_beta_initializer)
        self.kernel_norm = self._norm("kernel_norm", norm_epsilon)
        self.recurrent_norm = self._norm("recurrent_norm", norm_epsilon)
        self.state_norm = self._norm("state_norm", norm_epsilon)
        self.norm_epsilon = self.state_norm.epsilon

    def _norm(self, name: str, epsilon: float) -> LayerNormalization:
        return LayerNormalization(
            epsilon=epsilon,
            gamma_initializer=self.norm_gamma_initializer,
            beta_initializer=self.norm_beta_initializer,
            name=name,
            trainable=self.trainable,
            dtype=self.dtype_policy,
        )

    def build(self, input_shape: Shape) -> None:
        """Create the weights for inputs (batch, features)."""
        super().build(input_shape)
        self.kernel_norm.build((input_shape[0], 4 * self.units))
        self.recurrent_norm.build((input_shape[0], 4 * self.units))
        self.state_norm.build((input_shape[0], self.units))

    def call(
        self, inputs: Tensor, states: Sequence[Tensor], training: bool | None = False
    ) -> tuple[Tensor, list[Tensor]]:
        """One step from `states`, [h, c]: the new h, and the new states."""
        h, c = states
        if training:
            inputs = _dropped(inputs, self.get_dropout_mask(inputs))
            h = _dropped(h, self.get_recurrent_dropout_mask(h))
        # Not keras.ops.matmul, which on PyTorch rounds float64 to float32.
        z = self.kernel_norm(inputs @ self.kernel)
        z = z + self.recurrent_norm(h @ self.recurrent_kernel)
        if self.use_bias:
            z = z + self.bias
        i, f, candidate, o = keras.ops.split(z, 4, axis=1)
        carry = self.recurrent_activation(f) * c
        carry = carry + self.recurrent_activation(i) * self.activation(candidate)
        c = self.state_norm(carry)
        h = self.recurrent_activation(o) * self.activation(c)
        return h, [h, c]

    def get_dropout_mask(self, step_input: Tensor) -> Tensor | None:
        """What is dropped of the inputs, the same in every step."""
        return _first(super().get_dropout_mask(step_input))

    def get_recurrent_dropout_mask(self, step_input: Tensor) -> Tensor | None:
        """What is dropped of h, the same in every step."""
        return _first(super().get_recurrent_dropout_mask(step_input))

    def get_config(self) -> dict[str, Any]:
        """The arguments of the cell."""
        return {
            **super().get_config(),
            "norm_gamma_initializer": initializers.serialize(self.norm_gamma_initializer),
            "norm_beta_initializer": initializers.serialize(self.norm_beta_initializer),
            "norm_epsilon": self.norm_epsilon,
        }


@keras.saving.register_keras_serializable("normwise")
class LayerNormSimpleRNNCell(keras.layers.SimpleRNNCell):
    """Fully connected recurrent cell with layer norm before its nonlinearity.

        h = activation(layernorm(x @ kernel + h @ recurrent_kernel) + bias)

    with one layer norm over the last axis, which has a gamma; the bias takes the place of its beta.

    Input of a step: (batch, features) and the state [h], (batch, units). Output: h and [h], in the
    cell's compute dtype. `keras.layers.RNN(cell)` runs it over (batch, time, features). Weights in
    order: kernel (features, units), recurrent_kernel (units, units), bias (units,), gamma (units,).

    Args:
        units: the size of h, a positive int.
        activation: a name or a callable, or None for the identity.
        use_bias: whether to add the bias.
        layernorm_epsilon: added to the variance, a number >= 0.
        kernel_initializer, recurrent_initializer, bias_initializer, gamma_initializer: of the
            weights of these names.
        kernel_regularizer, recurrent_regularizer, bias_regularizer, gamma_regularizer: of the same,
            or None.
        kernel_constraint, recurrent_constraint, bias_constraint, gamma_constraint: of the same, or
            None.
        dropout: the share of the inputs to drop in training, >= 0 and < 1.
        recurrent_dropout: the same of h on its way to the recurrent kernel.
        seed: of the dropout, an int or None.
        **kwargs: of the base layer, as `name` and `dtype`.

    Raises:
        ValueError, TypeError: as LayerNormLSTMCell.

    Numerics: as LayerNormLSTMCell.

    Reference: Ba et al., Layer Normalization, 2016, https://arxiv.org/abs/1607.06450

    Example:

    >>> import keras, numpy as np, normwise
    >>> layer = keras.layers.RNN(normwise.rnn.LayerNormSimpleRNNCell(4))
    >>> y = layer(np.ones((32, 10, 8), "float32"))
    >>> [(w.name, tuple(w.shape)) for w in layer.weights]
    [('kernel', (8, 4)), ('recurrent_kernel', (4, 4)), ('bias', (4,)), ('gamma', (4,))]
    """

    def __init__(
        self,
        units: int,
        activation: Activation = "tanh",
        use_bias: bool = True,
        layernorm_epsilon: float = 1e-5,
        kernel_initializer: Initializer = "glorot_uniform",
        recurrent_initializer: Initializer = "orthogonal",
        bias_initializer: Initializer = "zeros",
        gamma_initializer: Initializer = "ones",
        kernel_regularizer: Regularizer = None,
        recurrent_regularizer: Regularizer = None,
        bias_regularizer: Regularizer = None,
        gamma_regularizer: Regularizer = None,
        kernel_constraint: Constraint = None,
        recurrent_constraint: Constraint = None,
        bias_constraint: Constraint = None,
        gamma_constraint: Constraint = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ):
        options = given(locals())
        own = ("layernorm_epsilon", *(f"gamma_{kind}" for kind in KINDS))
        super().__init__(**_of_keras(options, own))
        self.layernorm = LayerNormalization(
            epsilon=layernorm_epsilon,
            center=False,
            gamma_initializer=gamma_initializer,
            gamma_regularizer=gamma_regularizer,
            gamma_constraint=gamma_constraint,
            name="layernorm",
            trainable=self.trainable,
            dtype=self.dtype_policy,
        )

    def build(self, input_shape: Shape) -> None:
        """Create the weights for inputs (batch, features)."""
        super().build(input_shape)
        self.layernorm.build((input_shape[0], self.units))

    def call(
        self, inputs: Tensor, states: Sequence[Tensor], training: bool | None = False
    ) -> tuple[Tensor, list[Tensor]]:
        """One step from `states`, [h]: the new h, and the new states."""
        (h,) = states
        if training:
            inputs = _dropped(inputs, self.get_dropout_mask(inputs))
            h = _dropped(h, self.get_recurrent_dropout_mask(h))
        # Not keras.ops.matmul, as above.
        z = self.layernorm(inputs @ self.kernel + h @ self.recurrent_kernel)
        if self.use_bias:
            z = z + self.bias
        h = self.activation(z)
        return h, [h]

    def get_config(self) -> dict[str, Any]:
        """The arguments of the cell."""
        norm = self.layernorm
        return {
            **super().get_config(),
            "layernorm_epsilon": norm.epsilon,
            "gamma_initializer": initializers.serialize(norm.gamma_initializer),
            "gamma_regularizer": regularizers.serialize(norm.gamma_regularizer),
            "gamma_constraint": constraints.serialize(norm.gamma_constraint),
        }


def _dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x` without what `mask` drops, which has the dtype of the RNN layer and not of the cell."""
    return x if mask is None else x * keras.ops.cast(mask, x.dtype)


def _first(masks: Any) -> Tensor | None:
    """The mask for all four gates, which have one kernel; Keras's cell has a mask for each."""
    return masks[0] if isinstance(masks, list | tuple) else masks


def _of_keras(options: dict[str, Any], own: Sequence[str]) -> dict[str, Any]:
    """The arguments that Keras's cell takes, checked, without those that are a cell's `own`.

    Nor does it take those of Keras 2 that only said how to compute the same.
    """
    dropped = (*own, "implementation", "enable_caching_device")
    options = {name: value for name, value in options.items() if name not in dropped}
    options["units"] = _check_units(options["units"])
    for name in ("dropout", "recurrent_dropout"):
        options[name] = _check_rate(name, options[name])
    return options


def _check_units(units: Any) -> int:
    """Return `units` as an int if a state can have that size."""
    if isinstance(units, bool) or not isinstance(units, numbers.Integral) or units < 1:
        raise ValueError(
            f"units={units!r} is no size of a state; expected a positive int, as in units=64"
        )
    return int(units)


def _check_rate(name: str, rate: Any) -> float:
    """Return `rate` as a float if that share can be dropped and something is left."""
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 <= float(rate) < 1:
        raise ValueError(
            f"{name}={rate!r} is no share to drop; expected a number >= 0 and < 1, as in {name}=0.1"
        )
    return float(rate)


# Models saved by TensorFlow Addons name their cells so.
for _cell in (LayerNormLSTMCell, LayerNormSimpleRNNCell):
    keras.saving.get_custom_objects()[f"Addons>{_cell.__name__}"] = _cell
