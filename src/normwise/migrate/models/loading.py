"""Models and weights that Keras 2 saved, with or without layers of TensorFlow Addons."""

import contextlib
import math
from os import PathLike
from pathlib import Path
from typing import Any

import keras
import numpy as np

from normwise import keras_private
from normwise.migrate.models import configs, graphs, reader, training, weights
from normwise.migrate.models.reading import checkpoints
from normwise.migrate.models.reading.budget import Budget
from normwise.migrate.models.stored import Saved
from normwise.text import one_line


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
    is followed. Another process reads it, whose end is an error here, and neither that nor what is
    made of it takes more than the size of the file allows.

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
    FileNotFoundError: model.h5: there is no such file or folder; check the name
    """
    saved, model = read_model(path, custom_objects, safe_mode)
    if compile:
        with _refusing(path) as path:
            training.compile_as_saved(model, saved.training, path, custom_objects)
    return model


def read_model(path, custom_objects=None, safe_mode=True) -> tuple[Saved, keras.Model]:
    """What a file holds, and the model that it makes; arguments and errors are `load_model`'s."""
    with _refusing(path) as path:
        saved = reader.read_model(path)
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
    FileNotFoundError: model.h5: there is no such file or folder; check the name
    """
    with _refusing(path) as path:
        saved = reader.read_weights(path)
        budget = Budget(saved.file_bytes)
        for variable, array in weights.pair(model, saved.weights, lambda each: each.layers, budget):
            variable.assign(_tensor(array, variable.dtype))
        _finalize(model)


@contextlib.contextmanager
def _refusing(path):
    """Turn whatever a file brings about into one line that names it.

    h5py, Keras and the frameworks raise a dozen kinds of errors at damaged files.
    """
    path = Path(path)
    if not path.exists() and not checkpoints.exists(path):
        text = f"{path}: there is no such file or folder; check the name"
        raise FileNotFoundError(one_line(text))
    try:
        yield path
    except Exception as error:
        if type(error) is not ValueError:
            error = reader.damaged(type(error).__name__, str(error))
        raise ValueError(one_line(f"{path} cannot be loaded: {error}")) from error


def _built(saved: Saved, custom_objects, safe_mode) -> keras.Model:
    budget = Budget(saved.file_bytes)
    translator = configs.Translator(custom_objects, safe_mode)
    builder = graphs.Builder(translator, budget)
    with translator.scope(), keras_private.nothing_allocated():
        model = builder.model(saved.config)
        pairs = weights.pair(
            model, saved.weights, lambda each: builder.layers.get(each) or each.layers, budget
        )
        # Instead of random values, which would cost their computation and be lost.
        late = [
            (variable, array)
            for variable, array in pairs
            if not keras_private.begin_with(variable, _initializer(array))
        ]
    for variable, array in late:
        variable.assign(_tensor(array, variable.dtype))
    layers = keras_private.inner_layers(model)
    unrolled = [place for place, each in enumerate(layers) if each in builder.late["unroll"]]
    if builder.late["stateful"]:
        # Their states have values from the beginning, which no variable could have until here.
        for layer in builder.late["stateful"]:
            budget.spend("bytes of weights", _state_bytes(layer))
            layer.stateful = True
        values = model.get_weights()
        model = keras.models.clone_model(model)
        model.set_weights(values)
        layers = keras_private.inner_layers(model)
    for place in unrolled:
        layers[place].unroll = True
    _finalize(model)
    return model


def _state_bytes(layer: keras.layers.RNN) -> int:
    """The size of a layer's states: each like its output at one step, of a batch that is given."""
    shape = list(keras.tree.flatten(layer.output)[0].shape)
    if layer.return_sequences:
        del shape[1]
    states = keras.tree.flatten(layer.state_size)
    return 4 * len(states) * math.prod(extent or 1 for extent in shape)


def _initializer(array: np.ndarray):
    return lambda shape, dtype: _tensor(array, dtype)


def _tensor(array: np.ndarray, dtype):
    # Of a copy where several variables have one array, as JAX keeps the array itself.
    return keras.ops.convert_to_tensor(np.array(array), dtype)


def _finalize(model: keras.Model) -> None:
    """Let layers compute what follows from their weights."""
    for layer in keras_private.inner_layers(model):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()
