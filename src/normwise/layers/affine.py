"""What the layers of the family have: weights, an activation, and a config."""

import keras
from keras import constraints, initializers, regularizers

from normwise import geometry
from normwise import norm as checks


class Parametric(keras.Layer):
    """A layer whose weights have an initializer, a regularizer and a constraint of their own each.

    It takes its input in the dtype that it comes in: rounded to float16 first, a norm would lose
    its statistics, and a threshold the difference to it.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.autocast = False

    def _add_parameter(self, name, shape):
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=getattr(self, f"{name}_initializer"),
            regularizer=getattr(self, f"{name}_regularizer"),
            constraint=getattr(self, f"{name}_constraint"),
            autocast=False,
        )


class Affine(Parametric):
    """A norm followed by y = activation(gamma * x + beta): weights, config and shapes.

    A subclass says which geometry an input has and calls its op. Arguments are those of the layers.
    """

    # Whether the mean is subtracted, and whether a weight adds to epsilon.
    subtract_mean = True
    learned_epsilon = False

    def __init__(
        self,
        *,
        axis,
        epsilon,
        center,
        scale,
        beta_initializer="zeros",
        gamma_initializer="ones",
        beta_regularizer=None,
        gamma_regularizer=None,
        beta_constraint=None,
        gamma_constraint=None,
        activation=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.axis = axis
        self.epsilon = checks.check_epsilon(epsilon)
        self.center = center
        self.scale = scale
        self.beta_initializer = initializers.get(beta_initializer)
        self.gamma_initializer = initializers.get(gamma_initializer)
        self.beta_regularizer = regularizers.get(beta_regularizer)
        self.gamma_regularizer = regularizers.get(gamma_regularizer)
        self.beta_constraint = constraints.get(beta_constraint)
        self.gamma_constraint = constraints.get(gamma_constraint)
        self.activation = keras.activations.get(activation)
        self.gamma = None
        self.beta = None

    def geometry(self, input_shape) -> geometry.Geometry:
        """Which elements of an input of this shape share their statistics."""
        raise NotImplementedError

    def build(self, input_shape):
        """Create gamma and beta for inputs of this shape."""
        plan = self.geometry(input_shape)
        shape = plan.parameter_shape
        made = {"gamma": ("scale", self.scale), "beta": ("center", self.center)}
        wanted = {name: option for name, (option, given) in made.items() if given}
        if None in shape and wanted:
            raise ValueError(
                f"axis={self.axis} of shape {tuple(input_shape)} has an unknown extent, so the "
                f"shape of {' and '.join(wanted)} is unknown; give it a fixed extent, or set "
                f"{' and '.join(f'{option}=False' for option in wanted.values())}"
            )
        if self.scale:
            self.gamma = self._add_parameter("gamma", shape)
        if self.center:
            self.beta = self._add_parameter("beta", shape)

    def compute_output_shape(self, input_shape):
        """The shape of the input."""
        self.geometry(input_shape)
        return tuple(input_shape)

    def compute_output_spec(self, inputs, mask=None, **kwargs):
        """A symbol of the result, with the errors that a call would raise."""
        checks.check_dtype(inputs)
        if mask is not None:
            checks.check_mask(self.geometry(inputs.shape), mask)
        return super().compute_output_spec(inputs, **kwargs)

    def get_config(self):
        """The arguments of the layer, whatever it was built on."""
        return {
            **super().get_config(),
            "axis": self.axis if isinstance(self.axis, int) else list(self.axis),
            "epsilon": self.epsilon,
            "center": self.center,
            "scale": self.scale,
            "beta_initializer": initializers.serialize(self.beta_initializer),
            "gamma_initializer": initializers.serialize(self.gamma_initializer),
            "beta_regularizer": regularizers.serialize(self.beta_regularizer),
            "gamma_regularizer": regularizers.serialize(self.gamma_regularizer),
            "beta_constraint": constraints.serialize(self.beta_constraint),
            "gamma_constraint": constraints.serialize(self.gamma_constraint),
            "activation": keras.activations.serialize(self.activation),
        }
