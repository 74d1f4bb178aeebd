"""TensorFlow's functions that a model of Keras 2 calls between its layers, by keras.ops.

The names and the arguments are TensorFlow's, for the file has them so. Keras 2 keeps all but the
first argument by name.
"""

from collections.abc import Callable

from keras import ops


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
    "math.add": ops.add,
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
    "nn.gelu": lambda features, approximate=False: ops.gelu(features, approximate),
    "nn.leaky_relu": lambda features, alpha=0.2: ops.leaky_relu(features, alpha),
    "nn.softmax": lambda logits, axis=-1: ops.softmax(logits, axis=-1 if axis is None else axis),
    "reshape": lambda tensor, shape: ops.reshape(tensor, shape),
    "squeeze": lambda x, axis=None: ops.squeeze(x, axis),
    "stack": lambda values, axis=0: ops.stack(values, axis),
    "tile": lambda x, multiples: ops.tile(x, multiples),
    "transpose": lambda a, perm=None: ops.transpose(a, perm),
}


def find(config: dict) -> Callable:
    """The function that a TFOpLambda or SlicingOpLambda layer of this config calls."""
    name = config.get("function")
    if name not in OPERATIONS:
        raise ValueError(
            f"the model calls tf.{name}, for which there is no function of Keras here; save it "
            "with a layer of your own in its place, and pass that as custom_objects"
        )
    return OPERATIONS[name]
