"""TensorFlow's functions that a model of Keras 2 calls between its layers, by keras.ops.

The names and the arguments are TensorFlow's, for the file has them so. Keras 2 keeps all but the
first argument by name.
"""

import itertools
from collections.abc import Callable

import keras
from keras import ops

from normwise.migrate.models.reading.budget import Budget


def _index(saved):
    """One part of an index: as it is, or a slice or an ellipsis in JSON."""
    if not isinstance(saved, dict):
        return saved
    if saved.get("class_name") == "__ellipsis__":
        return Ellipsis
    return slice(saved.get("start"), saved.get("stop"), saved.get("step"))


def _get_item(x, slice_spec):
    return x[tuple(_index(each) for each in slice_spec)]


def _matmul(a, b, transpose_a=False, transpose_b=False):
    a = ops.swapaxes(a, -1, -2) if transpose_a else a
    b = ops.swapaxes(b, -1, -2) if transpose_b else b
    return ops.matmul(a, b)


def _gather(params, indices, axis=None, batch_dims=0, validate_indices=None):
    _refuse_unless(batch_dims == 0, "tf.gather with batch_dims")
    return ops.take(params, indices, axis=axis or 0)


def _norm(tensor, ord="euclidean", axis=None, keepdims=False):
    _refuse_unless(ord in ("euclidean", 2), "tf.norm of another order than 2")
    return ops.norm(tensor, axis=axis, keepdims=bool(keepdims))


def _pad(tensor, paddings, mode="CONSTANT", constant_values=0):
    mode = mode.lower()
    value = constant_values if mode == "constant" else None
    return ops.pad(tensor, paddings, mode=mode, constant_values=value)


def _transpose(a, perm=None, conjugate=False):
    return ops.transpose(a, perm)


def _places(sizes):
    """Where to split: a number of equal parts, or of sizes the ends of all but the last."""
    return list(itertools.accumulate(sizes))[:-1] if isinstance(sizes, list) else sizes


def _refuse_unless(condition, what: str) -> None:
    if not condition:
        raise ValueError(f"the model calls {what}, for which there is no function of Keras here")


def _add_n(inputs):
    return sum(inputs[1:], inputs[0])


def _squared_difference(x, y):
    return ops.square(ops.subtract(x, y))


def _unary(function) -> Callable:
    return lambda x: function(x)


def _binary(function) -> Callable:
    return lambda x, y: function(x, y)


def _reduction(function) -> Callable:
    def reduce(x, axis=None, keepdims=False):
        return function(x, axis=axis, keepdims=keepdims)

    return reduce


def _named(places: str, wrap: Callable, **others) -> dict[str, Callable]:
    """Functions by TensorFlow's names, those of Keras's where they are not among the others."""
    names = {place: place.rpartition(".")[2].removeprefix("reduce_") for place in places.split()}
    return {place: wrap(others.get(name) or getattr(ops, name)) for place, name in names.items()}


OPERATIONS = {
    **_named(
        "math.abs math.exp math.log math.negative math.rsqrt math.sigmoid math.sin math.cos "
        "identity math.add_n math.floor math.logical_not math.sign math.softplus math.sqrt "
        "math.square math.tanh nn.elu nn.relu nn.relu6 nn.selu nn.sigmoid nn.silu nn.swish "
        "nn.tanh stop_gradient ones_like zeros_like",
        _unary,
        add_n=_add_n,
        swish=ops.silu,
    ),
    **_named(
        "__operators__.add compat.v1.floor_div math.add math.equal math.greater "
        "math.greater_equal math.less math.less_equal math.logical_and math.logical_or "
        "math.not_equal math.floordiv math.floormod math.divide math.maximum math.minimum "
        "math.multiply math.pow math.squared_difference math.subtract math.truediv",
        _binary,
        floor_div=ops.floor_divide,
        floordiv=ops.floor_divide,
        floormod=ops.mod,
        pow=ops.power,
        squared_difference=_squared_difference,
        truediv=ops.true_divide,
    ),
    **_named(
        "math.reduce_all math.reduce_any math.reduce_logsumexp math.reduce_max "
        "math.reduce_mean math.reduce_min math.reduce_prod math.reduce_std math.reduce_sum "
        "math.reduce_variance",
        _reduction,
        variance=ops.var,
    ),
    "__operators__.getitem": _get_item,
    "cast": lambda x, dtype: ops.cast(x, dtype),
    "clip_by_value": lambda t, clip_value_min, clip_value_max: ops.clip(
        t, clip_value_min, clip_value_max
    ),
    "concat": lambda values, axis: ops.concatenate(values, axis=axis),
    "expand_dims": lambda x, axis: ops.expand_dims(x, axis),
    "linalg.matmul": _matmul,
    "compat.v1.gather": _gather,
    "compat.v1.norm": _norm,
    "compat.v1.pad": _pad,
    "compat.v1.squeeze": lambda input, axis=None: ops.squeeze(input, axis),
    "compat.v1.transpose": _transpose,
    "gather": _gather,
    "math.argmax": lambda input, axis=0: ops.argmax(input, axis),
    "math.cumsum": lambda x, axis=0: ops.cumsum(x, axis),
    "math.l2_normalize": lambda x, axis=None, epsilon=1e-12: ops.normalize(
        x, axis, epsilon=epsilon**0.5
    ),
    "nn.gelu": lambda features, approximate=False: ops.gelu(features, approximate),
    "nn.leaky_relu": lambda features, alpha=0.2: ops.leaky_relu(features, alpha),
    "nn.log_softmax": lambda logits, axis=None: ops.log_softmax(
        logits, -1 if axis is None else axis
    ),
    "nn.softmax": lambda logits, axis=None: ops.softmax(logits, -1 if axis is None else axis),
    "norm": _norm,
    "one_hot": lambda indices, depth, axis=None: ops.one_hot(
        indices, depth, -1 if axis is None else axis
    ),
    "pad": _pad,
    "reshape": lambda tensor, shape: ops.reshape(tensor, shape),
    "reverse": lambda tensor, axis: ops.flip(tensor, axis),
    "roll": lambda input, shift, axis: ops.roll(input, shift, axis),
    "split": lambda value, num_or_size_splits, axis=0: ops.split(
        value, _places(num_or_size_splits), axis
    ),
    "squeeze": lambda input, axis=None: ops.squeeze(input, axis),
    "stack": lambda values, axis=0: ops.stack(values, axis),
    "tile": lambda input, multiples: ops.tile(input, multiples),
    "transpose": _transpose,
    "unstack": lambda value, num=None, axis=0: ops.unstack(value, num, axis),
    "where": lambda condition, x, y: ops.where(condition, x, y),
}
# What gives as many tensors as an extent says.
_CUTS = (OPERATIONS["split"], OPERATIONS["unstack"])


def find(config: dict) -> Callable:
    """The function that a TFOpLambda or SlicingOpLambda layer of this config calls."""
    name = config.get("function")
    if name not in OPERATIONS:
        raise ValueError(
            f"the model calls tf.{name}, for which there is no function of Keras here; save it "
            "with a layer of your own in its place, and pass that as custom_objects"
        )
    return OPERATIONS[name]


def call(function: Callable, inputs, options: dict, budget: Budget):
    """What one of the functions gives for tensors of a model."""
    if not any(isinstance(x, keras.KerasTensor) for x in keras.tree.flatten([inputs, options])):
        # It would be computed here and now, in whatever size.
        raise ValueError("the model calls a function on numbers alone, as Keras 2 never saves it")
    if function in _CUTS:
        budget.spend("tensors", _count(inputs, **options))
    return function(inputs, **options)


def _count(value, num_or_size_splits=None, num=None, axis=0) -> int:
    """Into how many tensors one is cut."""
    if isinstance(num_or_size_splits, list):
        return len(num_or_size_splits)
    return num_or_size_splits or num or value.shape[axis] or 1
