"""What Keras may rename: without it there is another way, or one line that says what is missing."""

import keras
import numpy as np
import old_models
import pytest

from normwise import keras_private, layers, migrate

GONE = "keras.src.gone"


@pytest.mark.parametrize("gone", [GONE, "keras.src.backend.common.masking"])
def test_without_the_state_of_keras_axes_are_refused_and_not_lost(gone, tmp_path, monkeypatch):
    monkeypatch.setattr(keras_private, "_STATE", gone)
    monkeypatch.setattr("absl.logging.warning", lambda *_: None)
    model = keras.Sequential([keras.Input((5, 6)), layers.LayerNormalization(axis=[1, 2])])
    model.save(tmp_path / "model.h5")
    with pytest.raises(ValueError, match="has lost its axis"):
        keras.models.load_model(tmp_path / "model.h5")


class Bare:
    """A layer, or a variable, of a Keras that calls everything otherwise."""


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (lambda: keras_private.inner_layers(Bare()), "Bare._flatten_layers"),
        (lambda: keras_private.own_variables(Bare()), "Bare._trainable_variables"),
        (lambda: keras_private.mask_of(None), "keras.src.backend.common.masking.get_keras_mask"),
    ],
)
def test_a_missing_name_is_named(use, name, monkeypatch):
    monkeypatch.setattr(keras_private, "_masking", None)
    with pytest.raises(ValueError, match=rf"^Keras 3\S+ has no {name}, .*; use Keras 3.12 to 3.15"):
        use()


@pytest.fixture
def old(tmp_path):
    """The path of a model of Keras 2, and its arrays by layer."""
    arrays = old_models.weights_of_small()
    return old_models.write_h5(tmp_path / "old.h5", old_models.small(), arrays), arrays


def test_an_old_model_without_the_name_of_initializers(old, monkeypatch):
    assert not keras_private.begin_with(Bare(), None)
    monkeypatch.setattr(keras_private, "begin_with", lambda *_: False)
    path, arrays = old
    model = migrate.load_model(path)
    for name, own in arrays.items():
        for found, wanted in zip(model.get_layer(name).get_weights(), own.values(), strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_an_old_model_without_the_state_of_keras(old, monkeypatch):
    monkeypatch.setattr(keras_private, "_STATE", GONE)
    with pytest.raises(ValueError, match=rf"has no {GONE}.get_global_attribute, which this needs"):
        migrate.load_model(old[0])
