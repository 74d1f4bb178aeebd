"""A model file of Keras 2 and TensorFlow Addons, written anew as a `.keras` file of Keras 3."""

import contextlib
import dataclasses
import itertools
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import ml_dtypes
import numpy as np

import normwise
from normwise import keras_private
from normwise.migrate.models import loading
from normwise.migrate.models.reading import formats
from normwise.migrate.models.reading.budget import Budget
from normwise.text import one_line

# Of an extent that the model leaves open. The first suits most models, and halves as often as a
# U-Net may ask; a model that refuses it may want more pixels, or fewer steps.
OPEN_EXTENTS = (32, 64, 256, 8, 1)
BATCH = 2
# How many steps of a scan one costs that Python repeats; multiplications, a comparison of a pool;
# and elements, an output, of which there are two in the framework's memory and two in NumPy's.
UNROLLED, POOLED, COMPARED = 12, 16, 4
PIECE = 1 << 20  # of outputs that are compared, in float64
STEPPING = (keras.layers.RNN, keras.layers.Bidirectional, keras.layers.TimeDistributed)
ATTENTIONS = (
    keras.layers.Attention,
    keras.layers.AdditiveAttention,
    keras.layers.MultiHeadAttention,
)


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
    _check_out(path, out, overwrite)
    saved, model = loading.read_model(path, custom_objects, safe_mode)
    with tempfile.TemporaryDirectory(
        prefix=".normwise-", dir=out.parent, ignore_cleanup_errors=True
    ) as folder:
        written = Path(folder) / out.name
        again = _save_and_read_back(model, written, path, custom_objects, safe_mode)
        _compare_weights(model, again, path)
        difference, tolerance = _compare_predictions(model, again, path, seed)
        yield Conversion(
            path=path,
            out=out,
            layers=tuple(_converted_layers(saved.config, model)),
            largest_difference=difference,
            tolerance=tolerance,
            versions={"saved by Keras": saved.version, **_versions()},
        )
        _move(written, out, overwrite)


def _move(written: Path, out: Path, overwrite: bool) -> None:
    """Move a file to its place in one step; without `overwrite`, to one that nobody has taken."""
    if overwrite:
        written.replace(out)
        return
    try:
        try:
            os.link(written, out)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            out.open("xb").close()
            written.replace(out)
    except FileExistsError:
        raise _refused(_exists(out)) from None


def _refused(text: str) -> ValueError:
    return ValueError(one_line(text))


def _exists(out: Path) -> str:
    return f"{out} exists; write to another, or pass overwrite=True (--overwrite)"


def _check_out(path: Path, out: Path, overwrite: bool) -> None:
    if out.suffix != ".keras":
        raise _refused(
            f"{out} does not end in .keras, as Keras 3 wants it; "
            f"write to {out.with_suffix('.keras')}"
        )
    if not out.parent.is_dir():
        raise _refused(f"{out}: there is no folder {out.parent}; make it first")
    if out.exists() and path.exists() and out.samefile(path):
        raise _refused(f"{out} is the file to convert; write to another")
    if out.is_dir():
        raise _refused(f"{out} is a folder; write to another name")
    if os.path.lexists(out) and not overwrite:
        raise _refused(_exists(out))


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
        raise _refused(
            f"{path} was loaded, but Keras {keras.__version__} cannot save it and read it back "
            f"({_first_line(error)}); keep the model of load_model, and its weights alone"
        ) from error


def _compare_weights(model, again, path) -> None:
    for old, new in itertools.zip_longest(model.weights, again.weights):
        if old is None or new is None or not np.array_equal(_numpy(old), _numpy(new), True):
            named = new if old is None else old
            raise _refused(
                f"{path}: the weight {named.path} is another after saving, so nothing was "
                "written; does a layer of your own leave an argument out of its config?"
            )


def _compare_predictions(model, again, path, seed) -> tuple[float, float]:
    """The largest difference between the models' outputs, and what it may be."""
    inputs, expected = _inputs_and_outputs(model, path, seed)
    found = _predict(again, inputs)
    tolerance = _tolerance(model, expected)
    pairs = (zip(_pieces(a), _pieces(b), strict=True) for a, b in zip(found, expected, strict=True))
    differences = itertools.starmap(_largest_difference, itertools.chain.from_iterable(pairs))
    difference = max(differences, default=0.0)
    if not difference <= tolerance:
        raise _refused(
            f"{path}: the written model predicts otherwise than the loaded one, by "
            f"{difference:.1e} with {tolerance:.1e} allowed; nothing was written. Does a layer of "
            "your own leave an argument out of its config?"
        )
    return difference, tolerance


def _inputs_and_outputs(model, path, seed):
    """Random input of the first extents that the model takes, and what it predicts for them."""
    specs = _input_specs(model, path)
    is_open = any(None in spec.shape[1:] for spec in keras.tree.flatten(specs))
    for extent in OPEN_EXTENTS if is_open else OPEN_EXTENTS[:1]:
        try:
            shaped = keras.tree.map_structure(lambda spec, n=extent: _shaped(spec, n), specs)
            _check_work(model, shaped, Budget(formats.file_bytes(path)))
            inputs = _random_inputs(model, shaped, np.random.default_rng(seed))
            outputs = _predict(model, inputs)
            if not all(output.size for output in outputs):
                raise ValueError("nothing is left of it at the end")
            return inputs, outputs
        except Exception as error:
            refusal = error
    raise _refused(
        f"{path} was loaded, but the model takes no random input of the shapes that it declares "
        f"({_first_line(refusal)}), so the file to write cannot be checked; use load_model, and "
        "save the model once you have compared its predictions"
    ) from refusal


def _input_specs(model, path):
    """The symbolic inputs in the structure that the model is called with."""
    try:
        return model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    except (AttributeError, ValueError) as error:
        raise _refused(
            f"{path} holds a {type(model).__name__}, which does not say what its inputs are, so "
            "the file to write cannot be checked; use load_model, call the model, and save it"
        ) from error


def _shaped(spec, extent: int) -> keras.KerasTensor:
    batch, *extents = spec.shape
    shape = (batch or BATCH, *(extent if given is None else given for given in extents))
    return keras.KerasTensor(shape, keras.backend.standardize_dtype(spec.dtype))


def _check_work(model, inputs, budget: Budget) -> None:
    """Count what a model makes of inputs before they are drawn: its config may claim any extent."""

    def count(layer, arguments, outputs):
        given, made = (
            [each for each in keras.tree.flatten(tensors) if isinstance(each, keras.KerasTensor)]
            for tensors in (arguments, outputs)
        )
        elements = sum(map(_size, made))
        budget.spend("elements", elements + _hidden(layer, given, made))
        steps = 1
        if isinstance(layer, STEPPING):
            steps = given[0].shape[1] or 0
            cells = getattr(layer, "forward_layer", layer)
            is_scan = isinstance(cells, keras.layers.RNN) and not cells.unroll
            budget.spend("steps", steps * (1 if is_scan else UNROLLED))
        # An output takes at most an operation for each weight that its channel has, or of its pool.
        positions = sum(_size(each) // (each.shape[-1] or 1) for each in made if each.shape)
        weights = sum(map(_size, getattr(layer, "weights", ())))
        pool = POOLED * math.prod(keras.tree.flatten(getattr(layer, "pool_size", 0)))
        budget.spend("operations", steps * positions * weights + elements * pool)

    count(None, (), inputs)
    outputs = keras_private.visit_shapes(model, inputs, count)
    budget.spend("elements", COMPARED * sum(map(_size, keras.tree.flatten(outputs))))


def _hidden(layer, given, made) -> int:
    """How many numbers a layer makes that are not in its outputs."""
    if isinstance(layer, ATTENTIONS) and len(given) > 1:
        # Of each position with each, the scores and what becomes of them.
        batch, channels = given[0].shape[0], given[0].shape[-1]
        positions = (_size(each) // max(1, batch * each.shape[-1]) for each in given[:2])
        of_each = getattr(layer, "num_heads", 1)
        if isinstance(layer, keras.layers.AdditiveAttention):
            of_each = channels
        return 4 * batch * math.prod(positions) * of_each
    if getattr(layer, "interpolation", "nearest") != "nearest":
        # A matrix for each axis.
        return sum(a * b for a, b in zip(given[0].shape, made[0].shape, strict=True) if a != b)
    if getattr(layer, "output_mode", "int") != "int":
        return _size(given[0]) * made[0].shape[-1]  # a row for each number, and then their sum
    return 0


def _random_inputs(model, specs, rng):
    """Input for every part of a model to do something: integers for tables, gaps for masks."""
    layers = keras_private.inner_layers(model)
    vocabularies = [
        layer.input_dim for layer in layers if isinstance(layer, keras.layers.Embedding)
    ]
    masks = [layer.mask_value for layer in layers if isinstance(layer, keras.layers.Masking)]

    def draw(spec):
        # Integers below the smallest vocabulary are valid whatever becomes of an input.
        if vocabularies or "int" in spec.dtype or spec.dtype == "bool":
            drawn = rng.integers(0, min(vocabularies, default=2), spec.shape, "int32")
        else:
            drawn = rng.standard_normal(spec.shape, "float32")
        if len(spec.shape) > 1:
            # As a shorter sequence, padded on the right, which is what cuDNN's kernels take.
            drawn[0, (spec.shape[1] + 1) // 2 :] = masks[0] if masks else 0
        return keras.ops.convert_to_tensor(drawn, spec.dtype)

    return keras.tree.map_structure(draw, specs)


def _predict(model, inputs) -> list[np.ndarray]:
    outputs = keras.tree.flatten(model(inputs, training=False))
    return [keras.ops.convert_to_numpy(output) for output in outputs]


def _numpy(tensor) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(tensor), "float64")


def _pieces(output: np.ndarray) -> Iterator[np.ndarray]:
    flat = output.reshape(-1)
    return (flat[at : at + PIECE].astype("float64") for at in range(0, flat.size, PIECE))


def _largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        return float(np.where(same, 0.0, np.abs(found - expected)).max(initial=0.0))


def _tolerance(model, outputs) -> float:
    dtypes = {layer.compute_dtype for layer in [model, *keras_private.inner_layers(model)]}
    eps = max(float(ml_dtypes.finfo(dtype).eps) for dtype in dtypes if "float" in dtype)
    pieces = itertools.chain.from_iterable(map(_pieces, outputs))
    largest = max((np.abs(y[np.isfinite(y)]).max(initial=1.0) for y in pieces), default=1.0)
    return float(eps * largest * sum(np.sqrt(_size(weight)) for weight in model.weights))


def _size(tensor) -> int:
    return math.prod(1 if extent is None else extent for extent in tensor.shape)


def _converted_layers(config: dict, model) -> Iterator[ConvertedLayer]:
    """The layers of a model, and what their classes were in the config that it was made from."""
    old = dict(_classes(config))
    for name, layer in _layers(model):
        yield ConvertedLayer(
            name=name,
            old=old.get(name),
            new=_class(keras.saving.serialize_keras_object(layer)),
            weights=len(layer.weights),
            parameters=sum(map(_size, layer.weights)),
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


def _first_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return text.strip().splitlines()[0]
