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


def _unary(function) -> Callable:
    return lambda x: function(x)


def _binary(function) -> Callable:
    return lambda x, y: function(x, y)


def _reduction(function) -> Callable:
    def reduce(x, axis=None, keepdims=False):
        return function(x, axis=axis, keepdims=keepdims)

    return reduce


_UNARY = {
    "math.abs": ops.abs,
    "math.exp": ops.exp,
    "math.log": ops.log,
    "math.negative": ops.negative,
    "math.rsqrt": ops.rsqrt,
    "math.sigmoid": ops.sigmoid,
    "math.sin": ops.sin,
    "math.cos": ops.cos,
    "identity": lambda x: x,
    "math.add_n": lambda inputs: sum(inputs[1:], inputs[0]),
    "math.floor": ops.floor,
    "math.logical_not": ops.logical_not,
    "math.sign": ops.sign,
    "math.softplus": ops.softplus,
    "math.sqrt": ops.sqrt,
    "math.square": ops.square,
    "math.tanh": ops.tanh,
    "nn.elu": ops.elu,
    "nn.relu": ops.relu,
    "nn.relu6": ops.relu6,
    "nn.selu": ops.selu,
    "nn.sigmoid": ops.sigmoid,
    "nn.silu": ops.silu,
    "nn.swish": ops.silu,
    "nn.tanh": ops.tanh,
    "stop_gradient": ops.stop_gradient,
}
_BINARY = {
    "__operators__.add": ops.add,
    "compat.v1.floor_div": ops.floor_divide,
    "math.add": ops.add,
    "math.equal": ops.equal,
    "math.greater": ops.greater,
    "math.greater_equal": ops.greater_equal,
    "math.less": ops.less,
    "math.less_equal": ops.less_equal,
    "math.logical_and": ops.logical_and,
    "math.logical_or": ops.logical_or,
    "math.not_equal": ops.not_equal,
    "math.floordiv": ops.floor_divide,
    "math.floormod": ops.mod,
    "math.divide": ops.divide,
    "math.maximum": ops.maximum,
    "math.minimum": ops.minimum,
    "math.multiply": ops.multiply,
    "math.pow": ops.power,
    "math.squared_difference": lambda x, y: ops.square(ops.subtract(x, y)),
    "math.subtract": ops.subtract,
    "math.truediv": ops.true_divide,
}
_REDUCTIONS = {
    "math.reduce_all": ops.all,
    "math.reduce_any": ops.any,
    "math.reduce_logsumexp": ops.logsumexp,
    "math.reduce_max": ops.max,
    "math.reduce_mean": ops.mean,
    "math.reduce_min": ops.min,
    "math.reduce_prod": ops.prod,
    "math.reduce_std": ops.std,
    "math.reduce_sum": ops.sum,
    "math.reduce_variance": ops.var,
}
OPERATIONS = {
    **{name: _unary(function) for name, function in _UNARY.items()},
    **{name: _binary(function) for name, function in _BINARY.items()},
    **{name: _reduction(function) for name, function in _REDUCTIONS.items()},
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
    "ones_like": lambda input: ops.ones_like(input),
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
    "zeros_like": lambda input: ops.zeros_like(input),
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
