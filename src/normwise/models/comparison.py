"""Whether two models predict the same: on random input, of the shapes that they declare."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import ml_dtypes
import numpy as np

from normwise import keras_private

# Takes what is about to be made, "elements", "operations" or "steps", and how many.
Spend = Callable[[str, int], None]

# Of an extent that the model leaves open. The first suits most models, and halves as often as a
# U-Net may ask; a model that refuses it may want more pixels, or fewer steps.
OPEN_EXTENTS = (32, 64, 256, 8, 1)
BATCHES = (2, 1)  # the second, where two samples are too large
# How many steps of a scan one costs that goes both ways, or that Python repeats; how many
# multiplications, a comparison of a pool; and how many elements, an output, of which there are two
# in the framework's memory and two in NumPy's.
REPEATED, POOLED, COMPARED = 2, 16, 4
PIECE = 1 << 20  # of outputs that are compared, in float64
STEPPING = (keras.layers.RNN, keras.layers.Bidirectional, keras.layers.TimeDistributed)
ATTENTIONS = (
    keras.layers.Attention,
    keras.layers.AdditiveAttention,
    keras.layers.MultiHeadAttention,
)


def compare(
    model: keras.Model,
    other: keras.Model,
    seed: int = 0,
    count: Callable[[], Spend] = lambda: lambda what, amount: None,
) -> tuple[float, float]:
    """The largest difference between what two models predict, and what it may be.

    The second is eps * max(1, |y|) * (sum over the weights of the root of their size): a sum of n
    terms in another order moves by about eps * sqrt(n), the n of a layer is at most the size of its
    weight, and the layers' errors add.

    Args:
        model, other: models of the same inputs and outputs.
        seed: of the random input.
        count: gives, for each input that is tried, what is told what the first model makes of it,
            before it does so; that may raise ValueError.

    Raises:
        ValueError: the model does not say what its inputs are, or takes none of what was tried.
    """
    expected, found = predictions(model, other, seed, count)
    differences = [largest_difference(*pair) for pair in zip(found, expected, strict=True)]
    return float(np.max(differences, initial=0.0)), _tolerance(model, expected)


def predictions(
    model: keras.Model,
    other: keras.Model,
    seed: int = 0,
    count: Callable[[], Spend] = lambda: lambda what, amount: None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The outputs of each of two models for the same random input; as for `compare`."""
    with _rolled(model, other), _unmoved(model, other):
        inputs, expected = _inputs_and_outputs(model, seed, count)
        found = _predict(other, inputs)
    return expected, found


def largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Of two outputs; NaN where one of them has that and the other a number."""
    pairs = zip(_pieces(found), _pieces(expected), strict=True)
    return float(np.max([_difference_of(*pair) for pair in pairs], initial=0.0))


def largest(output: np.ndarray) -> float:
    """The largest finite magnitude in an output, 0 where there is none."""
    sizes = (np.abs(y[np.isfinite(y)]).max(initial=0.0) for y in _pieces(output))
    return float(max(sizes, default=0.0))


def eps_of(model: keras.Layer) -> float:
    """The distance of 1 to the next number in the coarsest dtype that a model computes in."""
    dtypes = {layer.compute_dtype for layer in [model, *keras_private.inner_layers(model)]}
    return max(float(ml_dtypes.finfo(dtype).eps) for dtype in dtypes if "float" in dtype)


@contextlib.contextmanager
def _unmoved(*models: keras.Model) -> Iterator[None]:
    """Put back what models keep from call to call, as recurrent layers may do with their state."""
    kept = [each for model in models for each in model.non_trainable_variables]
    values = [keras.ops.copy(each) for each in kept]
    try:
        yield
    finally:
        for variable, value in zip(kept, values, strict=True):
            variable.assign(value)


@contextlib.contextmanager
def _rolled(*models: keras.Model) -> Iterator[None]:
    """Let recurrent layers scan that write out each of their steps: the same sums, much sooner."""
    layers = [each for model in models for each in keras_private.inner_layers(model)]
    unrolled = [each for each in layers if getattr(each, "unroll", False)]
    try:
        for layer in unrolled:
            layer.unroll = False
        yield
    finally:
        for layer in unrolled:
            layer.unroll = True


def is_equal(variable: keras.Variable, other: keras.Variable) -> bool:
    """Whether two variables have the same numbers, bit for bit but for NaN."""
    return np.array_equal(numbers(variable), numbers(other), equal_nan=True)


def numbers(tensor: Any) -> np.ndarray:
    """What a tensor or variable of any framework holds, as float64."""
    return np.asarray(keras.ops.convert_to_numpy(tensor), "float64")


def first_line(error: Exception) -> str:
    """What an error of a framework, which may be a page, says at first."""
    text = f"{type(error).__name__}: {error}"
    return text.strip().splitlines()[0]


def _inputs_and_outputs(model, seed: int, count) -> tuple[Any, list[np.ndarray]]:
    """Random input of the first extents that the model takes, and what it predicts for them."""
    specs = _input_specs(model)
    is_open = any(None in spec.shape[1:] for spec in keras.tree.flatten(specs))
    extents = OPEN_EXTENTS if is_open else OPEN_EXTENTS[:1]
    for given in itertools.product(BATCHES, extents):
        try:
            shaped = keras.tree.map_structure(lambda spec, g=given: _shaped(spec, *g), specs)
            _count_work(model, shaped, count())
            inputs = _random_inputs(model, shaped, np.random.default_rng(seed))
            outputs = _predict(model, inputs)
            if not all(output.size for output in outputs):
                raise ValueError("nothing is left of it at the end")
            return inputs, outputs
        except Exception as error:
            refusal = error
    raise ValueError(
        f"the model takes no random input of the shapes that it declares ({first_line(refusal)})"
    ) from refusal


def _input_specs(model: keras.Model) -> Any:
    """The symbolic inputs in the structure that the model is called with."""
    try:
        return model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"a {type(model).__name__} does not say what its inputs are until it is called"
        ) from error


def _shaped(spec, batch: int, extent: int) -> keras.KerasTensor:
    given_batch, *extents = spec.shape
    shape = (given_batch or batch, *(extent if given is None else given for given in extents))
    return keras.KerasTensor(shape, keras.backend.standardize_dtype(spec.dtype))


def _count_work(model, inputs, spend: Spend) -> None:
    """Count what a model makes of inputs, before they are drawn."""

    def count(layer, arguments, outputs):
        given, made = (
            [each for each in keras.tree.flatten(tensors) if isinstance(each, keras.KerasTensor)]
            for tensors in (arguments, outputs)
        )
        elements = sum(map(_size, made))
        spend("elements", elements + _hidden(layer, given, made))
        steps = 1
        if isinstance(layer, STEPPING):
            steps = given[0].shape[1] or 0
            is_scan = isinstance(layer, keras.layers.RNN)
            spend("steps", steps * (1 if is_scan else REPEATED))
        # An output takes at most an operation for each weight that its channel has, or of its pool.
        positions = sum(_size(each) // (each.shape[-1] or 1) for each in made if each.shape)
        weights = sum(map(_size, getattr(layer, "weights", ())))
        pool = POOLED * math.prod(keras.tree.flatten(getattr(layer, "pool_size", 0)))
        spend("operations", steps * positions * weights + elements * pool)

    count(None, (), inputs)
    outputs = keras_private.visit_shapes(model, inputs, count)
    spend("elements", COMPARED * sum(map(_size, keras.tree.flatten(outputs))))


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


def _pieces(output: np.ndarray) -> Iterator[np.ndarray]:
    flat = output.reshape(-1)
    return (flat[at : at + PIECE].astype("float64") for at in range(0, flat.size, PIECE))


def _difference_of(found: np.ndarray, expected: np.ndarray) -> float:
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        return float(np.where(same, 0.0, np.abs(found - expected)).max(initial=0.0))


def _tolerance(model, outputs) -> float:
    scale = max([1.0, *map(largest, outputs)])
    return float(eps_of(model) * scale * sum(np.sqrt(_size(weight)) for weight in model.weights))


def _size(tensor) -> int:
    return math.prod(1 if extent is None else extent for extent in tensor.shape)
