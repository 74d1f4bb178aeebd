"""Copies of models: nothing of the given one changes, and nothing is lost on the way."""

import keras
import numpy as np
import pytest
from frameworks import to_numpy
from whole_models import SMALL, Untouched, images, randomize

from normwise.models import Report, norms_of, surgery


def loss_of_ours(y, predicted):
    return keras.ops.mean(keras.ops.square(y - predicted))


@pytest.fixture(params=["functional", "subclassed"])
def model(request):
    return randomize(SMALL[request.param]())


def targets(model):
    return images(8, 4, 3 if model.name == "functional" else 6, seed=1)


def predictions(model, x):
    return np.asarray(model.predict(x, verbose=0))


def test_a_copy_trains_on_as_the_model_would_and_leaves_it(model):
    x, y = images(8, 4, 6), targets(model)
    model.compile(keras.optimizers.Adam(0.01), loss_of_ours, metrics=["mae"])
    model.train_on_batch(x, y)
    untouched, report = Untouched(model), Report("copy")
    with surgery.operated(model, report) as copy:
        pass
    assert not report.notes
    np.testing.assert_array_equal(predictions(copy, x), predictions(model, x))
    assert [w.shape for w in copy.weights] == [w.shape for w in model.weights]
    assert to_numpy(copy.optimizer.iterations) == 1
    copy.train_on_batch(x, y)
    # JAX deletes the arrays that a step has taken.
    untouched.check()
    model.train_on_batch(x, y)
    for _ in range(2):
        found, want = copy.train_on_batch(x, y), model.train_on_batch(x, y)
        np.testing.assert_allclose(found, want, rtol=1e-6)
    for ours, theirs in zip(copy.weights, model.weights, strict=True):
        np.testing.assert_allclose(to_numpy(ours), to_numpy(theirs), rtol=1e-5, atol=1e-6)


def test_a_copy_drops_out_what_the_model_would():
    model = keras.Sequential([keras.Input((40,)), keras.layers.Dropout(0.5, seed=1)])
    model(images(2, 40), training=True)
    with surgery.operated(model, Report("copy")) as copy:
        pass
    found, want = (to_numpy(each(images(2, 40), training=True)) for each in (copy, model))
    np.testing.assert_array_equal(found, want)


def test_a_layer_becomes_another_wherever_it_is_held():
    model = randomize(SMALL["functional"]())
    kept = model.get_layer("twice")
    with surgery.operated(model, Report("copy")) as copy:
        layer = copy.get_layer("twice")
        held = [layer]
        closure = lambda: layer  # noqa: E731
        surgery.become(layer, keras.layers.Activation("relu", name="twice"))
    assert type(kept) is keras.layers.LayerNormalization
    for found in (copy.get_layer("twice"), held[0], closure()):
        assert type(found) is keras.layers.Activation
    assert len(copy.weights) == len(model.weights) - 2
    loaded = keras.models.model_from_json(copy.to_json())
    assert type(loaded.get_layer("twice")) is keras.layers.Activation
    assert loaded.count_params() == copy.count_params()
    x = images(2, 4, 6)
    feature = keras.Model(copy.inputs, copy.get_layer("block").output)
    assert feature([x]).shape == (2, 4, 6)


def test_what_fails_in_the_middle_leaves_the_model():
    model = SMALL["sequential"]()
    untouched = Untouched(model)

    def operate():
        with surgery.operated(model, Report("copy")) as copy:
            surgery.become(copy.get_layer("rms"), keras.layers.Activation("relu", name="rms"))
            copy.get_layer("no such layer")

    with pytest.raises(ValueError, match="No such layer"):
        operate()
    untouched.check()


def test_settings_that_cannot_be_copied_are_reported():
    class Unsaved(keras.losses.Loss):
        def __init__(self, table):
            super().__init__()
            self.table = table

        def call(self, y, predicted):
            return keras.ops.mean(y - predicted, axis=-1)

    model = SMALL["sequential"]()
    model.compile("sgd", Unsaved(object()))
    report = Report("copy")
    with surgery.operated(model, report):
        pass
    (note,) = report.notes
    assert note.startswith("compile the model anew: its settings cannot be copied")


def test_what_cannot_be_copied_says_why():
    with pytest.raises(TypeError, match=r"pass a keras\.Model"):
        surgery.copied(keras.layers.Dense(2))
    with pytest.raises(ValueError, match="has no weights yet; build it"):
        surgery.copied(keras.Sequential([keras.layers.Dense(2)], name="empty"))

    class Odd(keras.Model):
        def __init__(self, table):
            super().__init__()
            self.table, self.dense = table, keras.layers.Dense(2)

        def call(self, x):
            return self.dense(x)

    model = Odd(object())
    model(np.ones((1, 2), "float32"))
    with pytest.raises(ValueError, match="cannot be copied, as it cannot be saved and loaded"):
        surgery.copied(model)


def test_norms_of_nested_models_have_paths_shapes_and_sets():
    norms = {norm.path: norm for norm in norms_of(SMALL["functional"]())}
    kinds = {path: norm.kind for path, norm in norms.items()}
    assert kinds == {
        "twice": "layer",
        "block/first": "layer",
        "block/last": "batch",
        "stack/group": "group",
        "stack/batch": "batch",
        "stack/rms": "rms",
    }
    assert norms["stack/group"].shape == (None, 4, 6)
    assert norms["stack/group"].sets.groups == 3
    assert norms["stack/batch"].parameters == 12
    assert norms["twice"].kernel == "of keras"
