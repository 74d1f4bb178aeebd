"""Engines on TensorFlow: the native one by the two ops of csrc/tf_ops.cc, and their gradients.

The gradient of a forward pass is a backward pass, whose own gradient is the composite's: so there
are derivatives of every order, and the first, the one that training takes, costs one call.
"""

import dataclasses
import functools
import sys
import threading
import traceback

import numpy as np
import tensorflow as tf

from normwise.kernels import composite, cpu, library, private
from normwise.kernels.kernel import Engine, Kernel
from normwise.norm import Norm, Operands

# Those whose traces leave the process, for places where the ops are unknown.
_EXPORTERS = ("keras.src.export", "tensorflow.python.saved_model", "tensorflow.lite", "tf2onnx")

# A second thread must not register the gradients again, which raises.
_LOADING = threading.Lock()

# Stands for an operand that is None; NumPy's, since a TensorFlow tensor belongs to a graph.
_NONE = {dtype: np.zeros(0, dtype) for dtype in cpu.DTYPES}


def kernel_of(engine: Engine, run=None) -> Kernel:
    """A kernel of an engine for tensors of the CPU.

    Args:
        engine: its passes and what it can do.
        run: of the kernel, from a uniform Norm's dtype to the same; by default one that calls back
            to Python.
    """
    run = run or _calling_back(engine)

    def why_not(norm, x):
        return engine.why_not(norm) or _why_not_here(x)

    def cast_and_run(norm, x, operands):
        if operands.residual is not None:
            return run(norm, x, operands)
        if norm.x_dtype != norm.dtype:
            x = tf.cast(x, norm.dtype)
        y = run(norm.uniform, x, operands)
        return y if norm.y_dtype == norm.dtype else tf.cast(y, norm.y_dtype)

    def adds(norm, x, residual):
        # Those that call back give no residual on.
        return run is _run_native

    return Kernel(engine.name, why_not, cast_and_run, adds=adds)


def _why_not_here(x) -> str | None:
    """Why no engine can take `x` here and now, or None.

    Asked while a function is traced, it answers for the trace, which keeps what was chosen. So a
    tf.function that was called by itself fails inside another one that XLA compiles, and a concrete
    function of it, saved, loads only beside normwise: trace such a one with the composite.
    """
    if sys.platform == "win32":
        return "TensorFlow for Windows hides the C API that the native ops are registered with"
    # A tensor of a graph knows its device only where the program named one.
    device = x.device if x is not None else ""
    if "CPU" not in device if device else _has_accelerator():
        return f"the native kernels run on the CPU, and x is on {device or 'an accelerator'}"
    if tf.executing_eagerly():
        return None
    if (lacks := private.missing(private.TENSORFLOW)) is not None:
        return lacks
    if _in_xla():
        return "XLA compiles this function (jit_compile=True), and knows no native kernel"
    if _exports():
        return "this function is traced to be exported, and runs without normwise then"
    return None


def _in_xla() -> bool:
    return private.find(private.TENSORFLOW["in_xla"].path)(tf.compat.v1.get_default_graph())


def accelerator() -> str | None:
    """The first GPU's name, None where there is none."""
    for device in tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_device_details(device).get("device_name", device.name)
    return None


@functools.cache
def _has_accelerator() -> bool:
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


def _filled(parameters, arithmetic: str):
    """Gamma and beta with vectors of no elements for those that are None."""
    return [_NONE[arithmetic] if p is None else p for p in parameters]


def _present(tensors) -> list[bool]:
    """Which tensors have elements, as far as is known: gamma and beta of none stand for None."""
    return [tensor.shape.num_elements() != 0 for tensor in tensors]


def _run_native(norm: Norm, x, operands: Operands):
    gamma, beta = _filled(operands[:2], norm.arithmetic)
    residual = _NONE[norm.dtype] if operands.residual is None else operands.residual
    y, _, total = _native().normwise_forward(x, gamma, beta, residual, norm=_described(norm))
    return y if operands.residual is None else (y, total)


@functools.lru_cache(maxsize=1024)
def _described(norm: Norm) -> bytes:
    return bytes(cpu.describe(norm))


def _native():
    """The module of the two ops, loaded once per process."""
    # Not returned from inside: AutoGraph, which converts whatever a tf.function calls, makes of
    # that a bool.
    with _LOADING:
        ops = _load()
    return ops  # noqa: RET504


@functools.cache
def _load():
    library.load()
    # Opened before, as below: TensorFlow hands out the same module again.
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


def _forward_gradient(op, dy, _, dsum):
    """The gradients of sum(y * dy) + sum(sum * dsum); nobody else sees the statistics."""
    x, gamma, beta, residual = op.inputs
    _, statistics, total = op.outputs
    (adds,) = _present([residual])
    x, norm = total if adds else x, op.get_attr("norm")
    dx, *found = _native().normwise_backward(x, gamma, beta, statistics, dy, dsum, norm=norm)
    return dx, *found, dx if adds else dsum


def _backward_gradient(op, *cotangents):
    """The gradients of sum(dx * ddx) + ... by x, gamma, beta, dy and dsum, by the composite."""
    x, gamma, beta, _, dy, dsum = op.inputs
    norm = cpu.norm_of(op.get_attr("norm"), x.shape, x.dtype.name, *_present((gamma, beta)))
    *found, by_dy = _second(norm, x, gamma, beta, dy, cotangents)
    (adds,) = _present([dsum])
    return *found, None, by_dy, cotangents[0] if adds else dsum


def _second(norm: Norm, x, gamma, beta, dy, cotangents):
    """The gradients of the backward pass by x, gamma, beta and dy, through the composite."""
    present = [True, *_present((gamma, beta))]
    inputs = [t if there else None for t, there in zip((x, gamma, beta), present, strict=True)]
    given = [t for t in inputs if t is not None]
    cotangents = [c for c, there in zip(cotangents, present, strict=True) if there]
    with tf.GradientTape() as outer:
        outer.watch([*given, dy])
        with tf.GradientTape() as inner:
            inner.watch(given)
            y = composite.run(norm, x, Operands(*inputs[1:]))
        first = inner.gradient(y, given, dy)
    *second, by_dy = outer.gradient(first, [*given, dy], cotangents)
    second = iter(second)
    return [*(next(second) if there else None for there in present), by_dy]


def _calling_back(engine: Engine):
    """The `run` of an engine that takes NumPy arrays, as calls from TensorFlow back to Python."""

    def call(engines_pass, norm, operands, results):
        def back(*arrays):
            x, *arrays = arrays
            here = norm.of(dataclasses.replace(norm.geometry, shape=x.shape))
            made = [np.zeros(shape(arrays, x), dtype) for shape, dtype in results]
            given = (a if a.size else None for a in arrays[:2])
            wanted = (m if m.size or m is made[0] else None for m in made)
            engines_pass(here, x, *given, *arrays[2:], *wanted)
            return made

        return tf.numpy_function(back, operands, [dtype for _, dtype in results], stateful=False)

    def forward(norm, *operands):
        statistics = norm.geometry.statistics_shape
        shapes = (lambda _, x: x.shape), (lambda _, x: statistics(x.shape))
        results = zip(shapes, (norm.x_dtype, norm.arithmetic), strict=True)
        y, kept = call(engine.forward, norm, operands, list(results))
        return tf.ensure_shape(y, operands[0].shape), kept

    def backward(norm, *operands):
        shapes = (lambda _, x: x.shape), (lambda a, _: a[0].shape), (lambda a, _: a[1].shape)
        dtypes = (norm.x_dtype, norm.arithmetic, norm.arithmetic)
        found = call(engine.backward, norm, operands, list(zip(shapes, dtypes, strict=True)))
        return [tf.ensure_shape(g, t.shape) for g, t in zip(found, operands[:3], strict=True)]

    def run(norm, x, operands):
        @tf.custom_gradient
        def pass_back(x, gamma, beta, statistics, dy):
            def gradient(*cotangents):
                *found, by_dy = _second(norm, x, gamma, beta, dy, cotangents)
                return (*found, None, by_dy)

            return backward(norm, x, gamma, beta, statistics, dy), gradient

        @tf.custom_gradient
        def pass_on(x, gamma, beta):
            y, statistics = forward(norm, x, gamma, beta)
            return y, lambda dy: tuple(pass_back(x, gamma, beta, statistics, dy))

        gamma, beta = map(tf.convert_to_tensor, _filled(operands[:2], norm.arithmetic))
        return pass_on(x, gamma, beta)

    return run


def _rounded(x):
    """`x` in no more digits than its dtype has, which XLA would carry on."""
    if x.dtype.size > 2 or tf.executing_eagerly() or private.missing(private.TENSORFLOW):
        return x
    return _rounded_in_xla(x) if _in_xla() else x


@tf.custom_gradient
def _rounded_in_xla(x):
    # Through integers it is the 16 bits that go on; but these have no gradient.
    return tf.bitcast(tf.bitcast(x, tf.uint16), x.dtype), lambda dx: dx


composite.ROUNDED["tensorflow"] = _rounded


def _of_as_many_samples(x, parameter):
    """Gamma or beta of each sample, or an error where the samples of x are others.

    Grappler drops a reshape that says so, and one sample's would be broadcast.
    """
    if parameter is None:
        return None
    text = "gamma and beta of each sample need as many samples as x has"
    same = tf.debugging.assert_equal(tf.shape(parameter)[0], tf.shape(x)[0], text)
    with tf.control_dependencies([same]):
        return tf.identity(parameter)


def _run_composite(norm: Norm, x, operands: Operands):
    if norm.per_sample and norm.geometry.shape[0] is None and not tf.executing_eagerly():
        gamma, beta = (_of_as_many_samples(x, each) for each in operands[:2])
        operands = operands._replace(gamma=gamma, beta=beta)
    exports = not tf.executing_eagerly() and _exports()
    return (composite.run_for_inference if exports else composite.run)(norm, x, operands)


library.open_first.append(tf.load_op_library)

KERNELS = (
    kernel_of(cpu.ENGINE, _run_native),
    dataclasses.replace(composite.COMPOSITE, run=_run_composite),
)
