"""The geometries of the kernels' tests: every family of kernel, odd extents, few elements."""

import pytest

from normwise import geometry

EPSILON = 1e-3
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}

GEOMETRIES = {
    "group-last": geometry.group((2, 3, 5, 6), -1, 3),
    "group-first": geometry.group((2, 6, 3, 5), 1, 3),
    "group-middle": geometry.group((2, 3, 6, 5), 2, 2),
    "group-one": geometry.group((2, 5, 6), -1, 1),
    "group-flat": geometry.group((3, 6), -1, 2),
    "instance-last": geometry.group((2, 3, 5, 6), -1, geometry.INSTANCE),
    "instance-first": geometry.group((2, 6, 15), 1, geometry.INSTANCE),
    "layer-last": geometry.layer((2, 3, 33), -1),
    "layer-two": geometry.layer((2, 3, 5, 6), (-1, -2)),
    "layer-middle": geometry.layer((2, 3, 6, 5), 2),
    "layer-batch": geometry.layer((7, 3, 2), 0),
}
every_geometry = pytest.mark.parametrize("plan", GEOMETRIES.values(), ids=GEOMETRIES.keys())


def few(*names):
    return pytest.mark.parametrize("plan", [GEOMETRIES[name] for name in names], ids=names)


few_geometries = few("group-last", "group-first", "layer-two", "layer-middle")
