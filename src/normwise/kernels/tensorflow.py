"""The native kernels on TensorFlow: two ops of csrc/tf_ops.cc and their gradients.

The gradient of the forward op is the backward op, whose own gradient is the composite's: so it has
derivatives of every order, and the first, the one that training takes, costs one call.
"""

import functools
import struct
import sys
import threading
import traceback

import keras
import numpy as np

from normwise import geometry as geometries
from normwise.geometry import Geometry
from normwise.kernels import composite, library

# Those whose traces leave the process, for places where the ops are unknown.
_EXPORTERS = ("keras.src.export", "tensorflow.python.saved_model", "tensorflow.lite", "tf2onnx")

_LAYOUT = ("outer_end", "before_end", "channels_end", "groups", "keeps_after")
_OPTIONS = ("centred", "activation", "epsilon_bits", "slope_bits")

# A second thread must not register the gradients again, which raises.
_LOADING = threading.Lock()

# Stands for a gamma or beta that is None; NumPy's, since a TensorFlow tensor belongs to a graph.
_NONE = {dtype: np.zeros(0, dtype) for dtype in ("float32", "float64")}

# By their numbers in enum NormwiseActivation, as functions of a tensor and the slope.
_ACTIVATIONS = (
    lambda z, slope: z,
    lambda z, slope: keras.activations.leaky_relu(z, negative_slope=slope),
    lambda z, slope: keras.activations.sigmoid(z),
    lambda z, slope: keras.activations.tanh(z),
    lambda z, slope: keras.activations.silu(z),
    lambda z, slope: keras.activations.gelu(z, approximate=False),
    lambda z, slope: keras.activations.gelu(z, approximate=True),
)


def normalize(
    x,
    gamma,
    beta,
    geometry: Geometry,
    *,
    epsilon: float,
    centred: bool,
    activation=library.IDENTITY,
):
    """Normalize every set of `x`, apply gamma and beta, then the activation.

    Args:
        x: float16, bfloat16, float32 or float64 tensor of `geometry.shape`.
        gamma, beta: tensors of `geometry.parameter_shape` and the dtype of the arithmetic, or None.
        geometry: which elements share their statistics; in the order of memory.
        epsilon, centred: as in composite.normalize.
        activation: a library.Activation.

    Returns:
        A tensor of the shape and dtype of x.
    """
    none = _NONE["float64" if x.dtype == "float64" else "float32"]
    y, _ = _native().normwise_forward(
        x,
        none if gamma is None else gamma,
        none if beta is None else beta,
        **_attributes(geometry, float(epsilon), centred, activation),
    )
    return y


def obstacle(x) -> str | None:
    """Why the native kernels cannot take `x` here and now, or None.

    Asked while a function is traced, it answers for the trace, which keeps what was chosen. So a
    tf.function that was called by itself fails inside another one that XLA compiles, and a concrete
    function of it, saved, loads only beside normwise: trace such a one with the composite.
    """
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    if sys.platform == "win32":
        return "TensorFlow for Windows hides the C API that the native ops are registered with"
    # A tensor of a graph knows its device only where the program named one.
    if "CPU" not in x.device if x.device else _has_accelerator():
        return f"the native kernels run on the CPU, and x is on {x.device or 'an accelerator'}"
    if tf.executing_eagerly():
        return None
    if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        return "XLA compiles this function (jit_compile=True), and knows no native kernel"
    if _exports():
        return "this function is traced to be exported, and runs without normwise then"
    return None


@functools.cache
def _has_accelerator() -> bool:
    import tensorflow as tf

    return any(device.device_type != "CPU" for device in tf.config.list_logical_devices())


def _exports() -> bool:
    """Whether the trace under way was asked for by an exporter, or for a concrete function.

    Its callers are the only sign: Keras and the converters trace a plain tf.function, and whoever
    asks for a concrete function by name mostly saves it (SavedModel signatures, frozen graphs).
    """
    return any(
        frame.f_code.co_name == "get_concrete_function"
        or frame.f_globals.get("__name__", "").startswith(_EXPORTERS)
        for frame, _ in traceback.walk_stack(sys._getframe())
    )


def _native():
    """The module of the two ops, loaded once per process."""
    # Not returned from inside: AutoGraph, which converts whatever a tf.function calls, makes of
    # that a bool.
    with _LOADING:
        ops = _load()
    return ops  # noqa: RET504


@functools.cache
def _load():
    import tensorflow as tf

    ops = tf.load_op_library(str(library.path()))
    if not hasattr(ops, "normwise_backward"):
        raise RuntimeError(
            f"{library.path()} gave TensorFlow {tf.__version__} no ops: either it was loaded "
            "before by other means, or this TensorFlow lacks a function of the C API; choose "
            "normwise.use_kernels('composite')"
        )
    tf.RegisterGradient("NormwiseForward")(_forward_gradient)
    tf.RegisterGradient("NormwiseBackward")(_backward_gradient)
    return ops


@functools.lru_cache(maxsize=1024)
def _attributes(geometry: Geometry, epsilon: float, centred: bool, activation) -> dict:
    """The attributes of both ops."""
    layout = library.layout(geometry)
    return {
        **{name: getattr(layout, name) for name in _LAYOUT},
        "centred": centred,
        "activation": activation.code,
        # TensorFlow's attributes of type float have 32 bits, too few for a float64 norm.
        "epsilon_bits": _bits(epsilon),
        "slope_bits": _bits(activation.slope),
    }


def _bits(real: float) -> int:
    return struct.unpack("q", struct.pack("d", real))[0]


def _real(bits: int) -> float:
    return struct.unpack("d", struct.pack("q", bits))[0]


def _forward_gradient(op, dy, _):
    """The gradients of sum(y * dy) by x, gamma and beta; nobody else sees the statistics."""
    attributes = {name: op.get_attr(name) for name in (*_LAYOUT, *_OPTIONS)}
    return _native().normwise_backward(*op.inputs, op.outputs[1], dy, **attributes)


def _backward_gradient(op, *cotangents):
    """The gradients of sum(dx * ddx) + ... by x, gamma, beta and dy, through the composite."""
    import tensorflow as tf

    x, gamma, beta, _, dy = op.inputs
    geometry = _geometry(x.shape, *(op.get_attr(name) for name in _LAYOUT))
    epsilon, slope = (_real(op.get_attr(name)) for name in ("epsilon_bits", "slope_bits"))
    activate = _ACTIVATIONS[op.get_attr("activation")]

    # Without the gamma and beta of no elements, which stand for None.
    present = [True, *(p.shape.num_elements() != 0 for p in (gamma, beta))]
    given = [p for p, there in zip((x, gamma, beta), present, strict=True) if there]
    cotangents = [c for c, there in zip(cotangents, present, strict=True) if there]
    with tf.GradientTape() as outer:
        outer.watch([*given, dy])
        with tf.GradientTape() as inner:
            inner.watch(given)
            y = composite.normalize(
                tf.cast(x, gamma.dtype),
                gamma if present[1] else None,
                beta if present[2] else None,
                geometry,
                epsilon=epsilon,
                centred=op.get_attr("centred"),
            )
            y = tf.cast(activate(y, slope), x.dtype)
        first = inner.gradient(y, given, dy)
    *second, by_dy = outer.gradient(first, [*given, dy], cotangents)
    second = iter(second)
    return (*(next(second) if there else None for there in present), None, by_dy)


def _geometry(shape, outer_end, before_end, channels_end, groups, keeps_after) -> Geometry:
    """A geometry of this layout: the inverse of library.layout."""
    if outer_end == before_end and groups == 1 and (keeps_after or channels_end == len(shape)):
        return geometries.layer(shape, tuple(range(before_end, channels_end)))
    return geometries.group(shape, before_end, groups)
