"""`freeze` and `unfreeze`: which norms training leaves as they are."""

import keras
import numpy as np
import pytest
from frameworks import to_numpy
from whole_models import SMALL, Untouched, images, randomize, trained

from normwise.models import freeze, norms_of, unfreeze


def values(model):
    return {norm.path: [to_numpy(w) for w in norm.layer.weights] for norm in norms_of(model)}


def moved(model, x, y):
    """Which norms a step of training changes."""
    before = values(model)
    trained(model, x, y)
    return {
        path
        for path, found in values(model).items()
        if any(not np.array_equal(a, b) for a, b in zip(found, before[path], strict=True))
    }


def test_training_leaves_what_is_frozen():
    model = randomize(SMALL["functional"]())
    x, y = images(8, 4, 6), images(8, 4, 3, seed=1)
    trained(model, x, y)
    untouched = Untouched(model)
    batch, report = freeze(model, "batch")
    untouched.check()
    kinds = {norm.path: norm.kind for norm in norms_of(model)}
    assert {record.layer for record in report.changed} == {
        path for path, kind in kinds.items() if kind == "batch"
    }
    assert all("moving statistics, in training too" in record.why for record in report)
    assert moved(batch, x, y) == {path for path, kind in kinds.items() if kind != "batch"}
    every, _ = freeze(batch)
    assert not moved(every, x, y)
    again, report = unfreeze(every)
    assert len(report.changed) == len(kinds)
    assert moved(again, x, y) == set(kinds)


def test_the_optimizer_keeps_what_it_knows_of_the_rest():
    model = randomize(SMALL["sequential"]())
    x, y = images(8, 4, 6), images(8, 4, 6, seed=1)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    trained(model, x, y, steps=3)
    frozen, report = freeze(model, ["group", "rms"])
    assert not report.notes
    assert to_numpy(frozen.optimizer.iterations) == 3
    # A model whose norms never were trained takes the same step in the rest.
    for norm in norms_of(model):
        norm.layer.trainable = norm.kind not in ("group", "rms")
    after = {w.path.split("/")[-2:][0]: w for w in frozen.trainable_weights}
    assert set(after) == {"batch", frozen.layers[-1].name}
    kernel = frozen.layers[-1].kernel
    before = to_numpy(kernel)
    trained(frozen, x, y)
    # With momenta of its own a first step of Adam would be 0.01 in every weight.
    steps = np.abs(to_numpy(kernel) - before)
    assert steps.max() > 0
    assert np.ptp(steps) > 1e-4
    _, report = unfreeze(frozen)
    assert report.notes == ["the optimizer begins anew in 6 of its variables"]


def test_what_is_so_already_and_bad_kinds():
    model = SMALL["sequential"]()
    _, report = unfreeze(model, "batch")
    assert [(record.done, record.changed) for record in report] == [("kept", False)]
    assert report[0].why.startswith("is so already: normalizes by the statistics of the batch")
    with pytest.raises(ValueError, match="'bach' is no kind of norm; use some of 'batch'"):
        freeze(model, "bach")
    _, report = freeze(model, "spectral")
    assert report.notes == ["there is no norm of 'spectral' in it"]
