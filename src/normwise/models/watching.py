"""What comes into the norms of a model while it runs, whatever kind of model it is."""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from normwise.geometry import Geometry
from normwise.kernels import composite, gradients
from normwise.models.norms import Norm, norms_of, sets_of
from normwise.norm import Norm as OneNorm
from normwise.norm import check_dtype
from normwise.typing import Tensor

# Of weights, which are no sets of what comes in.
UNWATCHED = ("spectral", "weight")
# They divide by a root mean square, or by what grows with it.
NOT_CENTRED = ("rms", "unit", "filter response", "global response")


def watchable(model: keras.Model) -> list[Norm]:
    """The norms of a model into which something comes that falls apart into sets.

    Not those of weights, nor one that a modulated norm has in it: that is never called by itself.
    """
    norms = [norm for norm in norms_of(model) if norm.kind not in UNWATCHED]
    held = {id(inner_norm(norm.layer)) for norm in norms if inner_norm(norm.layer) is not None}
    return [norm for norm in norms if id(norm.layer) not in held]


def inner_norm(layer: keras.Layer) -> keras.Layer | None:
    """The norm that a modulated one has in it, with its epsilon, gamma and beta."""
    found = getattr(layer, "norm", None)
    return found if isinstance(found, keras.Layer) else None


def epsilon_of(layer: keras.Layer) -> float:
    """What a norm adds to the variance; a learned part of it is left out."""
    return float(getattr(inner_norm(layer) or layer, "epsilon", None) or 0.0)


@contextlib.contextmanager
def watched(norms: list[Norm]) -> Iterator[dict[str, list[Tensor | None]]]:
    """Let norms note the statistics of what comes in, by their paths, until the end.

    A layer that runs several times notes each. In a loop or a map that the framework traces by
    itself it notes None, for no value can leave that, and at the end has nothing noted.
    """
    noted: dict[str, list[Tensor | None]] = {norm.path: [] for norm in norms}
    before = [(vars(norm.layer), vars(norm.layer).get("call")) for norm in norms]
    try:
        for norm in norms:
            # Beside Keras's __setattr__, which would track it.
            vars(norm.layer)["call"] = _noting(norm, noted[norm.path], gradients.place())
        yield noted
        for calls in noted.values():
            # Of a part of its calls the averages would mislead.
            if any(each is None for each in calls):
                calls.clear()
    finally:
        for attributes, call in before:
            attributes.pop("call", None)
            if call is not None:
                attributes["call"] = call


def statistics(x: Tensor, sets: Geometry, centred: bool, epsilon: float) -> Tensor:
    """How many sets there are, the averages of their means and spreads, and the share of flat ones.

    The spread is the standard deviation, or without `centred` the root mean square; a set is flat
    where its square is at most epsilon.

    Returns:
        Tensor (4,) of the dtype of the arithmetic.
    """
    dtype = check_dtype(x.dtype)
    norm = OneNorm(sets, dtype, dtype, epsilon)
    x, count = ops.stop_gradient(x), composite.set_size(x, sets)
    _, mean, variance = composite.moments(norm, x, lambda x: composite.total(x, sets), count)
    if not centred:
        variance = variance + ops.square(mean)
    members = sets.members if sets.splits_channels else 1
    return ops.stack(
        [
            ops.cast(ops.size(mean), mean.dtype) / members,
            ops.mean(mean),
            ops.mean(ops.sqrt(variance)),
            ops.mean(ops.cast(variance <= epsilon, mean.dtype)),
        ]
    )


def _noting(norm: Norm, noted: list[Tensor | None], place: Any):
    """The call of a norm that also notes the statistics of what comes in."""
    layer, call = norm.layer, norm.layer.call
    signature = inspect.signature(call)

    @functools.wraps(call)
    def noting(*args, **kwargs):
        outputs = call(*args, **kwargs)
        x = _incoming(signature.bind(*args, **kwargs).arguments)
        # The same object: a graph has no other equality.
        if gradients.place() is not place:
            noted.append(None)
        elif x is not None:
            sets = sets_of(layer, tuple(x.shape))
            noted.append(statistics(x, sets, norm.kind not in NOT_CENTRED, epsilon_of(layer)))
        return outputs

    return noting


def _incoming(arguments: dict[str, Any]) -> Tensor | None:
    """What a call normalizes: its first argument, with the residual that comes beside it."""
    if arguments.get("statistics") is not None:
        return None  # a reversible norm that inverts
    x = next(iter(arguments.values()))
    residual = arguments.get("residual")
    return x if residual is None else composite.summed(x, residual, x.dtype)
