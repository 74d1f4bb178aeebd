"""The norms of Keras and KerasHub in a model become those of this library."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from normwise import layers
from normwise.models import comparison, surgery
from normwise.models.norms import Norm, norms_of, options_of, package_of
from normwise.models.report import Record, Report

# How far two ways to compute a norm may be from each other, in eps of the largest value.
_TOLERANCE = 64


def accelerate(model: keras.Model) -> tuple[keras.Model, Report]:
    """Give a model the norms of this library in the place of Keras's and KerasHub's.

    Group, layer, RMS and spectral normalization of Keras, and KerasHub's RMS norms, become ours,
    with their weights, names and trainability. Each is compared with what it replaces on random
    input, and stays if it does not give the same; then the whole model is. What was compiled stays
    so, with the state of the optimizer: training goes on from where it was.

    Args:
        model: a Sequential, functional or subclassed model that is built, nested or not. It is left
            as it is.

    Returns:
        The new model, and a Report with a record for each of its norms.

    Raises:
        TypeError: `model` is no model.
        ValueError: it is not built, or cannot be copied; the new model predicts otherwise.

    A norm that a custom layer or a subclassed model makes itself is replaced in memory only: a
    saved file has Keras's there, for their config does not say it. The weights are the same in
    either case; the record says so.

    Example:

    >>> import keras
    >>> from normwise.models import accelerate
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.LayerNormalization(name="norm")])
    >>> faster, report = accelerate(model)
    >>> type(faster.get_layer("norm")).__module__
    'normwise.layers.layer'
    >>> [(record.layer, record.done) for record in report]
    [('norm', 'normwise.layers.LayerNormalization')]
    """
    report = Report(f"accelerate {getattr(model, 'name', model)!r}")
    with surgery.operated(model, report) as made:
        saved = surgery.saved_layers(made)
        for norm in norms_of(made):
            report.records.append(_accelerated(norm, saved))
    try:
        difference, tolerance = comparison.compare(model, made)
    except ValueError as error:
        report.notes.append(f"each norm was compared by itself, but not the whole: {error}")
        return made, report
    if not difference <= tolerance:
        raise ValueError(
            f"the accelerated {model.name!r} predicts otherwise, by {difference:.1e} where "
            f"{tolerance:.1e} is rounding; please report it, with the model"
        )
    report.notes.append(
        f"largest difference on random input {difference:.1e} ({tolerance:.1e} is rounding)"
    )
    return made, report


def _accelerated(norm: Norm, saved: set[tuple[str, str]]) -> Record:
    """Replace a norm of a copy, or say why it stays."""
    layer, was = norm.layer, type(norm.layer).__name__
    package = package_of(layer)

    def kept(why: str) -> Record:
        return Record(norm.path, was, "kept", why, changed=False)

    if package == "normwise":
        return kept("is of normwise already")
    make = _MAKERS.get(type(layer))
    if make is None and package == "keras_hub":
        make = _rms_norm_alike
    if make is None:
        return kept(_REASONS.get(norm.kind, f"{was} is no class that normwise knows"))
    if norm.shape is None:
        return kept("was never called, so that its input's shape is not known")
    try:
        other = make(layer)
        surgery.build_like(other, layer)
        _give_weights(other, layer)
        difference = _difference(layer, other, norm.shape)
    except _UnlikeError as error:
        return kept(str(error))
    except Exception as error:
        return kept(f"cannot be compared with normwise's ({comparison.first_line(error)})")
    if not difference <= 1:
        return kept("gives other values than normwise's on random input")
    why = "" if surgery.key(layer) in saved else surgery.ONLY_IN_MEMORY
    surgery.become(layer, other)
    return Record(norm.path, was, f"normwise.layers.{type(layer).__name__}", why)


_REASONS = {
    "batch": "normwise has no batch norm: see fold_batch_norm, replace_batch_norm",
    "unit": "divides by a length, at least 1e-6, and not by a root with an epsilon",
}


class _UnlikeError(ValueError):
    """A layer computes what no norm of this library does."""


def _group_norm(layer: keras.Layer) -> keras.Layer:
    return layers.GroupNormalization(groups=layer.groups, **options_of(layer))


def _layer_norm(layer: keras.Layer) -> keras.Layer:
    rms = {"rms_scaling": True} if getattr(layer, "rms_scaling", False) else {}
    return layers.LayerNormalization(**options_of(layer), **rms)


def _rms_norm(layer: keras.Layer) -> keras.Layer:
    options = options_of(layer)
    options.pop("scale", None)
    return layers.RMSNormalization(**options)


def _spectral_norm(layer: keras.Layer) -> keras.Layer:
    return layers.SpectralNormalization(
        layer.layer,
        power_iterations=layer.power_iterations,
        compatible=True,
        name=layer.name,
        dtype=layer.dtype_policy,
        trainable=layer.trainable,
    )


_MAKERS: dict[type[keras.Layer], Callable[[keras.Layer], keras.Layer]] = {
    keras.layers.GroupNormalization: _group_norm,
    keras.layers.LayerNormalization: _layer_norm,
    keras.layers.RMSNormalization: _rms_norm,
    keras.layers.SpectralNormalization: _spectral_norm,
}


def _rms_norm_alike(layer: keras.Layer) -> keras.Layer:
    """The RMS norm that a norm of KerasHub is: it has two dozen, each with a class of its own.

    Whether gamma is offset by 1, no attribute says. So it is asked with a gamma of random numbers.
    """
    weights = layer.weights
    if len(weights) > 1 or any(len(weight.shape) != 1 for weight in weights):
        raise _UnlikeError("has other weights than one scale")
    shape = layer.get_build_config()["input_shape"]
    for offset in (0.0, 1.0):
        other = layers.RMSNormalization(
            epsilon=getattr(layer, "epsilon", 1e-6),
            gamma_offset=offset,
            scale=bool(weights),
            name=layer.name,
            dtype=layer.dtype_policy,
        )
        other.trainable = layer.trainable
        surgery.build_like(other, layer)
        with _random(weights, other.weights):
            if _difference(layer, other, shape) <= 1:
                return other
    raise _UnlikeError(
        "computes no RMS norm over the last axis, with or without an offset of gamma"
    )


@contextlib.contextmanager
def _random(*groups: list[keras.Variable]) -> Iterator[None]:
    """Let groups of variables hold the same random numbers for a while."""
    before = [[keras.ops.copy(each.value) for each in group] for group in groups]
    rng = np.random.default_rng(0)
    values = [rng.uniform(0.5, 2, tuple(each.shape)) for each in groups[0]]
    try:
        for group in groups:
            for variable, value in zip(group, values, strict=True):
                variable.assign(value)
        yield
    finally:
        for group, values in zip(groups, before, strict=True):
            surgery.give_values(group, values)


def _difference(layer: keras.Layer, other: keras.Layer, shape: Any) -> float:
    """By how much two layers differ on random input, in what may be rounding."""
    rng = np.random.default_rng(0)
    extents = (extent or size for extent, size in zip(shape, (2, 3, 4, 5, 6, 7), strict=False))
    x = keras.ops.convert_to_tensor(rng.standard_normal(tuple(extents)), layer.compute_dtype)
    expected, found = (comparison.numbers(each(x)) for each in (layer, other))
    if expected.shape != found.shape:
        return np.inf
    allowed = _TOLERANCE * comparison.eps_of(layer) * max(1.0, comparison.largest(expected))
    return comparison.largest_difference(found, expected) / allowed


def _give_weights(other: keras.Layer, layer: keras.Layer) -> None:
    """Give a new layer the weights of the one that it replaces."""
    if isinstance(other, layers.SpectralNormalization):
        # Those of the layer that it wraps it has already.
        surgery.give_values([other.u], [layer.vector_u])
    else:
        surgery.give_values(other.weights, layer.weights)
