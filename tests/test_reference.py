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

    for index, gradient in enumerate(norm(*point).gradients(dy)):
        step = rng.normal(size=point[index].shape)
        ends = []
        for h in (1e-5, -1e-5):
            moved = list(point)
            moved[index] = point[index] + h * step
            ends.append(np.sum(norm(*moved).y * dy))
        assert np.sum(gradient * step) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-7)


def test_labels_by_hand():
    assert reference.group_labels((2, 1, 4), 2, 2).tolist() == [[[0, 0, 1, 1]], [[2, 2, 3, 3]]]
    assert reference.layer_labels((2, 2, 2), (1,)).tolist() == [[[0, 1], [0, 1]], [[2, 3], [2, 3]]]


def test_output_by_hand():
    norm = reference.Norm([[1.0, 3.0]], [2.0, 2.0], [0.0, 1.0], np.zeros((1, 2), int), (1,), 0.0)
    assert norm.y.tolist() == [[-2.0, 3.0]]
    rms = reference.Norm([[3.0, -3.0]], None, None, np.zeros((1, 2), int), (1,), 0.0, False)
    assert rms.y.tolist() == [[1.0, -1.0]]
