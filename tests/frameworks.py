"""What tests need of a framework and Keras does not wrap: gradients, compilation, float64."""

import contextlib
import shutil
import warnings

import keras
import numpy as np
import pytest

BACKEND = keras.backend.backend()


def allow_torch_compile(jit_compile):
    """Let the rest of a test use torch.compile, if it will, or skip it for want of a C++ compiler.

    Its warnings are ignored: of its own imports, and of tensors that it looks at.
    """
    if BACKEND == "torch" and jit_compile:
        if shutil.which("c++") is None:
            pytest.skip("torch.compile needs a C++ compiler")
        import torch

        warnings.simplefilter("ignore")  # pytest takes it back after the test
        # Of one piece of code, as Keras's training step is, it compiles eight variants, those of
        # other tests among them, and then runs it as it is, without a word.
        torch.compiler.reset()


def to_numpy(tensor):
    """A tensor of any dtype as a NumPy array; bfloat16, which NumPy lacks, as float32."""
    if keras.backend.standardize_dtype(tensor.dtype) == "bfloat16":
        tensor = keras.ops.cast(tensor, "float32")
    return keras.ops.convert_to_numpy(tensor)


def gradients(function, arrays, cotangent):
    """y = function(*arrays) and the gradients of sum(y * cotangent) by every array."""
    tensors = [keras.ops.convert_to_tensor(a) for a in arrays]
    cotangent = keras.ops.convert_to_tensor(cotangent)
    y, found = _backends[BACKEND](function, tensors, cotangent)
    return to_numpy(y), [to_numpy(g) for g in found]


def _jax_gradients(function, tensors, cotangent):
    import jax

    # Compiled as one: a compilation for every operation and shape takes many times as long.
    @jax.jit
    def both(tensors, cotangent):
        y, pull = jax.vjp(function, *tensors)
        return y, pull(cotangent.astype(y.dtype))

    return both(tensors, cotangent)


def _tensorflow_gradients(function, tensors, cotangent):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(tensors)
        y = function(*tensors)
    cotangent = tf.cast(cotangent, y.dtype)
    return y, tape.gradient(y, tensors, output_gradients=cotangent, unconnected_gradients="zero")


def _torch_gradients(function, tensors, cotangent):
    import torch

    tensors = [t.detach().requires_grad_() for t in tensors]
    y = function(*tensors)
    cotangent = cotangent.to(y.dtype)
    return y.detach(), torch.autograd.grad(
        y, tensors, cotangent, allow_unused=True, materialize_grads=True
    )


_backends = {
    "jax": _jax_gradients,
    "tensorflow": _tensorflow_gradients,
    "torch": _torch_gradients,
}


def second_gradients(function, arrays, cotangent, direction):
    """The gradients by every array of sum(dx * direction), dx being the gradient by the first."""
    tensors = [keras.ops.convert_to_tensor(a) for a in arrays]
    cotangent, direction = map(keras.ops.convert_to_tensor, (cotangent, direction))
    if BACKEND == "jax":
        import jax

        @jax.jit
        def found_by_jax(tensors):
            def slope(*tensors):
                _, pull = jax.vjp(function, *tensors)
                return (pull(cotangent)[0] * direction).sum()

            return jax.grad(slope, argnums=tuple(range(len(tensors))))(*tensors)

        found = found_by_jax(tensors)
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as outer:
            outer.watch(tensors)
            with tf.GradientTape() as inner:
                inner.watch(tensors[0])
                y = function(*tensors)
            dx = inner.gradient(y, tensors[0], output_gradients=cotangent)
            slope = tf.reduce_sum(dx * direction)
        found = outer.gradient(slope, tensors, unconnected_gradients="zero")
    else:
        import torch

        tensors = [t.detach().requires_grad_() for t in tensors]
        y = function(*tensors)
        (dx,) = torch.autograd.grad(y, tensors[0], cotangent, create_graph=True)
        found = torch.autograd.grad(
            (dx * direction).sum(), tensors, allow_unused=True, materialize_grads=True
        )
    return [to_numpy(g) for g in found]


def compiled(function):
    """The function as the framework compiles it: jax.jit, tf.function, torch eager."""
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, autograph=False)
    return function


def in_one_graph(function):
    """The function as torch.compile takes it in one graph, or it is an error."""
    import torch

    allow_torch_compile(True)
    return torch.compile(function, fullgraph=True, backend="eager")


def float64_enabled(dtype="float64"):
    """A context in which float64 exists, if that is the dtype: JAX leaves it off by default."""
    if BACKEND == "jax" and dtype == "float64":
        import jax

        return jax.enable_x64(True)
    return contextlib.nullcontext()


def assert_within(found, expected, tolerance, what=""):
    """Assert |found - expected| <= tolerance everywhere; NaN is never within."""
    found = np.asarray(found, np.float64)
    assert found.shape == np.shape(expected), f"{what}: {found.shape} != {np.shape(expected)}"
    error = np.abs(found - expected)
    outside = ~(error <= tolerance)
    if outside.any():
        worst = np.unravel_index(
            np.argmax(np.where(outside, np.nan_to_num(error, nan=np.inf), 0)), error.shape
        )
        raise AssertionError(
            f"{what}: {outside.sum()} of {error.size} elements are off; at {worst} found "
            f"{found[worst]}, expected {np.broadcast_to(expected, error.shape)[worst]} within "
            f"{np.broadcast_to(tolerance, error.shape)[worst]}"
        )


def skip_newer_stablehlo(error):
    """Skip where TensorFlow cannot read what JAX exported: one is newer than the other."""
    if "failed to deserialize portable artifact using StableHLO" in error:
        pytest.skip("this JAX writes a newer StableHLO than this TensorFlow reads")
