"""The reference against itself: its gradients are the slopes of its output."""

import numpy as np
import pytest
import reference

CASES = {
    "group": (reference.group_labels((3, 4, 6), 2, 3), (2,), True),
    "group channels first": (reference.group_labels((3, 6, 4), 1, 2), (1,), True),
    "layer": (reference.layer_labels((3, 4, 6), (0, 2)), (0, 2), True),
    "rms": (reference.layer_labels((3, 4, 6), (1,)), (1,), False),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_slopes(case, masked):
    labels, axes, centred = CASES[case]
    rng = np.random.default_rng(1)
    shape = labels.shape
    span = tuple(shape[a] for a in axes)
    keep = rng.random(shape) > 0.3 if masked else np.ones(shape)
    if masked:
        keep[labels == 0] = False
    point = [rng.normal(2, 3, shape), rng.normal(size=span), rng.normal(size=span)]
    dy = rng.normal(size=shape)

    def norm(x, gamma, beta):
        return reference.Norm(x, gamma, beta, labels, axes, centred=centred, keep=keep)

    def value(*point):
        return np.sum(norm(*point).y * dy)

    check_slopes(value, point, norm(*point).gradients(dy), rng)


def check_slopes(value, point, gradients, rng):
    """Hold each gradient against the change of `value` along a random direction."""
    for index, gradient in enumerate(gradients):
        step = rng.normal(size=point[index].shape)
        ends = []
        for h in (1e-5, -1e-5):
            moved = list(point)
            moved[index] = point[index] + h * step
            ends.append(value(*moved))
        assert np.sum(gradient * step) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-7)


# Shapes of gamma and of beta: of each sample, of each element, and mixed with what all share.
LIES = [((3, 6), (3, 6)), ((3, 6), (6,)), ((3, 4, 6), (1, 4, 1)), ((3, 1, 6), (3, 6))]


@pytest.mark.parametrize("lies", LIES)
@pytest.mark.parametrize("centred", [True, False])
def test_gradients_of_statistics_and_of_parameters_that_lie_otherwise(lies, centred):
    labels, rng = CASES["group"][0], np.random.default_rng(2)
    keep = rng.random(labels.shape) > 0.3
    point = [rng.normal(2, 3, labels.shape), *(rng.normal(size=shape) for shape in lies)]
    dy, dmean, ddeviation = (rng.normal(size=s) for s in (labels.shape, (3, 1, 6), (3, 1, 6)))

    def norm(x, gamma, beta):
        return reference.Norm(x, gamma, beta, labels, (2,), centred=centred, keep=keep)

    def value(*point):
        found = norm(*point)
        mean, deviation = (each[:, :1] for each in (found.mean, found.deviation))
        return np.sum(found.y * dy) + np.sum(mean * dmean) + np.sum(deviation * ddeviation)

    check_slopes(value, point, norm(*point).gradients(dy, dmean, ddeviation), rng)


def test_labels_by_hand():
    assert reference.group_labels((2, 1, 4), 2, 2).tolist() == [[[0, 0, 1, 1]], [[2, 2, 3, 3]]]
    assert reference.layer_labels((2, 2, 2), (1,)).tolist() == [[[0, 1], [0, 1]], [[2, 3], [2, 3]]]


def test_output_by_hand():
    norm = reference.Norm([[1.0, 3.0]], [2.0, 2.0], [0.0, 1.0], np.zeros((1, 2), int), (1,), 0.0)
    assert norm.y.tolist() == [[-2.0, 3.0]]
    rms = reference.Norm([[3.0, -3.0]], None, None, np.zeros((1, 2), int), (1,), 0.0, False)
    assert rms.y.tolist() == [[1.0, -1.0]]
