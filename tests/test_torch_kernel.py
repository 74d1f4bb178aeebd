"""The native kernels as PyTorch calls them: values, gradients of every order, memory."""

import functools
import itertools

import keras
import numpy as np
import pytest
from frameworks import assert_within, second_gradients, to_numpy
from plans import EPS, EPSILON, call, every_geometry, few_geometries
from reference import Norm, group_labels, layer_labels

from normwise import activations, geometry
from normwise.activations import IDENTITY
from normwise.kernels import composite, library

if keras.backend.backend() != "torch":
    pytest.skip("the kernels of another backend", allow_module_level=True)
if library.path() is None:
    pytest.skip("the native library was not built", allow_module_level=True)

import torch

from normwise.kernels import torch as kernel

ACTIVATIONS = {
    name: activations.find(function)
    for name, function in {
        "relu": keras.activations.relu,
        "leaky_relu": functools.partial(keras.activations.leaky_relu, negative_slope=0.3),
        "sigmoid": keras.activations.sigmoid,
        "tanh": keras.activations.tanh,
        "silu": keras.activations.silu,
        "gelu": keras.activations.gelu,
        "gelu_tanh": functools.partial(keras.activations.gelu, approximate=True),
    }.items()
}


def operands(plan, dtype="float32", present=(True, True)):
    """[x, gamma, beta] that require gradients, and a dy of x's shape and dtype."""
    rng = np.random.default_rng(0)
    dtype = getattr(torch, dtype)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy = (torch.tensor(a, dtype=dtype) for a in rng.normal(1.0, 2.0, (2, *plan.shape)))
    parameters = rng.uniform(0.5, 1.5, (2, *plan.parameter_shape))
    return [
        x.requires_grad_(),
        *(
            torch.tensor(p, dtype=arithmetic, requires_grad=True) if there else None
            for p, there in zip(parameters, present, strict=True)
        ),
    ], dy


def native(plan, subtract_mean=True, activation=IDENTITY):
    return call(kernel.KERNELS[0], plan, subtract_mean, activation)


def readable(plan, subtract_mean=True, activation=IDENTITY):
    """What `native` is to be the same as."""
    return call(composite.COMPOSITE, plan, subtract_mean, activation)


def both_passes(function, arrays, dy):
    """[y, dx, dgamma, dbeta] of sum(y * dy), without those of an absent gamma or beta."""
    y = function(*arrays)
    given = [a for a in arrays if a is not None]
    return [y.detach(), *torch.autograd.grad(y, given, dy)]


def assert_same(found, expected, tolerance):
    """Assert equality within a share of each tensor's largest number."""
    for f, e in zip(found, expected, strict=True):
        f, e = (to_numpy(t.detach()) for t in (f, e))
        assert_within(f, e, tolerance * (1 + np.abs(e).max(initial=0)))


def reference(plan, arrays, subtract_mean=True):
    channels = plan.parameter_axes[0]
    labels = (
        group_labels(plan.shape, channels, plan.groups)
        if "groups" in plan.per
        else layer_labels(plan.shape, plan.set_axes)
    )
    x, gamma, beta = (a if a is None else to_numpy(a.detach()) for a in arrays)
    return Norm(x, gamma, beta, labels, plan.parameter_axes, EPSILON, subtract_mean)


def check_against_reference(plan, dtype="float32", subtract_mean=True, present=(True, True)):
    arrays, dy = operands(plan, dtype, present)
    y, *found = both_passes(native(plan, subtract_mean), arrays, dy)
    given = [a for a in arrays if a is not None]
    assert [y.dtype, *(g.dtype for g in found)] == [given[0].dtype, *(a.dtype for a in given)]

    right, dy = reference(plan, arrays, subtract_mean), to_numpy(dy)
    arithmetic = EPS["float64" if dtype == "float64" else "float32"]
    rounding = EPS[dtype] if dtype in ("float16", "bfloat16") else 0
    tolerance = right.y_tolerance(arithmetic) + rounding * np.abs(right.y)
    assert_within(to_numpy(y), right.y, tolerance, "y")
    compared = (True, *present)
    want = list(itertools.compress(right.gradients(dy), compared))
    tolerances = list(itertools.compress(right.gradient_tolerances(dy, arithmetic), compared))
    # A float16 below 2^-14 has fewer digits: its last is 2^-24.
    tolerances[0] = tolerances[0] + rounding * np.abs(want[0]) + (2.0**-24 if rounding else 0)
    for g, w, tolerance in zip(found, want, tolerances, strict=True):
        assert_within(to_numpy(g), w, tolerance, "gradient")


@every_geometry
@pytest.mark.parametrize("subtract_mean", [True, False], ids=["subtract_mean", "rms"])
def test_values_and_gradients(plan, subtract_mean):
    check_against_reference(plan, subtract_mean=subtract_mean)


@every_geometry
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_dtypes(plan, dtype):
    check_against_reference(plan, dtype)


@every_geometry
@pytest.mark.parametrize("present", [(True, False), (False, True), (False, False)])
def test_absent_parameters(plan, present):
    check_against_reference(plan, present=present)


@few_geometries
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(plan, name):
    arrays, dy = operands(plan, "float64")
    found, want = (
        both_passes(f(plan, activation=ACTIVATIONS[name]), arrays, dy) for f in (native, readable)
    )
    assert_same(found, want, 1e-12)


@every_geometry
@pytest.mark.parametrize("subtract_mean", [True, False], ids=["subtract_mean", "rms"])
@pytest.mark.parametrize("present", [(True, True), (False, True), (False, False)])
def test_second_gradients_are_the_composites(plan, subtract_mean, present):
    arrays, dy = operands(plan, "float64", present)
    given = [a.detach() for a in arrays if a is not None]

    def of(make):
        def function(x, *given):
            rest = iter(given)
            y = make(plan, subtract_mean, ACTIVATIONS["tanh"])
            return y(x, *(next(rest) if there else None for there in present))

        return second_gradients(function, given, dy, torch.cos(given[0]))

    for found, want in zip(of(native), of(readable), strict=True):
        assert_within(found, want, 1e-11 * (1 + np.abs(want).max()))


@few_geometries
def test_third_gradients_are_the_composites(plan):
    arrays, _ = operands(plan, "float64")

    def third(function):
        slopes = [function(*arrays)]
        for order in (1, 2, 3):
            total = sum(torch.sin(s).sum() for s in slopes)
            slopes = torch.autograd.grad(total, arrays, create_graph=order < 3)
        return slopes

    assert_same(third(native(plan)), third(readable(plan)), 1e-10)


def jacobian_at_once(function, arrays):
    return torch.autograd.functional.jacobian(function, arrays, vectorize=True)


def jacobian_by_vmap(function, arrays):
    y = function(*arrays)

    def pull(dy):
        return torch.autograd.grad(y, arrays, dy, retain_graph=True)

    rows = torch.eye(y.numel(), dtype=y.dtype).reshape(-1, *y.shape)
    return tuple(
        g.reshape(*y.shape, *a.shape)
        for g, a in zip(torch.func.vmap(pull)(rows), arrays, strict=True)
    )


@few_geometries
@pytest.mark.parametrize("jacobian", [jacobian_at_once, jacobian_by_vmap])
def test_many_backward_passes_at_a_time(plan, jacobian):
    arrays, _ = operands(plan, "float64")
    function = native(plan, activation=ACTIVATIONS["tanh"])
    want = torch.autograd.functional.jacobian(function, tuple(arrays))
    assert_same(jacobian(function, tuple(arrays)), want, 1e-12)


@few_geometries
def test_many_second_derivatives_at_a_time(plan):
    arrays, _ = operands(plan, "float64")
    function = native(plan, activation=ACTIVATIONS["tanh"])

    def loss(*arrays):
        return torch.sin(function(*arrays)).sum()

    hessian = torch.autograd.functional.hessian
    for found, want in zip(
        hessian(loss, tuple(arrays), vectorize=True), hessian(loss, tuple(arrays)), strict=True
    ):
        assert_same(found, want, 1e-10)


@few_geometries
@pytest.mark.parametrize("name", [None, "silu"])
def test_finite_differences(plan, name):
    arrays, _ = operands(plan, "float64")
    function = native(plan, activation=ACTIVATIONS.get(name, IDENTITY))
    assert torch.autograd.gradcheck(function, arrays)
    assert torch.autograd.gradgradcheck(function, arrays)


def strided(x):
    """The same values with gaps between the elements."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def transposed(x):
    """The same values in a memory of the opposite order of axes."""
    order = tuple(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


@few_geometries
@pytest.mark.parametrize("lay", [strided, transposed])
@pytest.mark.parametrize("which", ["x", "dy", "parameters"])
def test_memory_of_any_order(plan, lay, which):
    arrays, dy = operands(plan)
    want = both_passes(native(plan), arrays, dy)
    laid = [lay(a.detach()).requires_grad_() for a in arrays]
    if which == "x":
        arrays = [laid[0], *arrays[1:]]
    elif which == "parameters":
        arrays = [arrays[0], *laid[1:]]
    else:
        dy = lay(dy)
    assert_same(both_passes(native(plan), arrays, dy), want, 1e-6)


FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (2, 6, 2, 3, 4)])
@pytest.mark.parametrize(
    "make",
    [lambda s: geometry.group(s, 1, 3), lambda s: geometry.group(s, 1, -1), geometry.layer],
    ids=["group", "instance", "layer"],
)
def test_channels_last_memory_is_read_as_it_lies(shape, make, monkeypatch):
    plan = make(shape, 1) if make is geometry.layer else make(shape)
    arrays, dy = operands(plan)
    want = both_passes(native(plan), arrays, dy)

    form = FORMATS[len(shape)]
    x = arrays[0].detach().contiguous(memory_format=form).requires_grad_()
    given, forward = [], kernel._Call.forward

    def seen(self, x, *rest):
        given.append(x.data_ptr())
        return forward(self, x, *rest)

    monkeypatch.setattr(kernel._Call, "forward", seen)
    found = both_passes(native(plan), [x, *arrays[1:]], dy.contiguous(memory_format=form))
    assert given == [x.data_ptr()]
    assert all(t.is_contiguous(memory_format=form) for t in found[:2])
    assert_same(found, want, 1e-5)


@pytest.mark.parametrize("shape", [(0, 5, 6), (2, 0, 6)])
@pytest.mark.parametrize("make", [functools.partial(geometry.group, groups=3), geometry.layer])
def test_empty_inputs(shape, make):
    arrays, dy = operands(make(shape, axis=-1))
    y, *found = both_passes(native(make(shape, axis=-1)), arrays, dy)
    assert y.shape == shape
    for gradient, array in zip(found, arrays, strict=True):
        assert_within(gradient.numpy(), np.zeros(array.shape), 0)


@few_geometries
def test_a_gradient_is_recorded_only_where_one_is_asked_for(plan):
    arrays, dy = operands(plan)
    _, _, want, _ = both_passes(native(plan), arrays, dy)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not native(plan)(*arrays).requires_grad
    x, gamma, beta = (a.detach() for a in arrays)
    assert not native(plan)(x, gamma, beta).requires_grad
    y = native(plan)(x, gamma.requires_grad_(), beta)
    assert_same(torch.autograd.grad(y, gamma, dy), [want], 1e-6)


@few_geometries
def test_a_meta_tensor_has_a_shape_and_no_values(plan):
    x = torch.empty(plan.shape, device="meta", dtype=torch.bfloat16)
    y = native(plan)(x, None, None)
    assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "meta")


@few_geometries
@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_a_parameter_on_another_device_is_refused(plan, name):
    """The kernel would read its address there as one of the CPU's, or take it for none."""
    x = torch.ones(plan.shape)
    parameters = {"gamma": None, "beta": None, name: torch.ones(plan.parameter_shape).to("meta")}
    with pytest.raises(ValueError, match=rf"{name} is on meta.*x on cpu.*{name}\.to\(x\.device\)"):
        native(plan)(x, parameters["gamma"], parameters["beta"])


@few_geometries
def test_another_default_device_changes_nothing(plan):
    """The statistics belong where x is: the kernel once wrote them to address 0."""
    arrays, dy = operands(plan)
    want = both_passes(native(plan), arrays, dy)
    with torch.device("meta"):
        found = both_passes(native(plan), arrays, dy)
    assert_same(found, want, 0)


def test_all_threads_flush_denormals_as_the_caller():
    # Wherever a row is calculated, a denormal gamma counts as 0 if the caller says so.
    plan = geometry.layer((4096, 256), -1)
    x = torch.tensor(np.random.default_rng(0).normal(size=plan.shape), dtype=torch.float32)
    gamma = torch.full(plan.parameter_shape, 1e-39)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        flushed = [native(plan)(x, gamma, None) for _ in range(10)]
    finally:
        torch.set_flush_denormal(False)
    kept = [native(plan)(x, gamma, None) for _ in range(10)]
    assert [y.count_nonzero().item() for y in flushed] == [0] * 10
    assert all((y != 0).float().mean() > 0.99 for y in kept)
