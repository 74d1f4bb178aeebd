"""The geometry of a norm: which elements share their statistics, and how they lie in memory.

Every norm of the family reads an input of any rank, without copying it, as

    (outer, before, groups, members, after)

and differs from the others only in which of these five extents tell the sets apart. This module is
pure Python: the layers, the kernels, the tests and the figures all ask it.
"""

import dataclasses
import functools
import itertools
import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any

__all__ = ["Geometry", "batch", "group", "layer", "response"]

Shape = tuple[int | None, ...]

# One group per channel, as Keras and TensorFlow Addons write it.
INSTANCE = -1

# The positions of an image whose channels lie last.
SPATIAL = (1, 2)


class KeepsHash:
    """A frozen dataclass that calculates its hash once: every call looks something up by one."""

    def kept_hash(self) -> int:
        """Its `__hash__`, by that name in its body: @dataclass writes one over an inherited one."""
        kept = self.__dict__
        if "_hash" not in kept:
            fields = dataclasses.fields(self)  # type: ignore[arg-type]
            kept["_hash"] = hash(tuple(getattr(self, f.name) for f in fields if f.compare))
        return kept["_hash"]

    def __getstate__(self) -> dict[str, Any]:
        # Another process hashes strings in another way.
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}


@dataclasses.dataclass(frozen=True)
class Geometry(KeepsHash):
    """How one input falls apart into sets of elements that share a mean and a variance.

    Which axes form the five extents is stored; everything else follows from it, the layout in
    memory by which the kernels read an input too. An extent not known before the call is None.

    Args:
        shape: the input's shape.
        ends: three positions in the order of the axes: outer ends before the first, before ends
            before the second, the channels (groups and members) before the third, then comes after.
        groups: how many groups the channels form.
        per: names of the extents that tell sets apart, e.g. `("outer", "groups")`.
        permutation: the order of the input's axes under which the five extents hold, None where
            that is the order in memory.

    Attributes:
        set_axes: axes of the input that lie wholly inside a set, ascending.
        parameter_axes: axes of the input that gamma and beta span, ascending.
        parameter_shape: the shape of gamma and beta.

    Example:

    >>> from normwise import geometry
    >>> g = geometry.group((8, 4, 4, 6), axis=-1, groups=3)
    >>> g.outer, g.before, g.groups, g.members, g.after
    (8, 16, 3, 2, 1)
    >>> g.set_size, g.parameter_shape
    (32, (6,))
    >>> g.set_of((0, 1, 2, 5)) == g.set_of((0, 3, 3, 4)) != g.set_of((1, 1, 2, 5))
    True
    """

    shape: Shape
    ends: tuple[int, int, int]
    groups: int | None
    per: tuple[str, ...]
    permutation: tuple[int, ...] | None = None

    # What follows, kept since every call asks for it.
    set_axes: tuple[int, ...] = dataclasses.field(init=False, repr=False, compare=False)
    parameter_axes: tuple[int, ...] = dataclasses.field(init=False, repr=False, compare=False)
    parameter_shape: Shape = dataclasses.field(init=False, repr=False, compare=False)
    __hash__ = KeepsHash.kept_hash

    def __post_init__(self) -> None:
        outer, before, channels, after = (self._axes(part) for part in range(4))
        inside = before
        if "outer" not in self.per:
            inside += outer
        if "groups" not in self.per or self.groups == 1:
            inside += channels
        if not self.keeps_after:
            inside += after
        object.__setattr__(self, "set_axes", tuple(sorted(inside)))
        object.__setattr__(self, "parameter_axes", channels)
        object.__setattr__(self, "parameter_shape", tuple(self.shape[axis] for axis in channels))

    def _axes(self, part: int) -> tuple[int, ...]:
        """The axes of outer, of before, of the channels or of after."""
        order = self.permutation or tuple(range(len(self.shape)))
        places = (0, *self.ends, len(order))
        return order[places[part] : places[part + 1]]

    def _extent(self, part: int) -> int | None:
        return _product(self.shape[axis] for axis in self._axes(part))

    @property
    def outer(self) -> int | None:
        """The extent of the leading axes, as a rule the batch."""
        return self._extent(0)

    @property
    def before(self) -> int | None:
        """The extent of the positions between outer and the channels."""
        return self._extent(1)

    @property
    def members(self) -> int | None:
        """How many channels a group has."""
        channels = self._extent(2)
        if self.groups == channels:
            return 1
        return channels // self.groups if channels is not None and self.groups else None

    @property
    def after(self) -> int | None:
        """The extent of the positions after the channels."""
        return self._extent(3)

    @property
    def extents(self) -> Shape:
        """The five extents in order."""
        return (self.outer, self.before, self.groups, self.members, self.after)

    @property
    def keeps_after(self) -> bool:
        """Whether positions after the channels tell sets apart: layer norm over a middle axis."""
        return "after" in self.per

    def statistics_shape(self, shape: Iterable[Any]) -> tuple[Any, ...]:
        """The shape of the statistics of an input of `shape`: means, then 1 / standard deviations.

        It leads with the axes of outer, so that whoever splits a batch splits these alike.
        """
        outer_end, _, channels_end = self.ends
        shape = tuple(shape)
        kept = shape[channels_end:] if self.keeps_after else (self.groups,)
        return (*shape[:outer_end], 2, *kept)

    @property
    def broadcast_statistics_shape(self) -> Shape:
        """The shape of a number for each set that broadcasts against the input."""
        return tuple(1 if a in self.set_axes else e for a, e in enumerate(self.shape))

    def batched(self) -> "Geometry":
        """The same sets in an input with one more axis in front, which tells sets apart too."""
        outer_end, before_end, channels_end = self.ends
        return dataclasses.replace(
            self,
            shape=(None, *self.shape),
            ends=(outer_end + 1, before_end + 1, channels_end + 1),
            per=self.per if "outer" in self.per else ("outer", *self.per),
            permutation=self.permutation and (0, *(axis + 1 for axis in self.permutation)),
        )

    def broadcast_shape(self, extents: Iterable) -> tuple:
        """The shape under which gamma or beta, whose extents are given, broadcasts against x.

        They are given, because those of x may be unknown where those of a parameter never are. With
        one more than the parameters have, the first is that of the batch.
        """
        given = tuple(extents)
        for_each = len(given) > len(self.parameter_axes)
        spanned = (0, *self.parameter_axes) if for_each else self.parameter_axes
        each = iter(given)
        return tuple(next(each) if axis in spanned else 1 for axis in range(len(self.shape)))

    @property
    def pattern(self) -> str | None:
        """How the sets lie in memory, by which kernels are chosen.

        "rows" are neighbours in memory, each with a gamma of its own; "runs" are as well, or a few
        such, with a gamma for each channel; in "columns" the neighbours are channels; where those
        are the positions after the channels, each with a set of its own, the sets are "kept". None
        where the sets are not neighbouring axes, which no kernel reads. An extent that is not known
        counts as more than 1.

        Example:

        >>> from normwise import geometry
        >>> geometry.layer((8, 4, 4, 6)).pattern, geometry.layer((8, 6, 4, 4), axis=1).pattern
        ('rows', 'kept')
        >>> geometry.group((8, 4, 4, 6), groups=3).pattern
        'columns'
        >>> geometry.group((8, 6, 4, 4), axis=1, groups=3).pattern
        'runs'
        """
        if self.permutation is not None:
            return None
        if self.after != 1:
            return "kept" if self.keeps_after else "runs"
        return "rows" if self.before == 1 else "columns"

    @property
    def set_size(self) -> int | None:
        """The number of elements in one set."""
        names = ("outer", "before", "groups", "members", "after")
        inside = (e for name, e in zip(names, self.extents, strict=True) if name not in self.per)
        return _product(inside)

    @property
    def splits_channels(self) -> bool:
        """Whether a set takes some of the channels: more than one of them, but not all."""
        return "groups" in self.per and self.members != 1 and self.groups != 1

    @property
    def trailing(self) -> bool:
        """Whether a set is the input's last axes as a whole, with gamma and beta to match."""
        rank = len(self.shape)
        return self.set_axes == self.parameter_axes == tuple(range(rank - len(self.set_axes), rank))

    def set_of(self, position: tuple[int, ...]) -> tuple[int, ...]:
        """The set that the element at `position` belongs to; equal tuples mean one set."""
        return tuple(
            index // (self.members or 1) if axis in self.parameter_axes else index
            for axis, index in enumerate(position)
            if axis not in self.set_axes
        )


def group(
    shape: Iterable[int | None], axis: int | Iterable[int] = -1, groups: int = 32
) -> Geometry:
    """The geometry of group norm, and with `groups=-1` of instance norm.

    Args:
        shape: the input's shape, of rank 2 or more; only the channels must be known.
        axis: the channel axis, an int or a list of one; any but the batch axis 0.
        groups: how many groups the channels form; -1 for a group per channel.

    Raises:
        TypeError: `axis` is no int.
        ValueError: `axis` is the batch or out of range, the channels are unknown, `groups` is not
            a positive int or -1, or does not divide the channels.

    Reference: Wu and He, Group Normalization, 2018, https://arxiv.org/abs/1803.08494

    Example:

    >>> group((8, 4, 4, 6), groups=3).extents
    (8, 16, 3, 2, 1)
    """
    axis = check_channel_axis(axis)
    return _group(_as_shape(shape, (axis,), symbols=True), axis, check_groups(groups))


def response(shape: Iterable[int | None], axis: int | Iterable[int] = SPATIAL) -> Geometry:
    """The geometry of filter response norm: that of instance norm, told by its spatial axes.

    Args:
        shape: the input's shape, of rank 2 or more; only the channels must be known.
        axis: every axis but the batch and the channels: an int, or a list of axes in any order,
            empty for (batch, channels).

    Raises:
        TypeError: `axis` is neither an int nor a list of ints.
        ValueError: the axes are not those of the shape but two, the batch is among them, one is out
            of range or named twice, or the channels are unknown.

    Reference: Singh and Krishnan, Filter Response Normalization Layer, 2019,
        https://arxiv.org/abs/1911.09737

    Example:

    >>> response((8, 4, 4, 6)) == group((8, 4, 4, 6), groups=INSTANCE)
    True
    """
    axes, shape = check_spatial_axes(axis), tuple(shape)
    channel = _channel_beside(axes, _as_shape(shape))
    return _group(_as_shape(shape, (channel,), symbols=True), channel, INSTANCE)


def layer(shape: Iterable[int | None], axis: int | Iterable[int] = -1) -> Geometry:
    """The geometry of layer norm and of RMS norm.

    Args:
        shape: the input's shape, of rank 2 or more.
        axis: the axes that a set spans: an int, or any list of axes in any order.

    Raises:
        TypeError: `axis` is neither an int nor a list of ints.
        ValueError: an axis is out of range or named twice, or no axis is named.

    Reference: Ba et al., Layer Normalization, 2016, https://arxiv.org/abs/1607.06450

    Example:

    >>> layer((8, 96, 56, 56), axis=1).per
    ('outer', 'after')
    """
    axis = check_axes(axis)
    axes = (axis,) if isinstance(axis, int) else axis
    return _layer(_as_shape(shape, axes), axes)


def batch(shape: Iterable[int | None], axis: int = -1) -> Geometry:
    """The geometry of batch norm: a set is a channel of the whole batch.

    Args:
        shape: the input's shape, of rank 2 or more.
        axis: the channel axis, any but the batch axis 0.

    Raises:
        TypeError: `axis` is no int.
        ValueError: `axis` is the batch or out of range.

    Reference: Ioffe and Szegedy, Batch Normalization, 2015, https://arxiv.org/abs/1502.03167

    Example:

    >>> batch((8, 4, 4, 6)).set_axes
    (0, 1, 2)
    """
    shape = _as_shape(shape)
    (channel,) = _canonical((check_channel_axis(axis),), shape)
    return Geometry(shape, (0, channel, channel + 1), shape[channel], per=("groups",))


def check_groups(groups: Any) -> int:
    """Return `groups` as an int if it can be a number of groups, before any shape is known."""
    remedy = "expected a positive int, or -1 for one group per channel (instance norm)"
    if isinstance(groups, bool) or not hasattr(groups, "__index__"):
        raise ValueError(f"groups={groups!r} is no number of groups; {remedy}")
    groups = operator.index(groups)
    if groups < 1 and groups != INSTANCE:
        raise ValueError(f"groups={groups} is no number of groups; {remedy}")
    return groups


def check_axes(axis: Any) -> int | tuple[int, ...]:
    """Return `axis` as an int or a tuple of ints, before any shape is known."""
    if isinstance(axis, (list, tuple)):
        if not axis:
            raise ValueError("axis=[] names no axis; name at least one, as in axis=-1")
        return tuple(_as_axis(a, axis) for a in axis)
    return _as_axis(axis, axis)


def check_channel_axis(axis: Any) -> int:
    """Return the one channel axis that `axis` names as an int or as a list of one."""
    axes = check_axes(axis)
    if isinstance(axes, tuple):
        if len(axes) != 1:
            raise ValueError(
                f"axis={list(axes)} names {len(axes)} axes, but the channels lie on one; use "
                f"axis={axes[-1]}, or layer norm to normalize over several axes"
            )
        (axes,) = axes
    if axes == 0:
        raise _batch_axis_error(0, None)
    return axes


def check_spatial_axes(axis: Any) -> tuple[int, ...]:
    """Return the spatial axes that `axis` names, of which (batch, channels) has none."""
    if isinstance(axis, (list, tuple)) and not axis:
        return ()
    axes = check_axes(axis)
    axes = (axes,) if isinstance(axes, int) else axes
    if 0 in axes:
        raise _batch_among_spatial_error(axes, None)
    return axes


@functools.lru_cache(maxsize=1024)
def _group(shape: Shape, axis: int, groups: int) -> Geometry:
    (channel,) = _canonical((axis,), shape)
    if channel == 0:
        raise _batch_axis_error(axis, shape)
    channels = shape[channel]
    if channels is None:
        raise ValueError(
            f"the number of channels on axis {axis} of shape {shape} is unknown; give that axis a "
            "fixed extent, as in keras.Input((None, None, 16))"
        )
    count = channels if groups == INSTANCE else groups
    if groups != INSTANCE and (count > channels or channels % count):
        wrong = "is more than" if count > channels else "does not divide"
        raise ValueError(
            f"groups={groups} {wrong} the {channels} channels on axis {axis} of shape {shape}; "
            f"use {_choices(_divisors(channels) or [INSTANCE])}"
        )
    return Geometry(shape, (1, channel, channel + 1), count, per=("outer", "groups"))


@functools.lru_cache(maxsize=1024)
def _channel_beside(axes: tuple[int, ...], shape: Shape) -> int:
    """The one axis that is neither the batch nor among `axes`."""
    rank = len(shape)
    if len(axes) != rank - 2:
        last, first = list(range(1, rank - 1)), list(range(2, rank))
        remedy = f"{last} for channels last, axis={first} for channels first" if last else last
        raise ValueError(
            f"axis={list(axes)} is to name every axis of shape {shape} but the batch and the "
            f"channels, {rank - 2} of them; use axis={remedy}"
        )
    spatial = _canonical(axes, shape)
    if 0 in spatial:
        raise _batch_among_spatial_error(axes, shape)
    (channel,) = {*range(1, rank)} - {*spatial}
    return channel


@functools.lru_cache(maxsize=1024)
def _layer(shape: Shape, axis: tuple[int, ...]) -> Geometry:
    axes = _canonical(axis, shape)
    kept = tuple(a for a in range(len(shape)) if a not in axes)
    first, last = axes[0], axes[-1]
    if last - first + 1 == len(axes):
        per = ("outer", "after") if last + 1 < len(shape) else ("outer",)
        return Geometry(shape, (first, first, last + 1), 1, per)
    ends = (len(kept), len(kept), len(shape))
    return Geometry(shape, ends, 1, ("outer",), permutation=kept + axes)


def _as_shape(shape: Iterable[Any], axes: Iterable[int] = (), symbols: bool = False) -> Shape:
    """A shape of ints, None where the extent is a symbol that only the call will know.

    PyTorch's tracer counts every extent in a tensor. Those on `axes`, which gamma and beta span,
    are as fixed as a weight; the others stay open. Its exporters count in `symbols`, of which the
    number of channels alone must be known.
    """
    shape = tuple(shape)
    if not all(type(e) is int for e in shape):
        known = "__int__" if symbols else "item"
        fixed = {axis + len(shape) if axis < 0 else axis for axis in axes}
        shape = tuple(
            int(e)
            if isinstance(e, numbers.Integral) or (axis in fixed and hasattr(e, known))
            else None
            for axis, e in enumerate(shape)
        )
    if len(shape) < 2:
        raise ValueError(
            f"shape {shape} has rank {len(shape)}, but a norm needs a batch axis and at least one "
            "more; add an axis, as in x[None, :]"
        )
    return shape


def _as_axis(axis: Any, given: Any) -> int:
    if isinstance(axis, bool) or not hasattr(axis, "__index__"):
        raise TypeError(f"axis={given!r} is no axis; expected an int, or a list or tuple of ints")
    return operator.index(axis)


def _canonical(axes: tuple[int, ...], shape: Shape) -> tuple[int, ...]:
    """The axes counted from the front, ascending."""
    rank = len(shape)
    for axis in axes:
        if not -rank <= axis < rank:
            raise ValueError(
                f"axis={axis} is out of range for shape {shape} of rank {rank}; "
                f"use an axis from {-rank} to {rank - 1}"
            )
    canonical = sorted(axis % rank for axis in axes)
    for axis, following in itertools.pairwise(canonical):
        if axis == following:
            raise ValueError(
                f"axis={list(axes)} names axis {axis} of shape {shape} twice; name each axis once"
            )
    return tuple(canonical)


def _batch_axis_error(axis: int, shape: Shape | None) -> ValueError:
    where = "" if shape is None else f" of shape {shape}"
    return ValueError(
        f"axis={axis} is the batch axis{where}, and group and instance norm keep samples apart; "
        "use the channel axis: -1 for channels last, 1 for channels first"
    )


def _batch_among_spatial_error(axes: tuple[int, ...], shape: Shape | None) -> ValueError:
    where = "" if shape is None else f" of shape {shape}"
    return ValueError(
        f"axis={list(axes)} names the batch axis{where}, and filter response norm keeps samples "
        "apart; name the spatial axes only: [1, 2] for images with channels last"
    )


def _product(extents: Iterable[int | None]) -> int | None:
    # By a loop, which torch.compile sees through, as not through math.prod of a generator.
    product = 1
    for extent in extents:
        if extent is None:
            return None
        product *= extent
    return product


def _divisors(number: int) -> list[int]:
    """All of them; of a number past 2**24, which only a damaged file has, those that are near."""
    small = [d for d in range(1, min(math.isqrt(number), 4096) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _choices(numbers: list[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
