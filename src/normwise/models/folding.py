"""Batch normalization folded into the layers beside it, for inference.

What it has learned is then a scale and a shift for each channel, and so it can be part of the
kernel and the bias of the layer before it, or of the one after it.
"""

import collections
from typing import Any, NamedTuple

import keras
import ml_dtypes
import numpy as np

from normwise import keras_private
from normwise.models import comparison, surgery
from normwise.models.comparison import numbers
from normwise.models.norms import kind_of
from normwise.models.report import Record, Report

CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)
DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
LINEAR = (keras.layers.Dense, *CONVOLUTIONS, *TRANSPOSED, *DEPTHWISE, *SEPARABLE)
# How far predictions may move, of the largest of an output; of a float32 of 1e-7, a coarser dtype
# is allowed as much more.
TOLERANCE = 1e-5 / float(ml_dtypes.finfo("float32").eps)


def fold_batch_norm(model: keras.Model) -> tuple[keras.Model, Report]:
    """Fold each batch norm of a model into the layer before or after it: for faster inference.

        scale = gamma / sqrt(moving_variance + epsilon)
        before it: kernel * scale, (bias - moving_mean) * scale + beta    after it: likewise

    A batch norm is folded into the convolution (also transposed, depthwise or separable) or the
    `Dense` directly before it, or else directly after it, where that leaves all predictions what
    they were. An `Identity` of its name takes its place. Every other one is kept, and the report
    says why.

    Args:
        model: built, a Functional or Sequential model, which may have models in it; it is left as
            it is.

    Returns:
        The new model, compiled as the other one, and a record of each batch norm.

    Raises:
        TypeError: `model` is no model.
        ValueError: it has not been built, or cannot be copied; or, for some random input, the new
            model does not predict the same.

    Numerics:
        The weights are computed in float64 and rounded once. Predictions move by about the rounding
        errors of the layers; a mean many times the deviation is subtracted later than it was, and
        costs as many times more.

    Example:

    >>> import keras
    >>> from normwise.models import fold_batch_norm
    >>> layers = [keras.layers.Dense(4, name="dense"), keras.layers.BatchNormalization()]
    >>> model, report = fold_batch_norm(keras.Sequential([keras.Input((8,)), *layers]))
    >>> report[0].done
    'folded into dense'
    """
    report = Report("Batch normalization, folded into the layers beside it")
    with surgery.operated(model, report) as folded:
        calls, saved = _Calls(folded), surgery.saved_layers(folded)
        for path, layer in list(surgery.layers_of(folded)):
            if kind_of(layer) == "batch":
                report.records.append(_fold(path, layer, calls, saved))
    if report.changed:
        report.notes.append("for inference: to train this model is to train another one")
        _check_predictions(model, folded)
    return folded, report


class _KeptError(Exception):
    """Why a norm is kept."""


class _Place(NamedTuple):
    """Where a layer is called: in the graph of which model, and how."""

    model: keras.Model
    call: keras_private.Call


class _Calls:
    """Who calls the layers of a model."""

    def __init__(self, model: keras.Model) -> None:
        self._graphs: dict[int, list[keras_private.Call]] = {}
        self._places: dict[int, list[_Place]] = collections.defaultdict(list)
        self._others: dict[int, list[keras.Layer]] = collections.defaultdict(list)
        self._in_training: set[int] = set()
        self._model = model
        for holder in [model, *(layer for _, layer in surgery.layers_of(model))]:
            self._note(holder)

    def _note(self, holder: keras.Layer) -> None:
        calls = keras_private.calls_of(holder)
        if calls is not None:
            self._graphs[id(holder)] = calls
        for call in calls or ():
            self._places[id(call.of)].append(_Place(holder, call))
            if call.options.get("training"):
                inner = keras_private.inner_layers(call.of) if _is_layer(call.of) else ()
                self._in_training |= {id(call.of), *map(id, inner)}
        called = {id(call.of) for call in calls or ()}
        for layer in keras_private.inner_layers(holder, recursive=False):
            if id(layer) not in called:
                self._others[id(layer)].append(holder)

    def of_norm(self, norm: keras.Layer) -> _Place:
        """Where a norm is called: once, in a graph, and in inference."""
        for holder in self._others[id(norm)]:
            raise _KeptError(f"its caller is not a graph: {_named(holder)}")
        if id(self._model) not in self._graphs:
            raise _KeptError(
                f"its caller is not a graph: {_named(self._model)}; fold each model in it by itself"
            )
        place = self._only_place(norm, "it")
        if id(norm) in self._in_training:
            raise _KeptError("it is called with training=True")
        if place.call.options.get("mask") is not None:
            raise _KeptError("it is called with a mask")
        if len(place.call.inputs) != 1:
            raise _KeptError(f"it has {len(place.call.inputs)} inputs")
        return place

    def before(self, place: _Place) -> _Place:
        """Where the layer is called whose output a norm takes, and only the norm."""
        (given,) = place.call.inputs
        graph = self._graphs[id(place.model)]
        maker = next(call for call in graph if any(each is given for each in call.outputs))
        if not maker.inputs:
            raise _KeptError(f"the model {place.model.name} begins")
        found = self._linear(maker)
        self._only_reader(found, maker.of.name)
        return found

    def after(self, place: _Place) -> _Place:
        """Where the only layer is called that takes the output of a norm."""
        return self._linear(self._only_reader(place, "it"))

    def _linear(self, call: keras_private.Call) -> _Place:
        """Where a layer is called that a norm can be folded into, as far as the layer goes."""
        layer = call.of
        if type(layer) not in LINEAR:
            linear = next((each.__name__ for each in LINEAR if isinstance(layer, each)), None)
            other = f", which may compute something else than a {linear}" if linear else ""
            raise _KeptError(_named(layer) + other)
        for holder in self._others[id(layer)]:
            raise _KeptError(f"{layer.name} is also called by {holder.name}")
        if layer.quantization_mode is not None:
            raise _KeptError(f"{layer.name} is quantized to {layer.quantization_mode}")
        if getattr(layer, "lora_enabled", False):
            raise _KeptError(f"{layer.name} has a LoRA")
        return self._only_place(layer, layer.name)

    def _only_place(self, layer: keras.Layer, name: str) -> _Place:
        place, *others = self._places[id(layer)]
        if others:
            raise _KeptError(f"{name} is called {1 + len(others)} times")
        return place

    def _only_reader(self, place: _Place, name: str) -> keras_private.Call:
        """The only call that takes what another one makes."""
        (made,) = place.call.outputs
        if any(each is made for each in place.model.outputs):
            raise _KeptError(f"{name} makes an output of the model {place.model.name}")
        graph = self._graphs[id(place.model)]
        reader, *others = (call for call in graph if any(each is made for each in call.inputs))
        if others:
            raise _KeptError(f"{1 + len(others)} layers take what {name} makes")
        return reader


def _fold(path: str, norm: keras.Layer, calls: _Calls, saved: set[tuple[str, str]]) -> Record:
    """Fold a norm, if that can be, and say what became of it."""
    try:
        layer = _fold_beside(norm, calls)
    except _KeptError as kept:
        return Record(path, type(norm).__name__, "kept", str(kept), changed=False)
    why = "" if surgery.key(norm) in saved else surgery.NOT_TO_BE_SAVED
    # It stays as a step that does nothing, so that the graph has the names and outputs that it had.
    surgery.become(norm, keras.layers.Identity(name=norm.name, dtype=norm.compute_dtype))
    return Record(path, "BatchNormalization", f"folded into {layer.name}", why)


def _fold_beside(norm: keras.Layer, calls: _Calls) -> keras.Layer:
    """Fold a norm into the layer before it or after it, which is returned."""
    if type(norm) is not keras.layers.BatchNormalization:
        raise _KeptError("its class may compute something else than a BatchNormalization")
    place = calls.of_norm(norm)
    scale, shift = _scale_and_shift(norm)
    against = []
    for side, fold in (("before", _fold_into_before), ("after", _fold_into_after)):
        try:
            return fold(place, calls, scale, shift)
        except _KeptError as kept:
            against.append(f"{side} it, {kept}")
    raise _KeptError("; ".join(against))


def _scale_and_shift(norm: keras.Layer) -> tuple[np.ndarray, np.ndarray]:
    """What a norm multiplies each channel by in inference, and adds to it then."""
    with np.errstate(all="ignore"):
        scale = 1 / np.sqrt(numbers(norm.moving_variance) + norm.epsilon)
        if norm.scale:
            scale = scale * numbers(norm.gamma)
        shift = -numbers(norm.moving_mean) * scale
        if norm.center:
            shift = shift + numbers(norm.beta)
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        raise _KeptError("its weights give a scale or a shift that is not finite")
    return scale, shift


def _fold_into_before(place: _Place, calls: _Calls, scale, shift) -> keras.Layer:
    layer = calls.before(place).call.of
    if layer.activation not in (None, keras.activations.linear):
        name = getattr(layer.activation, "__name__", type(layer.activation).__name__)
        raise _KeptError(f"{layer.name} has the activation {name}")
    _check_axis(layer, place)
    *others, kernel = _kernels(layer)
    values = numbers(kernel)
    if isinstance(layer, DEPTHWISE):
        by_channel = scale.reshape(values.shape[-2:])
    elif isinstance(layer, TRANSPOSED):
        by_channel = scale[:, np.newaxis]
    else:
        by_channel = scale
    _give(layer, [*map(numbers, others), values * by_channel], _bias(layer) * scale + shift)
    return layer


def _fold_into_after(place: _Place, calls: _Calls, scale, shift) -> keras.Layer:
    layer = calls.after(place).call.of
    if "float" not in place.call.inputs[0].dtype:
        raise _KeptError(f"{layer.name} would be given {place.call.inputs[0].dtype}")
    _check_axis(layer, place)
    kernel, *others = map(numbers, _kernels(layer))
    if shift.any():
        _check_padding(layer, kernel)
    # Every output adds up all positions of the kernel.
    moved = (kernel * _by_input(layer, shift)).sum(axis=tuple(range(kernel.ndim - 2)))
    if isinstance(layer, (*DEPTHWISE, *SEPARABLE)):
        moved = moved.reshape(-1)
    else:
        moved = moved.sum(axis=1 if isinstance(layer, TRANSPOSED) else 0)
    for pointwise in others:
        moved = moved @ pointwise.reshape(pointwise.shape[-2:])
    _give(layer, [kernel * _by_input(layer, scale), *others], _bias(layer) + moved)
    return layer


def _by_input(layer: keras.Layer, values: np.ndarray) -> np.ndarray:
    """A value for each channel of the input, as the last two axes of the kernel have them."""
    if isinstance(layer, TRANSPOSED):
        return values  # (outputs, inputs)
    groups = getattr(layer, "groups", 1)
    if groups == 1:
        return values[:, np.newaxis]  # (inputs, outputs), or of each input
    # Each group of outputs has a kernel of its own inputs.
    return np.repeat(values.reshape(groups, -1).T, layer.filters // groups, axis=1)


def _check_axis(layer: keras.Layer, place: _Place) -> None:
    """Check that a norm has a value for each channel of the layer beside it."""
    rank = len(place.call.inputs[0].shape)
    axis = place.call.of.axis % rank
    channels = 1 if getattr(layer, "data_format", "") == "channels_first" else rank - 1
    if axis != channels:
        raise _KeptError(f"{layer.name} has its channels on axis {channels}, the norm on {axis}")


def _check_padding(layer: keras.Layer, kernel: np.ndarray) -> None:
    """Check that all outputs of a layer take as much of what its input is shifted by."""
    if isinstance(layer, TRANSPOSED):
        raise _KeptError(f"{layer.name} is transposed: its outputs take a shift unequally often")
    # A kernel of one position never reaches beyond the input, whatever the strides.
    if getattr(layer, "padding", "valid") != "valid" and any(n > 1 for n in kernel.shape[:-2]):
        raise _KeptError(f"{layer.name} pads its input with zeros, which the norm does not shift")


def _kernels(layer: keras.Layer) -> list[keras.Variable]:
    """The kernels of a layer, in the order in which they are applied."""
    if isinstance(layer, SEPARABLE):
        return [layer.depthwise_kernel, layer.pointwise_kernel]
    return [layer.kernel]


def _bias(layer: keras.Layer) -> np.ndarray | float:
    return 0.0 if layer.bias is None else numbers(layer.bias)


def _give(layer: keras.Layer, kernels: list[np.ndarray], bias: np.ndarray) -> None:
    """Give a layer other kernels, and a bias where it needs one."""
    dtype = _kernels(layer)[0].dtype
    with np.errstate(over="ignore"):
        *kernels, bias = (each.astype(dtype) for each in [*kernels, bias])
    if not all(np.isfinite(each.astype("float64")).all() for each in [*kernels, bias]):
        raise _KeptError(f"{layer.name} would have weights that are not finite in {dtype}")
    if layer.bias is None and bias.any():
        surgery.become(layer, type(layer).from_config({**layer.get_config(), "use_bias": True}))
    for kernel, values in zip(_kernels(layer), kernels, strict=True):
        kernel.assign(values)
    if layer.bias is not None:
        layer.bias.assign(bias)


def _check_predictions(model: keras.Model, folded: keras.Model) -> None:
    """Check that two models predict the same, on random input."""
    expected, found = comparison.predictions(model, folded)
    relative = TOLERANCE * comparison.eps_of(model)
    for at, (was, now) in enumerate(zip(expected, found, strict=True)):
        difference, largest = comparison.largest_difference(now, was), comparison.largest(was)
        if not difference <= relative * largest:
            raise ValueError(
                f"the model {model.name!r} cannot be folded: its output {at}, at most "
                f"{largest:.3g} for a random input, moves by {difference:.3g}, and may move by "
                f"{relative * largest:.3g}; keep it as it is"
            )


def _is_layer(called: Any) -> bool:
    return isinstance(called, keras.Layer)


def _named(called: Any) -> str:
    """A layer or operation, and what it is."""
    return f"{called.name} is a {type(called).__name__}"
