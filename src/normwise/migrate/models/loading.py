"""Models and weights that Keras 2 saved, with or without layers of TensorFlow Addons."""

import contextlib
from os import PathLike
from pathlib import Path
from typing import Any

import keras
import numpy as np

from normwise import keras_private
from normwise.migrate.models import checkpoints, configs, files, graphs, training, weights
from normwise.migrate.models.stored import Saved


def load_model(
    path: str | PathLike[str],
    custom_objects: dict[str, Any] | None = None,
    compile: bool = False,
    safe_mode: bool = True,
) -> keras.Model:
    """Read a model that TensorFlow's Keras 2 saved, as a plain model of Keras 3.

    Takes what `model.save` wrote: an `.h5` file, a `.keras` file, or the folder of a SavedModel, by
    Keras 2.4 to 2.15. Layers of TensorFlow Addons become normwise's, and so does
    LayerNormalization, whose axes Keras 3 gets wrong on some backends; all others become Keras's.
    TensorFlow is not needed. The model saves as `.keras`, which `keras.saving.load_model` reads
    once normwise is imported.

    A file is not trusted: no code in it runs, no module that it names is imported, no link in it
    is followed, and nothing is made in the size that it claims before that is compared with what
    it holds.

    Args:
        path: of the file or the folder.
        custom_objects: a dict from names to the classes and functions of your own that the model
            is made of, written for Keras 3.
        compile: whether to compile the model as it was; what Keras 3 does not know is left out
            with a warning. The state of the optimizer is not read.
        safe_mode: whether to refuse a Lambda layer, whose code is in the file: that of the Python
            that saved it, which in another may end the process.

    Returns:
        A keras.Sequential or a functional keras.Model with the weights of the file.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: it is no such file, is damaged, or holds what has no equal in Keras 3.

    Numerics: the weights are the file's, bit for bit.

    Example:

    >>> import normwise
    >>> normwise.migrate.load_model("model.h5")
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: 'model.h5'
    """
    saved, model = read_model(path, custom_objects, safe_mode)
    if compile:
        with _refusing(path) as path:
            training.compile_as_saved(model, saved.training, path, custom_objects)
    return model


def read_model(path, custom_objects=None, safe_mode=True) -> tuple[Saved, keras.Model]:
    """What a file holds, and the model that it makes; arguments and errors are `load_model`'s."""
    with _refusing(path) as path:
        saved = files.read_model(path)
        return saved, _built(saved, custom_objects, safe_mode)


def load_weights(model: keras.Model, path: str | PathLike[str]) -> None:
    """Read weights that Keras 2 saved into a model of Keras 3 of the same layers.

    Takes what `model.save_weights` wrote: an `.h5` file of either layout, or a checkpoint of
    TensorFlow by its prefix; and a whole model as `.h5`. Layers are told apart by name where all
    names are those of the file, and by order otherwise.

    Args:
        model: a built model; all of its weights are read, or none.
        path: of the file, or the prefix of the checkpoint: the path of its `.index` without that.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: it is no such file, is damaged, or does not fit the model, which then is as it
            was.

    Numerics: the weights are the file's, bit for bit, where the dtypes are the same.

    Example:

    >>> import keras, normwise
    >>> normwise.migrate.load_weights(keras.Sequential(), "model.h5")
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: 'model.h5'
    """
    with _refusing(path) as path:
        stored = files.read_weights(path)
        for variable, array in weights.pair(model, stored, lambda each: each.layers):
            variable.assign(_tensor(array, variable.dtype))
        _finalize(model)


@contextlib.contextmanager
def _refusing(path):
    """Turn whatever a file brings about into one line that names it.

    h5py, Keras and the frameworks raise a dozen kinds of errors at damaged files.
    """
    path = Path(path)
    if not checkpoints.exists(path):
        path.stat()
    try:
        yield path
    except Exception as error:
        text = " ".join(str(error).split())
        if type(error) is not ValueError:
            text = (
                f"it is damaged, or not as Keras 2 writes it: {type(error).__name__} ({text:.300})"
            )
        raise ValueError(f"{path} cannot be loaded: {text}") from error


def _built(saved: Saved, custom_objects, safe_mode) -> keras.Model:
    translator = configs.Translator(custom_objects, safe_mode)
    builder = graphs.Builder(translator)
    with translator.scope(), keras_private.nothing_allocated():
        model = builder.model(saved.config)
        pairs = weights.pair(
            model, saved.weights, lambda each: builder.layers.get(each) or each.layers
        )
        # Instead of random values, which would cost their computation and be lost.
        late = [
            (variable, array)
            for variable, array in pairs
            if not keras_private.begin_with(variable, _initializer(array))
        ]
    for variable, array in late:
        variable.assign(_tensor(array, variable.dtype))
    if builder.stateful:
        # Their states have values from the beginning, which no variable could have until here.
        for layer in builder.stateful:
            layer.stateful = True
        values = model.get_weights()
        model = keras.models.clone_model(model)
        model.set_weights(values)
    _finalize(model)
    return model


def _initializer(array: np.ndarray):
    return lambda shape, dtype: _tensor(array, dtype)


def _tensor(array: np.ndarray, dtype):
    # Of a copy: JAX would keep the array itself, which may be a part of the file.
    return keras.ops.convert_to_tensor(np.array(array), dtype)


def _finalize(model: keras.Model) -> None:
    """Let layers compute what follows from their weights."""
    for layer in keras_private.inner_layers(model):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()
