"""A model file of Keras 2 and TensorFlow Addons, written anew as a `.keras` file of Keras 3."""

import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

import normwise
from normwise.migrate.models import loading
from normwise.migrate.models.reading.budget import Budget
from normwise.models import comparison, files


@dataclasses.dataclass(frozen=True)
class ConvertedLayer:
    """One layer of a converted model.

    Args:
        name: of the layer, after the names of the models that it is in: `encoder/norm`.
        old: its class in the file, as `Addons>GroupNormalization`; None where the file has no such
            layer. A wrapper names what it wraps: `RNN(Addons>LayerNormLSTMCell)`.
        new: its class now.
        weights: how many arrays it holds.
        parameters: how many numbers are in them.
    """

    name: str
    old: str | None
    new: str
    weights: int
    parameters: int


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Args:
        path, out: the file that was read, and the one that was written.
        layers: every layer of the model, those of the models inside it too.
        largest_difference: between the predictions of the loaded and of the written model.
        tolerance: what that difference may be.
        versions: of normwise, Keras, its backend, and the Keras that had saved the file.
    """

    path: Path
    out: Path
    layers: tuple[ConvertedLayer, ...]
    largest_difference: float
    tolerance: float
    versions: dict[str, str]


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    custom_objects: dict[str, Any] | None = None,
    safe_mode: bool = True,
    overwrite: bool = False,
    seed: int = 0,
) -> Conversion:
    """Write a model that Keras 2 saved as a `.keras` file of Keras 3, and check what was written.

    The model is loaded, saved to a folder of its own beside `out`, and read back by Keras itself;
    its weights must be the loaded model's, bit for bit, and so must its predictions be on random
    input, but for rounding. Only then it moves to `out`, in one step: no failure and no Ctrl-C
    leaves half a file, or anything else, behind.

    What the old framework predicted is not known here, so it is not compared: that `load_model`
    loads faithfully is for its own tests to show, and for yours, with an input and a prediction
    that you keep.

    Args:
        path: an `.h5` or `.keras` file, or the folder of a SavedModel.
        out: the file to write; ends in `.keras`.
        custom_objects: a dict from names to the classes and functions of your own that the model
            is made of.
        safe_mode: whether to refuse a file with code in it, as a Lambda layer has.
        overwrite: whether `out` may exist.
        seed: of the random input.

    Returns:
        A Conversion: the layers, old and new, the largest difference, and the versions.

    Raises:
        ValueError: `out` is no new `.keras` file in a folder that exists; the model cannot be
            loaded (see `load_model`), saved or read back; or what was read back is another model.
        OSError: a file cannot be read or written.

    Numerics: the tolerance is eps * max(1, |y|) * (sum over the weights of the root of their size).
    The same program runs twice on the same numbers, so only the order of its sums can differ, where
    a framework leaves that open. A sum of n terms then moves by about eps * sqrt(n), the n of a
    layer is at most the size of its weight, and the layers' errors add. It is mostly 0.

    Example:

    >>> import normwise
    >>> normwise.migrate.convert("old.h5", "old.h5")
    Traceback (most recent call last):
    ValueError: old.h5 does not end in .keras, as Keras 3 wants it; write to old.keras
    """
    path, out = Path(path), Path(out)
    with prepared(path, out, custom_objects, safe_mode, overwrite, seed) as conversion:
        return conversion


@contextlib.contextmanager
def prepared(
    path: Path, out: Path, custom_objects=None, safe_mode=True, overwrite=False, seed=0
) -> Iterator[Conversion]:
    """All that `convert` does, the last step at the end of the block: if it raises, never."""
    files.check_out(path, out, overwrite)
    saved, model = loading.read_model(path, custom_objects, safe_mode)
    with files.written(path, out, overwrite) as written:
        again = _save_and_read_back(model, written, path, custom_objects, safe_mode)
        _compare_weights(model, again, path)
        difference, tolerance = _compare_predictions(model, again, path, seed, saved.file_bytes)
        yield Conversion(
            path=path,
            out=out,
            layers=tuple(_converted_layers(saved.config, model)),
            largest_difference=difference,
            tolerance=tolerance,
            versions={"saved by Keras": saved.version, **_versions()},
        )


def _save_and_read_back(model, written, path, custom_objects, safe_mode):
    # Whatever a layer's config or Keras raises: the model is of the file, not of this program.
    try:
        model.save(written)
        return keras.saving.load_model(
            written, custom_objects=custom_objects, compile=False, safe_mode=safe_mode
        )
    except OSError:
        raise
    except Exception as error:
        raise files.refused(
            f"{path} was loaded, but Keras {keras.__version__} cannot save it and read it back "
            f"({comparison.first_line(error)}); keep the model of load_model, and its weights alone"
        ) from error


def _compare_weights(model, again, path) -> None:
    for old, new in itertools.zip_longest(model.weights, again.weights):
        if old is None or new is None or not comparison.is_equal(old, new):
            named = new if old is None else old
            raise files.refused(
                f"{path}: the weight {named.path} is another after saving, so nothing was "
                "written; does a layer of your own leave an argument out of its config?"
            )


def _compare_predictions(model, again, path, seed, file_bytes) -> tuple[float, float]:
    """The largest difference between the models' outputs, and what it may be."""
    try:
        difference, tolerance = comparison.compare(
            model, again, seed, lambda: Budget(file_bytes).spend
        )
    except ValueError as error:
        raise files.refused(
            f"{path} was loaded, but {error}, so the file to write cannot be checked; use "
            "load_model, and save the model once you have compared its predictions"
        ) from error
    if not difference <= tolerance:
        raise files.refused(
            f"{path}: the written model predicts otherwise than the loaded one, by "
            f"{difference:.1e} with {tolerance:.1e} allowed; nothing was written. Does a layer of "
            "your own leave an argument out of its config?"
        )
    return difference, tolerance


def _converted_layers(config: dict, model) -> Iterator[ConvertedLayer]:
    """The layers of a model, and what their classes were in the config that it was made from."""
    old = dict(_classes(config))
    for name, layer in _layers(model):
        yield ConvertedLayer(
            name=name,
            old=old.get(name),
            new=_class(keras.saving.serialize_keras_object(layer)),
            weights=len(layer.weights),
            parameters=layer.count_params(),
        )


def _layers(model, prefix="") -> Iterator[tuple[str, keras.Layer]]:
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _layers(layer, f"{prefix}{layer.name}/")
        else:
            yield f"{prefix}{layer.name}", layer


def _classes(config: dict, prefix="") -> Iterator[tuple[str, str]]:
    """The same walk as `_layers`, through the config of a model."""
    for layer in config["config"].get("layers") or []:
        # As the loader names it: Keras 3 builds paths of the names.
        name = prefix + str(layer["config"].get("name")).replace("/", "_")
        if "layers" in layer["config"]:
            yield from _classes(layer, f"{name}/")
        else:
            yield name, _class(layer)


def _class(config: dict) -> str:
    """The class of a serialized layer, and in parentheses those of the layers that it wraps."""
    inner = config["config"]
    wrapped = [inner.get("layer"), inner.get("cell"), *(inner.get("cells") or [])]
    names = ", ".join(_class(each) for each in wrapped if isinstance(each, dict))
    name = config.get("registered_name") or config["class_name"]
    return f"{name}({names})" if names else name


def _versions() -> dict[str, str]:
    backend = keras.config.backend()
    return {
        "normwise": normwise.__version__,
        "keras": keras.__version__,
        # Keras has imported its backend, under the name that it goes by.
        backend: sys.modules[backend].__version__,
    }
