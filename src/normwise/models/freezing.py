"""Norms that training leaves as they are, and those that it moves again."""

from collections.abc import Iterable

import keras

from normwise.models import surgery
from normwise.models.norms import KINDS, norms_of
from normwise.models.report import Record, Report

# What `trainable = False` means for a kind, where that is more than its weights.
_FROZEN = {
    "batch": "normalizes by its moving statistics, in training too, and keeps them; keeps gamma "
    "and beta",
    "spectral": "keeps the kernel of the layer that it wraps; where that is called in training, u "
    "still follows it",
    "weight": "keeps the kernel and the weights of the layer that it wraps",
}
_TRAINED = {
    "batch": "normalizes by the statistics of the batch in training, which move its own; gamma and "
    "beta are trained",
    "spectral": "the kernel of the layer that it wraps is trained",
    "weight": "the weights of the layer that it wraps are trained",
}
_OTHERS_FROZEN = "keeps its weights; statistics it has only those of its input, as ever"
_OTHERS_TRAINED = "its weights are trained"


def freeze(
    model: keras.Model, kinds: str | Iterable[str] | None = None
) -> tuple[keras.Model, Report]:
    """Let training leave the norms of a model as they are, as one does for fine-tuning.

    Sets `trainable = False` on each; the report says what that means for its kind. For a batch
    norm it is more than that gamma and beta stay: it then normalizes by its moving statistics, in
    training too, and these stay as well.

    Args:
        model: a Sequential, functional or subclassed model that is built, nested or not. It is left
            as it is.
        kinds: of the norms, one or several of the keys of `normwise.models.KINDS`, as "batch"; by
            default all.

    Returns:
        The new model, compiled as the one given is and with the optimizer's state for the weights
        that are still trained, and a Report with a record for each norm of these kinds.

    Raises:
        TypeError: `model` is no model.
        ValueError: one of `kinds` is none; the model is not built, or cannot be copied.

    Example:

    >>> import keras
    >>> from normwise.models import freeze
    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(4), keras.layers.BatchNormalization()]
    ... )
    >>> frozen, report = freeze(model, "batch")
    >>> len(model.trainable_weights), len(frozen.trainable_weights)
    (4, 2)
    """
    return _set(model, kinds, False, "freeze")


def unfreeze(
    model: keras.Model, kinds: str | Iterable[str] | None = None
) -> tuple[keras.Model, Report]:
    """Let training move the norms of a model again: what `freeze` does, undone.

    Args, returns and errors are those of `freeze`; a norm within a layer that is itself frozen
    stays so, and the report says it.

    Example:

    >>> import keras
    >>> from normwise.models import freeze, unfreeze
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.LayerNormalization()])
    >>> moved, _ = unfreeze(freeze(model)[0])
    >>> len(moved.trainable_weights)
    2
    """
    return _set(model, kinds, True, "unfreeze")


def _set(
    model: keras.Model, kinds: str | Iterable[str] | None, trainable: bool, verb: str
) -> tuple[keras.Model, Report]:
    wanted = _checked(kinds)
    report = Report(f"{verb} the norms of {getattr(model, 'name', model)!r}")
    with surgery.operated(model, report) as made:
        saved = surgery.saved_layers(made)
        for norm in norms_of(made):
            if norm.kind not in wanted:
                continue
            was = type(norm.layer).__name__
            before = norm.layer.trainable
            norm.layer.trainable = trainable
            meanings, others = (
                (_TRAINED, _OTHERS_TRAINED) if trainable else (_FROZEN, _OTHERS_FROZEN)
            )
            why = meanings.get(norm.kind, others)
            if before == trainable:
                record = Record(norm.path, was, "kept", f"is so already: {why}", changed=False)
            else:
                if surgery.key(norm.layer) not in saved:
                    why += f"; {surgery.ONLY_IN_MEMORY}"
                record = Record(norm.path, was, "trained" if trainable else "frozen", why)
            report.records.append(record)
    if not len(report):
        report.notes.append(f"there is no norm of {', '.join(map(repr, wanted))} in it")
    return made, report


def _checked(kinds: str | Iterable[str] | None) -> tuple[str, ...]:
    wanted = tuple(KINDS) if kinds is None else (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for kind in wanted:
        if kind not in KINDS:
            raise ValueError(
                f"{kind!r} is no kind of norm; use some of {', '.join(map(repr, KINDS))}"
            )
    return wanted
