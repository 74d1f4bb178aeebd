"""Which array of a file of Keras 2 belongs to which variable of a model of Keras 3.

Nothing is assigned before everything fits: each function here only pairs, or says what does not.
"""

import re
from collections.abc import Callable, Iterator

import keras
import numpy as np

import normwise
from normwise import keras_private
from normwise.migrate.models.reading.budget import Budget
from normwise.migrate.models.stored import Group, Node

Pairs = list[tuple[keras.Variable, np.ndarray]]
LayersOf = Callable[[keras.Model], list[keras.Layer]]

# TensorFlow Addons keeps a copy of the layer that it normalizes, for its first batch only.
CLONE_SCOPE = "/data_dep_init/"
TOP_LEVEL = "top_level_model_weights"
WRAPPERS = (normwise.layers.WeightNormalization, normwise.layers.SpectralNormalization)


def pair(
    model: keras.Model, stored: list[Group] | Node, layers_of: LayersOf, budget: Budget
) -> Pairs:
    """Every variable of a model with its array.

    Raises:
        ValueError: a variable has no array, an array no variable, or shapes differ.
    """
    if isinstance(stored, Node):
        pairs = _Walk(layers_of, budget).pairs(model, stored)
    else:
        pairs = _pair_groups(model, stored, layers_of)
    pairs += [(each, np.broadcast_to(np.float32(0), each.shape)) for each in _offsets(model)]
    given = {id(variable) for variable, _ in pairs}
    if absent := [each.path for each in model.weights if id(each) not in given]:
        raise ValueError(f"the file holds nothing for {_listed(absent)}")
    for variable, array in pairs:
        if tuple(variable.shape) != array.shape:
            raise ValueError(
                f"the model's {variable.path} has the shape {tuple(variable.shape)}, and the "
                f"file's has {array.shape}"
            )
        budget.spend("bytes of weights", array.nbytes)
    return pairs


def _offsets(model: keras.Model) -> list[keras.Variable]:
    """What our wrappers keep beside the weights that the original changes in place: zero then."""
    wrappers = [each for each in keras_private.inner_layers(model) if isinstance(each, WRAPPERS)]
    return [
        each
        for layer in wrappers
        for each in keras_private.own_variables(layer)
        if _is_offset(layer, each)
    ]


def _is_offset(layer: keras.Layer, variable: keras.Variable) -> bool:
    return isinstance(layer, WRAPPERS) and variable.name.endswith("_offset")


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


# Legacy .h5


def _pair_groups(model, groups: list[Group], layers_of: LayersOf) -> Pairs:
    layers = [layer for layer in layers_of(model) if _ordered(layer, layers_of)]
    groups = [group for group in groups if group.arrays and group.name != TOP_LEVEL]
    if len(layers) != len(groups):
        raise ValueError(
            f"the model has {len(layers)} layers with weights, and the file {len(groups)}: "
            f"{_listed([group.name for group in groups])}"
        )
    by_name = {layer.name: layer for layer in layers}
    if by_name.keys() == {group.name for group in groups}:
        # The order of a model that was built anew may be another.
        layers = [by_name[group.name] for group in groups]
    pairs = []
    for layer, group in zip(layers, groups, strict=True):
        variables = _ordered(layer, layers_of)
        arrays = [(name, array) for name, array in group.arrays if CLONE_SCOPE not in name]
        if len(variables) != len(arrays):
            raise ValueError(
                f"the layer {layer.name} has {len(variables)} weights, and the file's "
                f"{group.name} {len(arrays)}: {_listed([name for name, _ in arrays])}"
            )
        pairs += _pair_layer(variables, arrays)
    return pairs


def _pair_layer(variables, arrays) -> Pairs:
    """In order; by name where the names say that the order is another."""
    names = [name.rpartition("/")[2].partition(":")[0] for name, _ in arrays]
    by_name = dict(zip(names, (array for _, array in arrays), strict=True))
    own_names = [variable.name for variable in variables]
    if len(by_name) == len(names) and set(own_names) == set(names):
        return [(variable, by_name[variable.name]) for variable in variables]
    return [(variable, array) for variable, (_, array) in zip(variables, arrays, strict=True)]


def _ordered(layer: keras.Layer, layers_of: LayersOf) -> list[keras.Variable]:
    """The variables as Keras 2 listed them: what is trained first, a layer's before its layers'."""
    found = {id(each): each for each in _walk(layer, layers_of)}.values()
    return [each for each in found if each.trainable] + [
        each for each in found if not each.trainable
    ]


def _walk(layer: keras.Layer, layers_of: LayersOf) -> Iterator[keras.Variable]:
    yield from _own_variables(layer)
    for inner in _inner_layers(layer, layers_of):
        yield from _walk(inner, layers_of)


def _own_variables(layer: keras.Layer) -> list[keras.Variable]:
    """The variables that are a layer's own, of those that it had in Keras 2 too."""
    return [each for each in keras_private.own_variables(layer) if not _is_offset(layer, each)]


def _inner_layers(layer: keras.Layer, layers_of: LayersOf) -> list[keras.Layer]:
    if isinstance(layer, keras.Model):
        return layers_of(layer)
    return keras_private.inner_layers(layer, recursive=False)


# .weights.h5 of Keras 2.12 to 2.15, and checkpoints


class _Walk:
    """A walk through a model and the tree of a file, side by side.

    An object that a model has twice is in the `.weights.h5` where it came first.
    """

    def __init__(self, layers_of: LayersOf, budget: Budget):
        self._layers_of = layers_of
        self._budget = budget
        self._visited = set()
        self._pairs = []

    def pairs(self, model: keras.Model, stored: Node) -> Pairs:
        """The variables of a model with their arrays."""
        self._layer(model, _root(stored), model.name)
        return self._pairs

    def _layer(self, layer: keras.Layer, node: Node, path: str) -> None:
        if id(layer) in self._visited:
            return
        self._visited.add(id(layer))
        self._budget.spend("names of weights", len(node.variables) + len(node.children))
        self._variables(layer, node, path)
        if isinstance(layer, keras.Model):
            self._layers(self._layers_of(layer), node, path)
            return
        for name, inner in _attributes(layer).items():
            child = node.children.get(name)
            if child is None or child.is_empty:
                continue
            if isinstance(inner, keras.Layer):
                self._layer(inner, child, f"{path}/{name}")
            elif isinstance(inner, list | tuple):
                self._pair_layers(list(inner), child, f"{path}/{name}")

    def _variables(self, layer: keras.Layer, node: Node, path: str) -> None:
        own = _own_variables(layer)
        if not node.variables or not own:
            return
        numbers = {str(i) for i in range(len(node.variables))}
        if node.variables.keys() == numbers:
            arrays = [node.variables[str(i)] for i in range(len(numbers))]
            self._numbered(layer, own, arrays, path)
            return
        attributes = {id(value): name.lstrip("_") for name, value in vars(layer).items()}
        for each in own:
            names = (each.name, attributes.get(id(each)), f"_{each.name}", f"depthwise_{each.name}")
            if (name := next((name for name in names if name in node.variables), None)) is not None:
                self._pairs.append((each, node.variables[name]))

    def _numbered(self, layer, own, arrays, path: str) -> None:
        if isinstance(layer, normwise.layers.SpectralNormalization):
            # The kernel comes first here, and once more in the layer that is wrapped.
            arrays = arrays[-len(own) :]
        if len(own) != len(arrays):
            # A kernel that its wrapper has as v is not among the wrapped layer's own in the file.
            paired = {id(variable) for variable, _ in self._pairs}
            own = [each for each in own if id(each) not in paired]
        if len(own) != len(arrays):
            raise ValueError(
                f"the layer {path} has {len(own)} weights of its own, and the file {len(arrays)}"
            )
        self._pairs += zip(own, arrays, strict=True)

    def _layers(self, layers, node: Node, path: str) -> None:
        """The layers of a model."""
        numbered = {
            int(name.rpartition("-")[2]): child
            for name, child in node.children.items()
            if re.fullmatch(r"layer_with_weights-\d{1,9}", name)
        }
        if numbered:
            weighted = [layer for layer in layers if layer.weights]
            for i, layer in enumerate(weighted):
                if i in numbered:
                    self._layer(layer, numbered[i], f"{path}/{layer.name}")
            return
        for name in ("_layer_checkpoint_dependencies", "layers"):
            if name in node.children:
                self._pair_layers(layers, node.children[name], path)

    def _pair_layers(self, layers: list, node: Node, path: str) -> None:
        """Layers in a list: named by their classes and numbered in the file, or by number alone.

        Keras up to 2.13 skips numbers, so it is the rank among those with weights that counts.
        """
        self._budget.spend("names of weights", len(node.children))
        stored = {}
        for name in sorted(node.children, key=_natural):
            if not node.children[name].is_empty:
                stored.setdefault(_stem(name), []).append(node.children[name])
        wanted = {}
        for layer in layers:
            if id(layer) not in self._visited and isinstance(layer, keras.Layer) and layer.weights:
                stem = "" if "" in stored else _stem(_snake_case(type(layer).__name__))
                wanted.setdefault(stem, []).append(layer)
        by_name = {layer.name: layer for each in wanted.values() for layer in each}
        if set(by_name) == {n for n, child in node.children.items() if not child.is_empty}:
            for name, layer in by_name.items():
                self._layer(layer, node.children[name], f"{path}/{name}")
            return
        for stem in stored.keys() | wanted.keys():
            theirs, ours = stored.get(stem, []), wanted.get(stem, [])
            if len(theirs) != len(ours):
                raise ValueError(
                    f"{path} has {len(ours)} layers with weights of the class {stem!r}, and the "
                    f"file {len(theirs)}"
                )
            for layer, child in zip(ours, theirs, strict=True):
                self._layer(layer, child, f"{path}/{layer.name}")


def _attributes(layer: keras.Layer) -> dict:
    """What hangs on a layer by name; PyTorch keeps the layers among it apart."""
    own = vars(layer)
    return {**own, **own.get("_modules", {})}


def _root(stored: Node) -> Node:
    """The node of the model: the root, or the one below it that has layers."""
    if any(re.match(r"layer[-_s]|_layer", name) for name in stored.children):
        return stored
    inner = [
        child
        for child in stored.children.values()
        if any(name.startswith("layer") for name in child.children)
    ]
    return inner[0] if len(inner) == 1 else stored


def _stem(name: str) -> str:
    """A numbered name without its number."""
    return _natural(name)[0]


def _natural(name: str) -> tuple[str, int]:
    """The stem of a numbered name, and its number: as they come in the order of the numbers."""
    stem = name.rstrip("0123456789")
    if stem == name:
        return name, -1
    return stem.removesuffix("_"), int(name[len(stem) :][:18])


def _snake_case(name: str) -> str:
    """The name of a class as Keras writes it in files: `layer_norm_lstm_cell`."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
