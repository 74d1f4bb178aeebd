"""What Keras keeps to itself and this project needs, as Keras 3.12 to 3.15.1 have it.

No other module outside of `kernels/` names it. Where a version lacks a name, the function here does
without, or says so.
"""

import contextlib
import importlib
import inspect
import numbers
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras

from normwise.typing import Initializer, Tensor

_STATE = "keras.src.backend.common.global_state"
_MASKING = "keras.src.backend.common.masking"
_UNINITIALIZED = "uninitialized_variables"


def saved_axes(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose axes come back from a legacy `.h5` file too.

    Keras's reader of such files drops `axis` where that is a list of several; in what it writes to
    one they therefore stand under `axes` as well.
    """
    state = _find(_STATE, "get_global_attribute", lambda name: None)
    if not isinstance(config["axis"], numbers.Integral) and state("use_legacy_config"):
        return {**config, "axes": list(config["axis"])}
    return config


def restored_axes(config: dict[str, Any]) -> dict[str, Any]:
    """What `saved_axes` was given.

    Raises:
        ValueError: a config that was saved, and so has a dtype, has no axis.
    """
    config = dict(config)
    if "axes" in config:
        config["axis"] = config.pop("axes")
    elif "dtype" in config and "axis" not in config:
        raise ValueError(
            f"the config of {config.get('name')!r} has lost its axis: Keras drops a list of axes "
            "when it reads an .h5 file or a config of Keras 2; load a model of Keras 2 by "
            "normwise.migrate.load_model; of Keras 3, build the model in code, read the file by "
            "its load_weights, and save it as .keras"
        )
    return config


@contextlib.contextmanager
def nothing_allocated() -> Iterator[None]:
    """Make variables without values, until the end; what fails before leaves none behind."""
    get, put = _find(_STATE, "get_global_attribute"), _find(_STATE, "set_global_attribute")
    outer = get(_UNINITIALIZED, [])
    put(_UNINITIALIZED, [])
    try:
        with keras.StatelessScope():
            try:
                yield
            except BaseException:
                put(_UNINITIALIZED, [])
                raise
    finally:
        put(_UNINITIALIZED, outer)


def begin_with(variable: keras.Variable, initializer: Initializer) -> bool:
    """Give a variable without a value another initializer; whether that could be done."""
    found = hasattr(variable, "_initializer")
    if found:
        variable._initializer = initializer
    return found


def inner_layers(layer: keras.Layer, recursive: bool = True) -> list[keras.Layer]:
    """The layers that a layer has, and with `recursive` those that they have."""
    return _name(layer, "_flatten_layers")(include_self=False, recursive=recursive)


def own_variables(layer: keras.Layer) -> list[keras.Variable]:
    """The variables of a layer without those of its layers; what is trained first."""
    return [*_name(layer, "_trainable_variables"), *_name(layer, "_non_trainable_variables")]


def seeds_of(layer: keras.Layer) -> list[keras.Variable]:
    """The states of the random numbers that a layer itself draws, as dropout does."""
    return [generator.state for generator in getattr(layer, "_seed_generators", ())]


def nodes_of(layer: keras.Layer) -> tuple[list, list]:
    """The calls of a layer in graphs, and those of what takes its outputs."""
    return _name(layer, "_inbound_nodes"), _name(layer, "_outbound_nodes")


def give_nodes(layer: keras.Layer, nodes: tuple[list, list]) -> None:
    """Make the calls of a layer in graphs those of another, without options that it does not take.

    Of a batch norm's call, say, Keras notes the mask, also where there is none.
    """
    vars(layer)["_inbound_nodes"], vars(layer)["_outbound_nodes"] = nodes
    takes = inspect.signature(layer.call).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in takes):
        return
    names = {each.name for each in takes} | {"training"}  # which Keras leaves out by itself
    for node in nodes[0]:
        given = node.arguments
        kept = {name: value for name, value in given.kwargs.items() if name in names}
        node.arguments = type(given)(*given.args, **kept)


def track_again(model: keras.Model) -> None:
    """Show torch the parameters of a model whose layers have other variables now."""
    for layer in [*inner_layers(model)[::-1], model]:
        if hasattr(layer, "_track_variables"):
            layer._track_variables()


def compiled_with(model: keras.Model) -> dict[str, Any]:
    """What a model was compiled with: optimizer, loss, metrics, as they were given."""
    return getattr(getattr(model, "_compile_config", None), "config", {})


def moved_by(optimizer: Any) -> list[keras.Variable]:
    """The weights that an optimizer moves, in the order of its slots for them."""
    return list(_name(optimizer, "_trainable_variables"))


def slots_of(optimizer: Any) -> dict[str, Any]:
    """What an optimizer keeps, by name: variables, and lists of one for each weight."""
    names = ("_variables", "_trainable_variables")
    return {
        name: value
        for name, value in vars(optimizer).items()
        if isinstance(value, keras.Variable)
        or (isinstance(value, list) and name not in names and _are_variables(value))
    }


def _are_variables(values: list) -> bool:
    return bool(values) and all(each is None or isinstance(each, keras.Variable) for each in values)


class Call(NamedTuple):
    """A call in the graph of a model.

    Attributes:
        of: the layer or operation that is called.
        inputs, outputs: the tensors that it takes, wherever among its arguments, and that it makes.
        options: the arguments that were given by name.
    """

    of: Any
    inputs: list[keras.KerasTensor]
    outputs: list[keras.KerasTensor]
    options: dict[str, Any]


def calls_of(layer: keras.Layer) -> list[Call] | None:
    """The calls of the graph that a model runs; None for what calls its layers in its own way."""
    functional = _find("keras.src.models.functional", "Functional")
    graph = layer
    if isinstance(layer, keras.Sequential) and type(layer).call is keras.Sequential.call:
        graph = _name(layer, "_functional")
    if getattr(type(graph), "call", None) is not functional.call:
        return None
    nodes = (node for same_depth in _name(graph, "_nodes_by_depth").values() for node in same_depth)
    return [
        Call(node.operation, node.input_tensors, node.outputs, node.arguments.kwargs)
        for node in nodes
    ]


def visit_shapes(model: keras.Model, inputs: Any, visit: Callable[[Any, tuple, Any], None]) -> Any:
    """Run a model on symbolic inputs, with `visit(operation, arguments, outputs)` after each step.

    The steps of the models in it are its own, and those of what a TimeDistributed repeats.
    """
    graph = _name(model, "_functional") if isinstance(model, keras.Sequential) else model

    def symbolic(operation: Any) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            if hasattr(operation, "_run_through_graph") or getattr(operation, "_functional", None):
                return visit_shapes(operation, args[0], visit)
            if isinstance(operation, keras.layers.TimeDistributed):
                batch, steps, *extents = args[0].shape
                symbolic(operation.layer)(
                    keras.KerasTensor((batch * steps, *extents), args[0].dtype)
                )
            outputs = operation.compute_output_spec(*args, **kwargs)
            visit(operation, (args, kwargs), outputs)
            return outputs

        return run

    return _name(graph, "_run_through_graph")(inputs, operation_fn=symbolic)


def mask_of(tensor: Tensor) -> Tensor | None:
    """The mask that a layer gave its output."""
    return _of_masking("get_keras_mask")(tensor)


def give_mask(tensor: Tensor, mask: Tensor | None) -> None:
    """Give an output its mask, if there is one."""
    if mask is not None:
        _of_masking("set_keras_mask")(tensor, mask)


def _of_masking(name: str) -> Callable:
    found = getattr(_masking, name, None)
    if found is None:
        raise _missing(f"{_MASKING}.{name}")
    return found


def _find(module: str, name: str, default: Any = None) -> Any:
    """A function of a module, or what serves where there is none."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        if default is None:
            raise _missing(f"{module}.{name}") from None
        return default


def _name(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        raise _missing(f"{type(owner).__name__}.{name}") from None


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


# Imported once: torch.compile follows no import.
_masking = _module(_MASKING)


def _missing(name: str) -> ValueError:
    return ValueError(
        f"Keras {keras.__version__} has no {name}, which this needs; use Keras 3.12 to 3.15.1"
    )
