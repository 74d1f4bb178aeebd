"""What the layers of the family have: weights, an activation, and a config."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import keras
from keras import constraints, initializers, regularizers

from normwise import keras_private
from normwise.geometry import Geometry
from normwise.norm import (
    Operands,
    check_dtype,
    check_epsilon,
    check_offset,
    check_shapes,
    sum_dtype,
)
from normwise.typing import Activation, Axis, Shape, Tensor

# What a weight has of its own, and the module of Keras that reads and writes it.
KINDS = {"initializer": initializers, "regularizer": regularizers, "constraint": constraints}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A weight of a layer, and the layer's arguments for it.

    Args:
        name: of the weight, and the beginning of its arguments' names: `gamma_initializer`.
        option: the argument that asks for the weight, None where every layer has it.
        kinds: which of KINDS are arguments; the others are attributes of the class.
        attribute: the layer's for the weight, by default the name.
        shape: None where it follows from the input's.
    """

    name: str
    option: str | None = None
    kinds: tuple[str, ...] = tuple(KINDS)
    attribute: str | None = None
    shape: tuple[int, ...] | None = None


class Parametric(keras.Layer):
    """A layer that states its weights: from `parameters` follow its arguments, weights and config.

    It takes its input in the dtype that it comes in: rounded to float16 first, a norm would lose
    its statistics, and a threshold the difference to it.
    """

    # In the order of the weights.
    parameters: ClassVar[Sequence[Parameter]] = ()

    def __init__(self, **kwargs: Any):
        options = {name: kwargs.pop(name) for name, _ in self._options()}
        super().__init__(**kwargs)
        self.supports_masking = True
        self.autocast = False
        for name, kind in self._options():
            setattr(self, name, KINDS[kind].get(options[name]) if kind else options[name])

    def get_config(self) -> dict[str, Any]:
        """The arguments of the layer, whatever it was built on."""
        config = super().get_config()
        for name, kind in self._options():
            value = getattr(self, name)
            config[name] = KINDS[kind].serialize(value) if kind else value
        return config

    @classmethod
    def _options(cls) -> Iterator[tuple[str, str | None]]:
        """The arguments for the weights, and of which kind each is, if of any."""
        for parameter in cls.parameters:
            if parameter.option:
                yield parameter.option, None
            for kind in parameter.kinds:
                yield f"{parameter.name}_{kind}", kind

    def _wanted(self) -> list[Parameter]:
        return [p for p in self.parameters if p.option is None or getattr(self, p.option)]

    def _add_weights(self, shape: Shape, **others: Shape) -> None:
        """Create the weights: of this shape but for those of `others`, by their names."""
        for parameter in self._wanted():
            weight = self.add_weight(
                name=parameter.name,
                shape=others.get(parameter.name) or parameter.shape or shape,
                **{kind: getattr(self, f"{parameter.name}_{kind}") for kind in KINDS},
                autocast=False,
            )
            setattr(self, parameter.attribute or parameter.name, weight)


def given(variables: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an `__init__`, out of its `locals()` before it has others."""
    named = {name: each for name, each in variables.items() if name not in ("self", "__class__")}
    kwargs = named.pop("kwargs")
    return {**named, **kwargs}


def mask_for(inputs: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask of a call's first tensor: where there are two, Keras leaves it on that."""
    return keras_private.mask_of(inputs) if mask is None else mask


class Affine(Parametric):
    """A norm followed by y = activation(gamma * x + beta): weights, config and shapes.

    A subclass says which geometry an input has and calls its op. Arguments are those of the layers.
    """

    parameters: ClassVar[Sequence[Parameter]] = (
        Parameter("gamma", option="scale"),
        Parameter("beta", option="center"),
    )
    gamma: keras.Variable | None = None
    beta: keras.Variable | None = None

    # Whether the mean is subtracted, and whether a weight adds to epsilon.
    subtract_mean = True
    learned_epsilon = False

    def __init__(
        self,
        *,
        axis: Axis,
        epsilon: float,
        activation: Activation,
        gamma_offset: float,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.axis = axis
        self.epsilon = check_epsilon(epsilon)
        self.activation = keras.activations.get(activation)
        self.gamma_offset = check_offset(gamma_offset)

    def geometry(self, input_shape: Shape) -> Geometry:
        """Which elements of an input of this shape share their statistics."""
        raise NotImplementedError

    def own(self) -> tuple[Tensor | None, Tensor | None]:
        """The layer's gamma and beta, as its function of `ops` takes them."""
        return self.gamma, self.beta

    def call(
        self, inputs: Tensor, mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Any:
        """Normalize `inputs`; `mask` (True = keep) leaves elements out of the statistics.

        With a `residual` of the shape of `inputs` their sum is normalized, and the result is
        (y, sum).
        """
        gamma, beta = self.own()
        options = {"gamma_offset": self.gamma_offset, "dtype": self.compute_dtype}
        if residual is None:
            return self.normalize(inputs, gamma, beta, mask=mask, **options)
        mask = mask_for(inputs, mask)
        y, total = self.normalize(inputs, gamma, beta, mask=mask, residual=residual, **options)
        keras_private.give_mask(total, mask)
        return y, total

    def normalize(
        self, inputs: Tensor, gamma: Tensor | None, beta: Tensor | None, **options: Any
    ) -> Any:
        """Call the layer's function of `ops` with its arguments, but another gamma and beta.

        Args:
            inputs, gamma, beta: as the function takes them.
            **options: `gamma_offset`, `mask`, `residual` and `dtype` of the function.
        """
        raise NotImplementedError

    def _normalized(self, norm: Callable[..., Any], *tensors: Tensor | None, **options: Any) -> Any:
        """The result of one of `ops` on x, gamma and beta, with the layer's arguments."""
        return norm(
            *tensors,
            axis=self.axis,
            epsilon=self.epsilon,
            activation=self.activation,
            **options,
        )

    def build(self, input_shape: Shape) -> None:
        """Create the weights for inputs of this shape."""
        shape = self._parameter_shape(self.geometry(input_shape))
        wanted = self._wanted()
        if None in shape and wanted:
            raise ValueError(
                f"axis={self.axis} of shape {tuple(input_shape)} has an unknown extent, so the "
                f"shape of {' and '.join(each.name for each in wanted)} is unknown; give it a "
                f"fixed extent, or set {' and '.join(f'{each.option}=False' for each in wanted)}"
            )
        self._add_weights(shape)

    def _parameter_shape(self, geometry: Geometry) -> tuple[int | None, ...]:
        return geometry.parameter_shape

    def compute_output_shape(
        self, input_shape: Shape, residual_shape: Shape | None = None
    ) -> tuple[Any, ...]:
        """The shape of the input; with that of a residual twice, for the sum too."""
        self.geometry(input_shape)
        shape = tuple(input_shape)
        return shape if residual_shape is None else (shape, shape)

    def compute_output_spec(
        self, inputs: Tensor, mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Any:
        """A symbol of the result, or of each, with the errors that a call would raise."""
        return self.symbols(inputs, mask, residual, self.compute_dtype)

    def symbols(
        self, inputs: Tensor, mask: Tensor | None, residual: Tensor | None, dtype: str
    ) -> Any:
        """The symbols of what `normalize` gives in this dtype."""
        given = check_dtype(inputs.dtype)
        check_shapes(self.geometry(inputs.shape), Operands(mask=mask, residual=residual))
        y = keras.KerasTensor(inputs.shape, dtype=dtype)
        if residual is None:
            return y
        total = keras.KerasTensor(inputs.shape, dtype=sum_dtype(given, dtype))
        keras_private.give_mask(total, mask_for(inputs, mask))
        return y, total

    def get_config(self) -> dict[str, Any]:
        """The arguments of the layer, whatever it was built on."""
        config = {
            **super().get_config(),
            "axis": self.axis if isinstance(self.axis, int) else list(self.axis),
            "epsilon": self.epsilon,
            "activation": keras.activations.serialize(self.activation),
            "gamma_offset": self.gamma_offset,
        }
        return keras_private.saved_axes(config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Affine":
        """The layer of a config."""
        return super().from_config(keras_private.restored_axes(config))
