"""Derivatives beyond the first gradient: second order, forward mode, vmap."""

import keras
import numpy as np
import pytest
from frameworks import (
    BACKEND,
    assert_within,
    float64_enabled,
    gradients,
    second_gradients,
    to_numpy,
)
from norms import every_norm, expected, randomize, samples

from normwise import geometry

KEEP = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]], bool)
STEP = 1e-5


def built(norm, **options):
    layer = norm.make(dtype="float64", **options)
    layer.build((None, 5, 6))
    return randomize(layer)


def reference_slopes(layer, arrays, dy, direction, keep):
    """The gradients of sum(dx * direction), by finite differences of the reference's dx."""

    def slope(x, *parameters):
        for weight, value in zip(layer.weights, parameters, strict=True):
            weight.assign(value)
        return np.sum(expected(layer, x, keep).gradients(dy)[0] * direction)

    def difference(i, index):
        moved = [[np.array(a) for a in arrays] for _ in range(2)]
        moved[0][i][index] += STEP
        moved[1][i][index] -= STEP
        return (slope(*moved[0]) - slope(*moved[1])) / (2 * STEP)

    found = []
    for i, array in enumerate(arrays):
        differences = [difference(i, index) for index in np.ndindex(array.shape)]
        found.append(np.reshape(differences, array.shape))
    slope(*arrays)
    return found


@every_norm
@pytest.mark.parametrize("axis", [2, 1])
@pytest.mark.parametrize("mask", [None, KEEP], ids=["", "mask"])
def test_second_order_gradients_of_an_op(norm, axis, mask):
    """As a gradient penalty needs them, in float64 against finite differences."""
    with float64_enabled():
        layer = built(norm)
        x, dy, direction = (samples(seed=s, dtype="float64") for s in (0, 1, 2))
        arrays = [x, *(to_numpy(w) for w in layer.weights)]
        keep = None if mask is None else mask[..., None]
        right = reference_slopes(layer, arrays, dy, direction, keep)
        options = {"axis": axis, "mask": mask, "epsilon": layer.epsilon}

        # The same numbers at channels first, so that the same reference serves.
        def function(x, *parameters):
            x = x if axis == 2 else keras.ops.transpose(x, (0, 2, 1))
            if axis == 1 and mask is not None:
                options["mask"] = mask[:, None, :]
            y = norm.op(x, *parameters, **{**norm.options, **options})
            return y if axis == 2 else keras.ops.transpose(y, (0, 2, 1))

        found = second_gradients(function, arrays, dy, direction)
        for g, want in zip(found, right, strict=True):
            assert_within(g, want, 1e-6 * np.abs(want).max() + 1e-7)


@every_norm
def test_gradient_penalty_through_a_layer(norm):
    with float64_enabled():
        layer = built(norm)
        x, dy, direction = (samples(seed=s, dtype="float64") for s in (0, 1, 2))
        arrays = [x, *(to_numpy(w) for w in layer.weights)]
        right = reference_slopes(layer, arrays, dy, direction, None)

        def function(x, *weights):
            return layer.stateless_call(weights, [], x)[0]

        for g, want in zip(second_gradients(function, arrays, dy, direction), right, strict=True):
            assert_within(g, want, 1e-6 * np.abs(want).max() + 1e-7)


@pytest.mark.skipif(BACKEND != "torch", reason="only torch's kernel asks for many channels")
@every_norm
def test_wide_channels_have_second_order_gradients(norm):
    with float64_enabled():
        x, dy, direction = (samples((2, 3, 33), s, "float64") for s in (0, 1, 2))
        gamma = np.linspace(0.5, 1.5, 33)

        def function(x, gamma):
            return norm.op(x, gamma, **norm.options)

        def slope(x):
            _, (dx, _) = gradients(function, [x, gamma], dy)
            return np.sum(dx * direction)

        (found, _) = second_gradients(function, [x, gamma], dy, direction)
        for index in [(0, 0, 0), (1, 2, 32), (1, 1, 16)]:
            step = np.zeros_like(x)
            step[index] = STEP
            want = (slope(x + step) - slope(x - step)) / (2 * STEP)
            assert_within(found[index], want, 1e-6 * np.abs(found).max() + 1e-7)


@pytest.mark.skipif(BACKEND != "jax", reason="jax.jvp and jax.hessian")
@every_norm
def test_jax_forward_mode(norm):
    import jax

    x, dx, dy = samples(), samples(seed=1), samples(seed=2)

    def function(x):
        return norm.op(x, **norm.options)

    _, tangent = jax.jvp(function, (x,), (dx,))
    _, pull = jax.vjp(function, x)
    # <dy, J dx> = <J^T dy, dx>
    assert_within(np.vdot(tangent, dy), np.vdot(pull(dy)[0], dx), 1e-3)

    def penalty(x):
        return (function(x)[0] ** 3).sum()

    forward_over_reverse = jax.jit(jax.hessian(penalty))(x[:1])
    reverse_over_reverse = jax.jit(jax.jacrev(jax.jacrev(penalty)))(x[:1])
    assert np.abs(forward_over_reverse).max() > 0.01
    assert_within(forward_over_reverse, np.asarray(reverse_over_reverse), 1e-4)


@pytest.mark.skipif(BACKEND != "jax", reason="jax.vmap")
@every_norm
def test_jax_vmap(norm):
    import jax

    stack, gamma = samples((4, 2, 5, 6)), samples((4, 6), seed=1)

    def function(x, gamma):
        return norm.op(x, gamma, **norm.options)

    for axes in [(0, 0), (0, None), (None, 0)]:
        arguments = [a if axis == 0 else a[0] for a, axis in zip((stack, gamma), axes, strict=True)]
        found = jax.jit(jax.vmap(function, axes))(*arguments)
        for i in range(4):
            each = [a[i] if ax == 0 else a for a, ax in zip(arguments, axes, strict=True)]
            assert_within(found[i], np.asarray(function(*each)), 1e-5)


@pytest.mark.skipif(BACKEND != "torch", reason="torch.func")
@every_norm
@pytest.mark.parametrize("epsilon", [1e-3, 0.0])
@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)])
def test_torch_vmap_and_grad(norm, epsilon, axes):
    """Over samples, and over each parameter alone as ensembles do."""
    import torch

    shapes = [(4, 2, 5, 6), (4, 6), (4, 6)]
    arguments = [
        torch.tensor(samples(shape if axis == 0 else shape[1:], seed))
        for seed, (shape, axis) in enumerate(zip(shapes, axes, strict=True))
    ]

    def function(x, gamma, beta):
        return norm.op(x, gamma, beta, **norm.options, epsilon=epsilon)

    def without_gamma(x, gamma, beta):
        return norm.op(x, None, beta, **norm.options, epsilon=epsilon).sum() + gamma.sum()

    def penalty(*arguments):
        return (function(*arguments) ** 3).sum()

    slopes = torch.func.grad(penalty, argnums=(0, 1, 2))
    for transformed in (function, without_gamma, slopes):
        found = torch.func.vmap(transformed, axes)(*arguments)
        for i in range(4):
            each = [a[i] if axis == 0 else a for a, axis in zip(arguments, axes, strict=True)]
            want = transformed(*each)
            one = found if torch.is_tensor(want) else torch.cat([f[i].ravel() for f in found])
            one = one[i] if torch.is_tensor(want) else one
            want = want if torch.is_tensor(want) else torch.cat([w.ravel() for w in want])
            scale = float(want.abs().max())
            assert_within(one.numpy(), want.numpy(), 1e-4 * (1 + scale))


# torch registers its forward-mode formulas by what it has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.skipif(BACKEND != "torch", reason="torch.func")
@every_norm
def test_torch_forward_mode(norm):
    import torch

    x = torch.tensor(samples((1, 5, 6), dtype="float64"))

    def penalty(x):
        return (norm.op(x, **norm.options) ** 3).sum()

    forward = torch.func.jacfwd(penalty)(x)
    assert_within(forward.numpy(), torch.func.jacrev(penalty)(x).numpy(), 1e-9)
    found = torch.func.hessian(penalty)(x)
    want = torch.func.jacrev(torch.func.jacrev(penalty))(x)
    assert_within(found.numpy(), want.numpy(), 1e-9)


def test_the_axes_tested_choose_different_geometries():
    assert geometry.group((2, 5, 6), 2, 3).after == 1
    assert geometry.group((2, 6, 5), 1, 3).after == 5
