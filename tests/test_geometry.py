"""The geometry: which elements form a set, against the labels of the float64 reference."""

import itertools
import math

import numpy as np
import pytest
from reference import group_labels, layer_labels

from normwise import geometry

# Every row of the table in the design: what is asked, the five extents, what tells sets apart.
TABLE = {
    "group, channels last": (
        geometry.group((8, 4, 5, 6), -1, 3),
        (8, 20, 3, 2, 1),
        ("outer", "groups"),
    ),
    "group, channels first": (
        geometry.group((8, 6, 4, 5), 1, 3),
        (8, 1, 3, 2, 20),
        ("outer", "groups"),
    ),
    "group, channels between": (
        geometry.group((8, 4, 6, 5), 2, 3),
        (8, 4, 3, 2, 5),
        ("outer", "groups"),
    ),
    "group, no positions": (geometry.group((8, 6), -1, 2), (8, 1, 2, 3, 1), ("outer", "groups")),
    "one group": (geometry.group((8, 4, 5, 6), -1, 1), (8, 20, 1, 6, 1), ("outer", "groups")),
    "instance, channels last": (
        geometry.group((8, 4, 5, 6), -1, -1),
        (8, 20, 6, 1, 1),
        ("outer", "groups"),
    ),
    "instance, channels first": (
        geometry.group((8, 6, 4, 5), 1, -1),
        (8, 1, 6, 1, 20),
        ("outer", "groups"),
    ),
    "layer, last axis": (geometry.layer((8, 4, 5, 6), -1), (160, 1, 1, 6, 1), ("outer",)),
    "layer, trailing axes": (
        geometry.layer((8, 4, 5, 6), (1, 2, 3)),
        (8, 1, 1, 120, 1),
        ("outer",),
    ),
    "layer, one middle axis": (
        geometry.layer((8, 6, 4, 5), 1),
        (8, 1, 1, 6, 20),
        ("outer", "after"),
    ),
    "layer, axes apart": (geometry.layer((8, 4, 5, 6), (1, 3)), (40, 1, 1, 24, 1), ("outer",)),
    "layer, the batch too": (geometry.layer((8, 4), (0, 1)), (1, 1, 1, 32, 1), ("outer",)),
    "batch, channels last": (geometry.batch((8, 4, 5, 6), -1), (1, 160, 6, 1, 1), ("groups",)),
    "batch, channels first": (geometry.batch((8, 6, 4, 5), 1), (1, 8, 6, 1, 20), ("groups",)),
}


@pytest.mark.parametrize("row", TABLE)
def test_extents_of_every_row_of_the_table(row):
    found, extents, per = TABLE[row]
    assert found.extents == extents
    assert found.per == per
    assert math.prod(extents) == math.prod(found.shape)


def sets_by_extents(found, shape):
    """Labels by the definition: read x as (outer, before, groups, members, after), keep `per`."""
    names = ("outer", "before", "groups", "members", "after")
    kept = np.array([name in found.per for name in names])
    index = np.indices(found.extents) * kept.reshape(5, 1, 1, 1, 1, 1)
    labels = np.ravel_multi_index(tuple(index), found.extents)
    if found.permutation is None:
        return labels.reshape(shape)
    permuted = [shape[axis] for axis in found.permutation]
    return labels.reshape(permuted).transpose(np.argsort(found.permutation))


def sets_by_position(found, shape):
    numbers = {}
    labels = [numbers.setdefault(found.set_of(p), len(numbers)) for p in np.ndindex(*shape)]
    return np.reshape(labels, shape)


def assert_same_partition(found, expected):
    pairs = {(int(a), int(b)) for a, b in zip(found.flat, expected.flat, strict=True)}
    assert len(pairs) == len(np.unique(found)) == len(np.unique(expected))


SHAPES = [(2, 6), (2, 3, 6), (3, 4, 2, 6), (2, 4, 1, 3, 2)]
GROUPED = [
    (shape, axis, groups)
    for shape in SHAPES
    for axis in range(1, len(shape))
    for groups in (1, 2, 3, 6, -1)
    if groups == -1 or shape[axis] % groups == 0
]
OVER_AXES = [
    (shape, axes)
    for shape in SHAPES
    for size in range(1, len(shape) + 1)
    for axes in itertools.combinations(range(len(shape)), size)
]


def assert_is_partition(found, expected):
    """Three readings of a geometry agree with the reference: extents, set_of and set_size."""
    assert_same_partition(sets_by_extents(found, found.shape), expected)
    assert_same_partition(sets_by_position(found, found.shape), expected)
    _, sizes = np.unique(expected, return_counts=True)
    assert set(sizes.tolist()) == {found.set_size}
    # set_axes lie wholly inside a set: moving along one never leaves it.
    for axis in found.set_axes:
        assert (expected == np.take(expected, [0], axis)).all()


@pytest.mark.parametrize(("shape", "axis", "groups"), GROUPED)
def test_group_sets_are_those_of_the_reference(shape, axis, groups):
    count = shape[axis] if groups == -1 else groups
    found = geometry.group(shape, axis, groups)
    assert_is_partition(found, group_labels(shape, axis, count))
    assert found.parameter_axes == (axis,)
    assert found.splits_channels == (1 < count < shape[axis])


@pytest.mark.parametrize(("shape", "axes"), OVER_AXES)
def test_layer_sets_are_those_of_the_reference(shape, axes):
    found = geometry.layer(shape, axes)
    assert_is_partition(found, layer_labels(shape, axes))
    assert found.parameter_axes == found.set_axes == axes
    assert found.parameter_shape == tuple(shape[a] for a in axes)
    assert found.trailing == (axes == tuple(range(axes[0], len(shape))))
    assert not found.splits_channels
    contiguous = axes == tuple(range(axes[0], axes[-1] + 1))
    assert (found.permutation is None) == contiguous


@pytest.mark.parametrize("axis", [1, 2, 3, -1])
def test_batch_sets_are_channels_of_the_whole_batch(axis):
    shape = (3, 4, 2, 6)
    expected = np.indices(shape)[axis]
    assert_is_partition(geometry.batch(shape, axis), expected)


@pytest.mark.parametrize(
    ("form", "axis"), [(-1, 3), ([3], 3), ((-1,), 3), (np.int64(3), 3), (-3, 1), ([1], 1)]
)
def test_every_form_of_a_channel_axis_means_the_same(form, axis):
    shape = (2, 4, 5, 6)
    assert geometry.group(shape, form, 2) == geometry.group(shape, axis, 2)
    assert geometry.batch(shape, form) == geometry.batch(shape, axis)
    assert geometry.layer(shape, form) == geometry.layer(shape, axis)


@pytest.mark.parametrize("form", [[3, 1], (1, 3), [-1, -3], [1, -1], np.array([3, 1]).tolist()])
def test_layer_axes_are_sorted(form):
    assert geometry.layer((2, 4, 5, 6), form) == geometry.layer((2, 4, 5, 6), [1, 3])


def test_numpy_extents_are_extents():
    shape = tuple(np.array([2, 4, 6]))
    assert geometry.group(shape, -1, 3) == geometry.group((2, 4, 6), -1, 3)
    assert geometry.layer(shape).extents == (8, 1, 1, 6, 1)


@pytest.mark.parametrize(
    ("found", "extents", "set_size"),
    [
        (geometry.group((None, None, None, 6), -1, 3), (None, None, 3, 2, 1), None),
        (geometry.group((None, 6, 4, 5), 1, 3), (None, 1, 3, 2, 20), 40),
        (geometry.group((None, 6), -1, -1), (None, 1, 6, 1, 1), 1),
        (geometry.layer((None, None, 6)), (None, 1, 1, 6, 1), 6),
        (geometry.layer((None, None, 6), 1), (None, 1, 1, None, 6), None),
        (geometry.layer((None, 4, None, 6), (1, 3)), (None, 1, 1, 24, 1), 24),
        (geometry.batch((None, 4, 5, 6)), (1, None, 6, 1, 1), None),
    ],
)
def test_dynamic_extents_are_none(found, extents, set_size):
    assert found.extents == extents
    assert found.set_size == set_size


def test_extents_that_are_symbols_are_none():
    class Symbol:
        def __index__(self):
            raise TypeError("known only at the call")

    assert geometry.group((Symbol(), Symbol(), 6), -1, 3).shape == (None, None, 6)


@pytest.mark.parametrize(("shape", "set_size"), [((0, 4, 6), 8), ((2, 0, 6), 0)])
def test_empty_extents_are_extents(shape, set_size):
    assert geometry.group(shape, -1, 3).set_size == set_size


def test_without_channels_one_group_each_is_all_there_is():
    assert geometry.group((2, 0), -1, -1).groups == 0
    with pytest.raises(ValueError, match=r"groups=2 is more than the 0 channels .*; use -1$"):
        geometry.group((2, 0), -1, 2)


@pytest.mark.parametrize(
    ("found", "pattern"),
    [
        (geometry.layer((8, 4, 5, 6), (2, 3)), "rows"),
        (geometry.group((8, 6), -1, 3), "rows"),
        (geometry.group((8, 6, 1, 1), 1, 3), "rows"),
        (geometry.group((8, 6, 4, 5), 1, 3), "runs"),
        (geometry.group((8, 4, 6, 5), 2, 3), "runs"),
        (geometry.batch((8, 6, 4, 5), 1), "runs"),
        (geometry.group((8, 4, 5, 6), -1, 3), "columns"),
        (geometry.group((8, None, None, 6), -1, 3), "columns"),
        (geometry.batch((8, 4, 5, 6)), "columns"),
        (geometry.layer((8, 6, 4, 5), 1), "kept"),
        (geometry.layer((8, 6, None), 1), "kept"),
        (geometry.layer((8, 6, 1, 1), 1), "rows"),
        (geometry.layer((8, 4, 5, 6), (1, 3)), None),
    ],
)
def test_pattern_says_how_sets_lie_in_memory(found, pattern):
    assert found.pattern == pattern


def test_parameters_broadcast_against_the_input():
    found = geometry.layer((2, 4, 5, 6), [3, 1])
    assert found.parameter_shape == (4, 6)
    assert found.broadcast_shape(found.parameter_shape) == (1, 4, 1, 6)
    assert geometry.group((2, 4, 5, 6), 1, 2).broadcast_shape((4,)) == (1, 4, 1, 1)


def test_a_geometry_is_made_once():
    assert geometry.group([2, 4, 6], [-1], 3) is geometry.group((2, 4, 6), -1, 3)
