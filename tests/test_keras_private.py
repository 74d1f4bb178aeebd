"""What Keras may rename: without it there is another way, or one line that says what is missing."""

import keras
import pytest

from normwise import keras_private, layers

GONE = "keras.src.gone"


@pytest.mark.parametrize("gone", [GONE, "keras.src.backend.common.masking"])
def test_without_the_state_of_keras_axes_are_refused_and_not_lost(gone, tmp_path, monkeypatch):
    monkeypatch.setattr(keras_private, "_STATE", gone)
    monkeypatch.setattr("absl.logging.warning", lambda *_: None)
    model = keras.Sequential([keras.Input((5, 6)), layers.LayerNormalization(axis=[1, 2])])
    model.save(tmp_path / "model.h5")
    with pytest.raises(ValueError, match="has lost its axis"):
        keras.models.load_model(tmp_path / "model.h5")
