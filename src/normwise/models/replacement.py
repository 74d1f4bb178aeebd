"""Batch norms in a model become norms that do not depend on the batch."""

from collections.abc import Callable
from typing import Literal

import keras

from normwise import layers
from normwise.models import surgery
from normwise.models.norms import Norm, norms_of, options_of
from normwise.models.report import Record, Report

# More groups have fewer channels each: what Wu and He found best for 64 channels and more.
_MOST_GROUPS = 32

_Make = Callable[[keras.layers.BatchNormalization], keras.Layer | None]


def replace_batch_norm(
    model: keras.Model,
    with_: Literal["group", "instance", "layer"] | _Make = "group",
    groups: int | None = None,
) -> tuple[keras.Model, Report]:
    """Give a model other norms in the place of its batch norms.

    Group, instance and layer norm do the same in training and in inference, for batches of any
    size: for small ones, for data that is spread over devices, and where a sample's gradient may
    not depend on others, as in private training. Gamma, beta, axis, epsilon, name and trainability
    are kept; moving statistics go. The values change, so that the model must be trained further.

    Args:
        model: a Sequential, functional or subclassed model that is built, nested or not. It is left
            as it is.
        with_: "group"; "instance"; "layer", over the channels of each position; or a function that
            takes a batch norm and gives a layer in its place, or None to keep it. Weights of the
            same name and shape in that layer are set to the batch norm's.
        groups: for "group", into how many the channels are split; by default, for each layer, the
            largest divisor of its channels up to 32.

    Returns:
        The new model, compiled as the one given is and with its optimizer's state, and a Report
        with a record for each batch norm. One without spatial axes, of a Dense layer say, stays
        with "group" and "instance": a group of one position has few values, an instance of it one,
        and to normalize them erases what they say.

    Raises:
        TypeError: `model` is no model, or what a function gives no layer.
        ValueError: `with_` is none of these; `groups` divides the channels of some layer not, or is
            given for another norm than group norm; the model is not built, or cannot be copied.

    Reference: Wu and He, Group Normalization, 2018, https://arxiv.org/abs/1803.08494

    Example:

    >>> import keras
    >>> from normwise.models import replace_batch_norm
    >>> model = keras.Sequential(
    ...     [keras.Input((8, 8, 48)), keras.layers.BatchNormalization(name="norm")]
    ... )
    >>> other, report = replace_batch_norm(model)
    >>> other.get_layer("norm").groups
    24
    """
    make = _maker(with_, groups)
    report = Report(f"replace the batch norms of {getattr(model, 'name', model)!r}")
    with surgery.operated(model, report) as made:
        saved = surgery.saved_layers(made)
        for norm in norms_of(made):
            if norm.kind == "batch":
                report.records.append(_replaced(norm, saved, make, with_))
    if report.changed:
        report.notes.append("the values change: train the model further before it is used")
    if not len(report):
        report.notes.append("there is no batch norm in it")
    return made, report


def _maker(with_: str | _Make, groups: int | None) -> _Make:
    """The function that gives a layer for a batch norm."""
    if groups is not None and with_ != "group":
        raise ValueError(f"groups={groups} is for with_='group'; leave it out with {with_!r}")
    if callable(with_):
        return with_
    if with_ == "group":
        return lambda layer: layers.GroupNormalization(
            groups=_groups(layer, groups), **options_of(layer)
        )
    if with_ == "instance":
        return lambda layer: layers.InstanceNormalization(**options_of(layer))
    if with_ == "layer":
        return lambda layer: layers.LayerNormalization(**options_of(layer))
    raise ValueError(
        f"with_={with_!r} is no norm to replace batch norm with; use 'group', 'instance', 'layer' "
        "or a function that takes the layer and gives another"
    )


def _replaced(norm: Norm, saved: set[tuple[str, str]], make: _Make, with_: str | _Make) -> Record:
    """Replace a batch norm of a copy, or say why it stays."""
    layer, was = norm.layer, type(norm.layer).__name__

    def kept(why: str) -> Record:
        return Record(norm.path, was, "kept", why, changed=False)

    if norm.shape is None:
        return kept("was never called, so that its input's shape is not known")
    if len(norm.shape) == 2 and with_ in ("group", "instance"):
        return kept(
            f"its input {norm.shape} has no spatial axes, and to normalize "
            f"{'a few' if with_ == 'group' else 'single'} features of a sample erases them; "
            "with_='layer' takes all of them together"
        )
    other = make(layer)
    if other is None:
        return kept("the function that was given keeps it")
    if not isinstance(other, keras.Layer):
        raise TypeError(
            f"with_ gave {other!r} for the batch norm {norm.path!r}; return a layer, or None to "
            "keep it"
        )
    surgery.build_like(other, layer)
    theirs = {weight.name: weight for weight in layer.weights}
    for weight in other.weights:
        given = theirs.get(weight.name)
        if given is not None and given.shape == weight.shape:
            surgery.give_values([weight], [given])
    done = type(other).__name__
    if type(other) is layers.GroupNormalization:
        done = f"{done}(groups={other.groups})"
    why = "" if surgery.key(layer) in saved else surgery.NOT_TO_BE_SAVED
    surgery.become(layer, other)
    return Record(norm.path, was, done, why)


def _groups(layer: keras.layers.BatchNormalization, groups: int | None) -> int:
    """Into how many groups the channels of a batch norm are split."""
    channels = layer.moving_mean.shape[0]
    if groups is None:
        return next(n for n in range(min(_MOST_GROUPS, channels), 0, -1) if channels % n == 0)
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or channels % groups:
        raise ValueError(
            f"groups={groups!r} does not divide the {channels} channels of {layer.name!r}; use a "
            "divisor of every layer's channels, or leave groups out"
        )
    return groups
