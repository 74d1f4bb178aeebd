"""The geometries of the kernels' tests: every family of kernel, odd extents, few elements."""

import keras
import pytest

from normwise import geometry
from normwise.activations import IDENTITY
from normwise.norm import NONE, Norm, Operands

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


def norm_of(plan, x_dtype, operands=NONE, subtract_mean=True, activation=IDENTITY):
    """The Norm of an input of this dtype and geometry."""
    return Norm(plan, x_dtype, x_dtype, EPSILON, subtract_mean, activation, operands.lie())


def call(kernel, plan, subtract_mean=True, activation=IDENTITY):
    """A kernel as a function of x, gamma and beta."""

    def function(x, gamma=None, beta=None):
        operands, dtype = Operands(gamma, beta), keras.backend.standardize_dtype(x.dtype)
        norm = norm_of(plan, dtype, operands, subtract_mean, activation)
        assert kernel.why_not(norm, x) is None
        return kernel.run(norm, x, operands)

    return function
