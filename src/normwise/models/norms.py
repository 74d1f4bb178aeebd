"""The norms of a model: which layers they are, of which kind, and over which sets."""

import math
from dataclasses import dataclass
from typing import Any

import keras

from normwise import geometry, layers
from normwise.doctor import explain
from normwise.geometry import Geometry
from normwise.models import surgery
from normwise.typing import Shape

# The kinds, and the classes of Keras and of this library that are of one; the first that fits.
KINDS: dict[str, tuple[type[keras.Layer], ...]] = {
    "batch": (keras.layers.BatchNormalization,),
    "instance": (layers.InstanceNormalization,),
    "group": (layers.GroupNormalization, keras.layers.GroupNormalization),
    "rms": (layers.RMSNormalization, keras.layers.RMSNormalization),
    "layer": (layers.LayerNormalization, keras.layers.LayerNormalization),
    "unit": (keras.layers.UnitNormalization,),
    "filter response": (layers.FilterResponseNormalization,),
    "global response": (layers.GlobalResponseNormalization,),
    "reversible": (layers.ReversibleInstanceNormalization,),
    "modulated": (layers.Modulated, layers.AdaptiveInstanceNormalization, layers.SPADE),
    "spectral": (layers.SpectralNormalization, keras.layers.SpectralNormalization),
    "weight": (layers.WeightNormalization, layers.WeightStandardization),
}

_OPTIONS = ("name", "trainable", "axis", "epsilon", "center", "scale")


@dataclass(frozen=True)
class Norm:
    """A norm of a model.

    Attributes:
        path: the names of the layers that hold it and its own, as "encoder/norm".
        layer: the layer itself.
        kind: one of the keys of KINDS.
        shape: of its input, with None for what is open; None if the layer does not know it.
        sets: the geometry of its input; None for a norm of weights, or without a shape.
        parameters: how many numbers it trains.

    Example:

    >>> inputs = keras.Input((8, 8, 4))
    >>> model = keras.Model(inputs, layers.GroupNormalization(2, name="norm")(inputs))
    >>> norm, = norms_of(model)
    >>> norm.path, norm.kind, norm.shape, norm.parameters
    ('norm', 'group', (None, 8, 8, 4), 8)
    """

    path: str
    layer: keras.Layer
    kind: str
    shape: Shape | None
    sets: Geometry | None
    parameters: int

    @property
    def kernel(self) -> str:
        """The kernel of normwise that would run here, or whose layer it is."""
        package = package_of(self.layer)
        if package != "normwise":
            return f"of {package}"
        if self.sets is None or self.shape is None:
            return "composite"
        try:
            return explain(self.layer, self.shape).kernel
        except (TypeError, ValueError):
            return "composite"


def norms_of(model: keras.Layer) -> list[Norm]:
    """The norms of a model, nested ones too, in the order in which the model holds them.

    Example:

    >>> import keras
    >>> from normwise.models import norms_of
    >>> norm = keras.layers.BatchNormalization(name="norm")
    >>> model = keras.Sequential([keras.Input((8, 8, 4)), norm])
    >>> [(norm.path, norm.kind, norm.shape) for norm in norms_of(model)]
    [('norm', 'batch', (None, 8, 8, 4))]
    """
    found = []
    for path, layer in surgery.layers_of(model):
        kind = kind_of(layer)
        if kind is not None:
            shape = shape_of(layer)
            sets = None if shape is None else sets_of(layer, shape)
            parameters = sum(math.prod(weight.shape) for weight in layer.trainable_weights)
            found.append(Norm(path, layer, kind, shape, sets, parameters))
    return found


def kind_of(layer: keras.Layer) -> str | None:
    """The kind of a norm, or None for another layer."""
    for kind, classes in KINDS.items():
        if isinstance(layer, classes):
            return kind
    name = type(layer).__name__.lower()
    if package_of(layer) == "keras_hub" and "norm" in name:
        is_rms = "rms" in name or {weight.name for weight in layer.weights} == {"scale"}
        return "rms" if is_rms else "layer"
    return None


def package_of(layer: keras.Layer) -> str:
    """The package that a layer's class is of, as "keras"."""
    return type(layer).__module__.partition(".")[0]


def options_of(layer: keras.Layer) -> dict[str, Any]:
    """The arguments of a norm that others take too, under the names that Keras and we use."""
    config = layer.get_config()
    found = {name: config[name] for name in _OPTIONS if name in config}
    for weight in ("gamma", "beta"):
        for part in ("initializer", "regularizer", "constraint"):
            value = getattr(layer, f"{weight}_{part}", None)
            if value is not None:
                found[f"{weight}_{part}"] = value
    return {**found, "dtype": layer.dtype_policy}


def shape_of(layer: keras.Layer) -> Shape | None:
    """The shape that a layer was built for, if it knows one."""
    shape = (layer.get_build_config() or {}).get("input_shape")
    if not isinstance(shape, (tuple, list)) or any(
        isinstance(each, (tuple, list)) for each in shape
    ):
        return None
    return tuple(shape)


def sets_of(layer: keras.Layer, shape: Shape) -> Geometry | None:
    """Which elements of an input share their statistics; None for a norm of weights."""
    axis: Any = getattr(layer, "axis", -1)
    match kind_of(layer):
        case "spectral" | "weight" | None:
            return None
        case "batch":
            return geometry.batch(shape, axis)
        case "group" if not isinstance(layer, layers.GroupNormalization):
            groups = layer.groups
            return geometry.group(shape, axis, geometry.INSTANCE if groups == -1 else groups)
        case "modulated":
            return layer.norm.geometry(shape) if hasattr(layer, "norm") else layer.geometry(shape)
        case _ if hasattr(layer, "geometry"):
            return layer.geometry(shape)
        case _:
            return geometry.layer(shape, axis)
