"""A norm whose gamma and beta come of a condition: adaptive, conditional, feature-wise."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import keras

from normwise import keras_private
from normwise.geometry import Geometry
from normwise.layers.affine import Affine, Parameter, Parametric, given, mask_for
from normwise.norm import arithmetic_of, check_dtype, dtype_name
from normwise.typing import Activation, Constraint, Initializer, Regularizer, Shape, Tensor


class Conditioned(Parametric):
    """A layer around a norm, which is given what scales and shifts its result.

    It has the norm's dtype policy where it is given no other.
    """

    def __init__(self, norm: Affine, **kwargs: Any):
        name = type(self).__name__
        if not isinstance(norm, Affine):
            raise TypeError(
                f"norm={norm!r} is no norm of normwise.layers; give {name} one, as in "
                f"{name}(normwise.layers.InstanceNormalization(center=False, scale=False))"
            )
        kwargs.setdefault("dtype", norm.dtype_policy)
        super().__init__(**kwargs)
        self.norm = norm

    def geometry(self, input_shape: Shape) -> Geometry:
        """Which elements of an input of this shape share their statistics: those of the norm."""
        return self.norm.geometry(input_shape)

    def _build_norm(self, input_shape: Shape) -> None:
        if not self.norm.built:
            self.norm.build(input_shape)
        self.input_spec = self.norm.input_spec

    def _arithmetic(self, inputs: Tensor) -> str:
        """The dtype of the norm's arithmetic."""
        return arithmetic_of(check_dtype(inputs.dtype), self.compute_dtype)

    def _with_own(
        self, gamma: Tensor, beta: Tensor, own: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor, float]:
        """Gamma, beta and the offset of gamma of (1 + gamma) * norm + beta.

        Args:
            gamma, beta: in the dtype of the arithmetic.
            own: gamma and beta of the norm, or None, of shapes that broadcast to those.
        """
        own_gamma, own_beta = (
            each if each is None else keras.ops.cast(each, gamma.dtype) for each in own
        )
        if own_beta is not None:
            beta = beta + own_beta + own_beta * gamma
        if own_gamma is None:
            return gamma, beta, 1.0
        offset = self.norm.gamma_offset
        return own_gamma + (own_gamma + offset) * gamma, beta, offset

    def get_config(self) -> dict[str, Any]:
        """The arguments of the layer, whatever it was built on."""
        norm = keras.saving.serialize_keras_object(self.norm)
        # Else the norm of another layer with this config would be built already.
        norm.pop("build_config", None)
        return {**super().get_config(), "norm": norm}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "Conditioned":
        """The layer of a config."""
        norm = keras.saving.deserialize_keras_object(config["norm"], custom_objects=custom_objects)
        return cls(**{**config, "norm": norm})


@keras.saving.register_keras_serializable("normwise")
class Modulated(Conditioned):
    """A norm whose result a condition scales and shifts, each sample's by values of its own.

        y = activation((1 + scale) * norm(x) + shift)
        scale, shift, gate = the parts of condition_activation(condition) @ kernel + bias

    with a scale and a shift of the shape of the norm's gamma and beta for every sample, and the
    norm's own activation. A gamma and a beta of the norm are part of norm(x). The kernel and the
    bias are zeros at first, so that the layer begins as the norm. Where the condition is a label,
    the parts are its row in a table. What is published under other names:

        adaptive layer norm     Modulated(LayerNormalization(center=False, scale=False), ...)
        adaptive group norm     Modulated(GroupNormalization(groups=32), ...)
        FiLM                    Modulated(InstanceNormalization(center=False, scale=False), ...)
        conditional instance norm: the same with classes=10

    Input: (batch, ..., channels, ...), rank 2 or more, any real dtype; and the condition, (batch,
    features) of any real dtype, or with `classes` integers (batch,), each from 0 to classes - 1.
    Output: y of the shape of the input, in the layer's compute dtype; with `gate=True` (y, gate),
    where the gate broadcasts against y, as in x + gate * block(y). A mask leaves what it masks out
    of the statistics. Called with `residual=`, a tensor of the input's shape, the layer normalizes
    the sum of both and returns it after y: (y, sum) or (y, sum, gate).

    Args:
        norm: a layer of normwise: group, instance, layer, RMS or filter response norm.
        gate: whether the condition makes a gate too, which is 0 at first.
        classes: the number of labels, or None for a condition of features.
        condition_activation: applied to a condition of features, a name or a callable, or None.
        kernel_initializer, bias_initializer: of the kernel, or the table, and of the bias.
        kernel_regularizer, bias_regularizer: of the same, or None.
        kernel_constraint, bias_constraint: of the same, or None.
        **kwargs: of the base layer, as `name` and `dtype`, by default that of the norm.

    Weights, before those of the norm: the kernel (features, n), or the table (classes, n), of the
    name too; and with features the bias (n,). n counts the values of the scale, then those of the
    shift, then those of the gate, each in the order of gamma.

    Raises:
        TypeError: norm is no layer of normwise; on a call with labels that are no integers.
        ValueError: classes is no positive int, or there are labels and a condition_activation; on
            the first call for a condition of another rank or of unknown features, for a norm over
            the batch, and as the norm; later for another number of samples or features.

    Numerics: arithmetic in float32 (float64 for float64), that of the kernel too: a scale near 0
    keeps its digits. Else as the norm.

    Reference: Dumoulin et al., A Learned Representation For Artistic Style, 2017,
        https://arxiv.org/abs/1610.07629; Perez et al., FiLM, 2018,
        https://arxiv.org/abs/1709.07871; Dhariwal and Nichol, Diffusion Models Beat GANs on Image
        Synthesis, 2021, https://arxiv.org/abs/2105.05233; Peebles and Xie, Scalable Diffusion
        Models with Transformers, 2023, https://arxiv.org/abs/2212.09748

    Example:

    The adaptive layer norm of diffusion transformers, whose gate begins at 0:

    >>> import numpy as np, normwise
    >>> norm = normwise.layers.LayerNormalization(epsilon=1e-6, center=False, scale=False)
    >>> layer = normwise.layers.Modulated(norm, gate=True, condition_activation="silu")
    >>> y, gate = layer(np.ones((4, 16, 8), "float32"), np.ones((4, 32), "float32"))
    >>> [(w.name, tuple(w.shape)) for w in layer.weights], tuple(gate.shape)
    ([('kernel', (32, 24)), ('bias', (24,))], (4, 1, 8))
    """

    parameters = (Parameter("kernel"), Parameter("bias"))
    bias = None

    def __init__(
        self,
        norm: Affine,
        gate: bool = False,
        classes: int | None = None,
        condition_activation: Activation = None,
        kernel_initializer: Initializer = "zeros",
        bias_initializer: Initializer = "zeros",
        kernel_regularizer: Regularizer = None,
        bias_regularizer: Regularizer = None,
        kernel_constraint: Constraint = None,
        bias_constraint: Constraint = None,
        **kwargs: Any,
    ):
        options = given(locals())
        del options["gate"], options["classes"], options["condition_activation"]
        super().__init__(**options)
        self.gate = bool(gate)
        self.classes = _check_classes(classes)
        self.condition_activation = keras.activations.get(condition_activation)
        if classes is not None and condition_activation not in (None, "linear"):
            raise ValueError(
                f"condition_activation={condition_activation!r} has no meaning for labels; leave "
                f"it out, or classes={classes}"
            )

    def build(self, inputs_shape: Shape, condition_shape: Shape) -> None:
        """Create the weights for inputs and conditions of these shapes."""
        self._check_shape(inputs_shape, condition_shape)
        self._build_norm(inputs_shape)
        geometry = self.norm.geometry(inputs_shape)
        axes = list(geometry.parameter_axes)
        extents = [extent for extent in geometry.parameter_shape if extent is not None]
        if 0 in axes:
            raise ValueError(
                f"axis={axes} of the norm is the batch of shape {tuple(inputs_shape)} too, but a "
                "condition is that of one sample; leave axis 0 out"
            )
        if len(extents) < len(axes):
            raise ValueError(
                f"axis={axes} of shape {tuple(inputs_shape)} has an unknown extent, so the shape "
                "of what the condition makes is unknown; give it a fixed extent"
            )
        rows = condition_shape[-1] if self.classes is None else self.classes
        if rows is None:
            raise ValueError(
                f"condition has shape {tuple(condition_shape)}, so the number of its features is "
                "unknown; give it a fixed extent, as in keras.Input((16,))"
            )
        columns = (3 if self.gate else 2) * math.prod(extents)
        self._add_weights((rows, columns), bias=(columns,))

    def _wanted(self) -> list[Parameter]:
        # A bias would only be added to every row of a table.
        return [p for p in super()._wanted() if self.classes is None or p.name == "kernel"]

    def call(
        self,
        inputs: Tensor,
        condition: Tensor,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Any:
        """Normalize `inputs`, or their sum with `residual`, and modulate them by `condition`.

        `mask` (True = keep) leaves elements out of the statistics.
        """
        self._check(inputs, condition)
        mask = mask_for(inputs, mask)
        gamma, beta, *gate = self._made_of(condition, inputs)
        gamma, beta, offset = self._with_own(gamma, beta, self.norm.own())
        options = {"gamma_offset": offset, "mask": mask, "dtype": self.compute_dtype}
        if residual is None:
            results = [self.norm.normalize(inputs, gamma, beta, **options)]
        else:
            results = [*self.norm.normalize(inputs, gamma, beta, residual=residual, **options)]
            keras_private.give_mask(results[1], mask)
        for each in gate:
            extents = self.norm.geometry(inputs.shape).broadcast_shape(keras.ops.shape(each))
            results.append(keras.ops.cast(keras.ops.reshape(each, extents), self.compute_dtype))
        return tuple(results) if len(results) > 1 else results[0]

    def _made_of(self, condition: Tensor, inputs: Tensor) -> list[Tensor]:
        """The parts that a condition makes, each of (batch, *the shape of gamma)."""
        arithmetic = self._arithmetic(inputs)
        if self.classes is None:
            features = self.condition_activation(keras.ops.cast(condition, arithmetic))
            kernel, bias = (keras.ops.cast(w, arithmetic) for w in (self.kernel, self.bias))
            made = keras.ops.matmul(features, kernel) + bias
        else:
            made = keras.ops.cast(keras.ops.take(self.kernel, condition, axis=0), arithmetic)
        extents = self.norm.geometry(inputs.shape).parameter_shape
        parts = keras.ops.split(made, 3 if self.gate else 2, axis=-1)
        return [keras.ops.reshape(part, (-1, *extents)) for part in parts]

    def _check(self, inputs: Tensor, condition: Tensor) -> None:
        """Check that a condition fits the inputs, and the weights."""
        self._check_shape(inputs.shape, condition.shape)
        if self.classes is not None:
            dtype = dtype_name(condition.dtype)
            if "int" not in dtype:
                raise TypeError(
                    f"condition has dtype {dtype}, but with classes={self.classes} it is a label "
                    "for each sample; pass integers, or leave classes out for features"
                )
        elif condition.shape[-1] not in (None, self.kernel.shape[0]):
            raise ValueError(
                f"condition has {condition.shape[-1]} features, but the layer was built for "
                f"{self.kernel.shape[0]}; pass as many, or make another layer"
            )

    def _check_shape(self, inputs_shape: Shape, condition_shape: Shape) -> None:
        shape = tuple(condition_shape)
        if self.classes is None and len(shape) != 2:
            raise ValueError(
                f"condition has shape {shape}, but it is to be (batch, features); take a mean over "
                "positions, or for labels set classes to their number"
            )
        if self.classes is not None and len(shape) != 1:
            raise ValueError(
                f"condition has shape {shape}, but with classes={self.classes} it is a label for "
                "each sample, (batch,); pass integers of that shape, or leave classes out"
            )
        samples, conditions = inputs_shape[0], shape[0]
        known = isinstance(samples, int) and isinstance(conditions, int)
        if known and samples != conditions:
            raise ValueError(
                f"condition has shape {shape}, but x of shape {tuple(inputs_shape)} has {samples} "
                "samples; pass one for each"
            )

    def compute_output_shape(
        self,
        inputs_shape: Shape,
        condition_shape: Shape | None = None,
        residual_shape: Shape | None = None,
    ) -> tuple[Any, ...]:
        """The shape of y; or those of y, of the sum if there is a residual, and of the gate."""
        geometry = self.norm.geometry(inputs_shape)
        shapes = [tuple(inputs_shape)] * (1 if residual_shape is None else 2)
        if self.gate:
            extents = (inputs_shape[0], *geometry.parameter_shape)
            shapes.append(geometry.broadcast_shape(extents))
        return tuple(shapes) if len(shapes) > 1 else shapes[0]

    def compute_output_spec(
        self,
        inputs: Tensor,
        condition: Tensor,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Any:
        """A symbol of the result, or of each, with the errors that a call would raise."""
        self._check(inputs, condition)
        symbols = self.norm.symbols(inputs, mask, residual, self.compute_dtype)
        if not self.gate:
            return symbols
        *_, shape = self.compute_output_shape(inputs.shape)
        gate = keras.KerasTensor(shape, dtype=self.compute_dtype)
        return (symbols, gate) if residual is None else (*symbols, gate)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the layer, whatever it was built on."""
        return {
            **super().get_config(),
            "gate": self.gate,
            "classes": self.classes,
            "condition_activation": keras.activations.serialize(self.condition_activation),
        }


def _check_classes(classes: Any) -> int | None:
    """Return `classes` as an int, or None, if it can be a number of labels."""
    if classes is None:
        return None
    if isinstance(classes, bool) or not hasattr(classes, "__index__") or classes < 1:
        raise ValueError(
            f"classes={classes!r} is no number of labels; expected a positive int, or None for a "
            "condition of features"
        )
    return operator.index(classes)
