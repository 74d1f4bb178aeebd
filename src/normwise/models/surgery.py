"""A model with other layers: the copy of a model, and what takes a layer's place in it.

    with surgery.operated(model, report) as copy:
        surgery.become(layer_of_the_copy, another)

The model itself is never touched: what fails, fails on a copy that nobody has seen.
"""

import contextlib
import pathlib
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from normwise import keras_private
from normwise.models.comparison import first_line
from normwise.models.report import Report
from normwise.typing import Tensor

# Of a layer that its holder's config does not say.
ONLY_IN_MEMORY = "only in memory: what holds it makes it anew when a file is loaded"
# The same, where the weights in the file are then others than those that it makes.
NOT_TO_BE_SAVED = f"{ONLY_IN_MEMORY}, and has no place for these weights then"


@contextlib.contextmanager
def operated(model: keras.Model, report: Report) -> Iterator[keras.Model]:
    """A copy of a model to change, which has its optimizer's state at the end.

    Args:
        model: is left as it is.
        report: is told what of the compiled settings could not be kept.

    Raises:
        TypeError: `model` is no model.
        ValueError: it has not been built, or cannot be copied.
    """
    made = copied(model)
    # A layer is the same object when it has become another; its weights are not.
    theirs = dict(zip(map(id, made.weights), model.weights, strict=True))
    sources = {
        layer: [theirs[id(each)] for each in own if id(each) in theirs]
        for layer, own in _own_by_layer(made).items()
    }
    with _known(model):
        yield made
        keras_private.track_again(made)
        if getattr(model, "compiled", False):
            _compile_as(model, made, sources, report)


def copied(model: keras.Model) -> keras.Model:
    """A copy with all weights, that is not compiled; as a saved and loaded file."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"{model!r} is no model; pass a keras.Model")
    if not model.built:
        raise ValueError(
            f"the model {model.name!r} has no weights yet; build it, or call it on some input"
        )
    try:
        with _known(model), warnings.catch_warnings():
            # Of layers without a build of their own, which the graph's call builds.
            warnings.simplefilter("ignore")
            made = _saved_and_loaded(model)
        if [each.shape for each in made.weights] != [each.shape for each in model.weights]:
            raise ValueError("the copy has other weights")
    except Exception as error:
        raise ValueError(
            f"the model {model.name!r} cannot be copied, as it cannot be saved and loaded "
            f"({first_line(error)}); give each class of yours that it has a get_config"
        ) from error
    layers = (keras_private.inner_layers(each) for each in (made, model))
    for ours, theirs in zip(*layers, strict=True):
        # Of a layer within a custom one no config says it. What holds a layer comes before it.
        if ours.trainable != theirs.trainable:
            ours.trainable = theirs.trainable
        give_values(keras_private.seeds_of(ours), keras_private.seeds_of(theirs))
    # Of layers that save none, as those in a list of lists.
    give_values(made.weights, model.weights)
    return made


def _saved_and_loaded(model: keras.Model) -> keras.Model:
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "model.keras"
        model.save(file)
        return keras.saving.load_model(file, compile=False, safe_mode=False)


def become(layer: keras.Layer, other: keras.Layer) -> None:
    """Make a layer of a copy another one, for the same input: all that holds it then holds that.

    A layer is held by attributes, lists, closures, the nodes of graphs and their tensors' history,
    and each holder by its identity; to exchange what it is keeps them all. Both objects are one
    from then on, as what Keras wraps around `other`'s methods refers to that.
    """
    nodes = keras_private.nodes_of(layer)
    build_like(other, layer)
    object.__setattr__(layer, "__class__", type(other))
    object.__setattr__(layer, "__dict__", other.__dict__)
    keras_private.give_nodes(layer, nodes)


def build_like(other: keras.Layer, layer: keras.Layer) -> None:
    """Build a layer, if it is not, for the input of another and with weights of such paths."""
    if other.built:
        return
    with contextlib.ExitStack() as scopes:
        for holder in layer.path.split("/")[:-1]:
            scopes.enter_context(keras.name_scope(holder))
        other.build_from_config(layer.get_build_config())


def give_values(
    variables: Iterable[keras.Variable], values: Iterable[keras.Variable | Tensor]
) -> None:
    """Set variables to those of others, in memory of their own: JAX's training deletes the old."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(keras.ops.copy(value))


def layers_of(model: keras.Model) -> Iterator[tuple[str, keras.Layer]]:
    """Every layer within a model, with where it is: the names of what holds it and its own.

    One that is held twice comes once.
    """
    seen: set[int] = set()

    def walk(holder: keras.Layer, before: str) -> Iterator[tuple[str, keras.Layer]]:
        for layer in keras_private.inner_layers(holder, recursive=False):
            if id(layer) not in seen:
                seen.add(id(layer))
                yield before + layer.name, layer
                yield from walk(layer, f"{before}{layer.name}/")

    return walk(model, "")


def saved_layers(model: keras.Model) -> set[tuple[str, str]]:
    """The layers that the config of a model says, and so a saved file, by `key`."""
    found = set()

    def collect(config: Any) -> None:
        if isinstance(config, dict):
            inner = config.get("config")
            if isinstance(inner, dict) and "name" in inner:
                found.add((config.get("registered_name") or config["class_name"], inner["name"]))
            config = config.values()
        elif not isinstance(config, (list, tuple)):
            return
        for each in config:
            collect(each)

    collect(keras.saving.serialize_keras_object(model))
    return found


def key(layer: keras.Layer) -> tuple[str, str]:
    """By what a config tells a layer."""
    return keras.saving.get_registered_name(type(layer)), layer.name


@contextlib.contextmanager
def _known(model: keras.Model) -> Iterator[None]:
    """Let Keras find the classes and functions that a model is made of without registration."""
    found = {id(type(each)): type(each) for each in [model, *keras_private.inner_layers(model)]}
    for value in keras.tree.flatten(keras_private.compiled_with(model)):
        kind = value if callable(value) and hasattr(value, "__name__") else type(value)
        found[id(kind)] = kind
    theirs = {
        name: each
        for each in found.values()
        if str(each.__module__).partition(".")[0] not in ("builtins", "keras", "normwise")
        for name in (each.__name__, keras.saving.get_registered_name(each))
    }
    with keras.saving.custom_object_scope(theirs):
        yield


def _own_by_layer(model: keras.Model) -> dict[int, list[keras.Variable]]:
    layers = [model, *keras_private.inner_layers(model)]
    return {id(layer): keras_private.own_variables(layer) for layer in layers}


def _compile_as(
    model: keras.Model,
    made: keras.Model,
    sources: dict[int, list[keras.Variable]],
    report: Report,
) -> None:
    """Compile a copy for the weights that it has now, with the state of the optimizer.

    Args:
        sources: by the id of the copy's layers, the weights of the model that theirs were.
    """
    try:
        made.compile_from_config(model.get_compile_config())
    except Exception as error:
        report.notes.append(
            f"compile the model anew: its settings cannot be copied ({first_line(error)})"
        )
        return
    before, after = (getattr(each, "optimizer", None) for each in (model, made))
    if before is None or after is None or not before.built:
        return
    source_of = {
        id(ours): theirs
        for layer, own in _own_by_layer(made).items()
        for ours, theirs in zip(own, sources.get(layer, ()), strict=False)
        if ours.shape == theirs.shape
    }
    fresh = len(after.variables) - _carry_state(before, after, source_of)
    if fresh:
        report.notes.append(f"the optimizer begins anew in {fresh} of its variables")


def _carry_state(before: Any, after: Any, source_of: dict[int, keras.Variable]) -> int:
    """Give an optimizer the state of another, and say how many variables that was.

    An optimizer has variables of its own, as the number of steps, and lists of them, as momenta,
    with one for each weight that it moves.
    """
    inner = getattr(before, "inner_optimizer", None)
    carried = 0 if inner is None else _carry_state(inner, after.inner_optimizer, source_of)
    index_of = {id(weight): i for i, weight in enumerate(keras_private.moved_by(before))}
    weights = keras_private.moved_by(after)
    indices = [index_of.get(id(source_of.get(id(weight)))) for weight in weights]
    for name, ours in keras_private.slots_of(after).items():
        theirs = keras_private.slots_of(before).get(name)
        if isinstance(ours, keras.Variable):
            pairs = [(ours, theirs)]
        elif theirs is None or len(ours) != len(weights):
            continue
        else:
            pairs = [
                (slot, theirs[i]) for slot, i in zip(ours, indices, strict=True) if i is not None
            ]
        for slot, value in pairs:
            if slot is not None and value is not None and slot.shape == value.shape:
                give_values([slot], [value])
                carried += 1
    return carried
