"""Norms on TensorFlow where faults were met: ragged and sparse tensors, graphs of integers."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from frameworks import assert_within
from norms import samples

import normwise
from normwise import layers, ops

if keras.backend.backend() != "tensorflow":
    pytest.skip("TensorFlow's situations", allow_module_level=True)

import tensorflow as tf


@pytest.fixture
def ragged():
    return tf.RaggedTensor.from_row_lengths(samples((7, 4)), [2, 0, 5])


@pytest.mark.parametrize("mode", ["auto", "composite"])
@pytest.mark.parametrize("norm", [ops.layer_norm, ops.rms_norm])
def test_a_ragged_tensor_is_normalized_over_its_inner_axes(ragged, norm, mode):
    with normwise.use_kernels(mode):
        y = norm(ragged, np.full(4, 2.0, "float32"))
        want = norm(ragged.values, np.full(4, 2.0, "float32"))
    assert y.row_lengths().numpy().tolist() == [2, 0, 5]
    assert_within(y.values, want.numpy(), 1e-6)


@pytest.mark.parametrize("layer", [layers.LayerNormalization(), layers.RMSNormalization()])
def test_layers_take_a_ragged_tensor(ragged, layer):
    assert_within(layer(ragged).values, layer(ragged.values).numpy(), 1e-6)


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: ops.group_norm(x, groups=2),
        lambda x: ops.layer_norm(x, axis=1),
        lambda x: ops.layer_norm(x, mask=np.ones((3, 5), bool)),
    ],
)
def test_sets_of_unknown_size_are_refused(ragged, norm):
    with pytest.raises(ValueError, match=r"is ragged up to axis 1, .*pass x.to_tensor\(\) with a"):
        norm(ragged)


def test_a_sparse_tensor_is_taken_as_what_it_stands_for():
    x = np.zeros((3, 4), "float32")
    x[0, 1], x[2, 3] = 2, -5
    found = ops.layer_norm(tf.sparse.from_dense(x))
    assert_within(found, ops.layer_norm(x).numpy(), 1e-6)


@pytest.mark.parametrize(
    ("name", "value"), [("NORMWISE_NUM_THREADS", "abc"), ("NORMWISE_INSTRUCTIONS", "AVX2")]
)
@pytest.mark.skipif(normwise.kernels.library.path() is None, reason="the library was not built")
def test_the_environment_is_checked_before_the_first_call(name, value):
    program = "import numpy as np; from normwise import ops; ops.layer_norm(np.ones((2, 3)))"
    run = [sys.executable, "-c", program]
    env = {**os.environ, name: value}
    process = subprocess.run(run, env=env, capture_output=True, text=True)
    assert f"ValueError: {name}={value!r} names" in process.stderr.replace("is no", "names")


# In a process of its own, which the interpreter ends where a scale is 1e-9.
INTEGERS = """
import sys, tempfile
import keras, numpy as np, tensorflow as tf
from normwise import layers

norms = layers.GroupNormalization(3, epsilon=0.0), layers.InstanceNormalization()
model = keras.Sequential([keras.Input((8, 8, 6)), keras.layers.Conv2D(6, 3), *norms])
x = np.random.default_rng(0).normal(3, 2, (8, 8, 8, 6)).astype("float32")
folder = tempfile.mkdtemp()
model.export(folder, verbose=False)
converter = tf.lite.TFLiteConverter.from_saved_model(folder)
converter.optimizations = [tf.lite.Optimize.DEFAULT]
converter.representative_dataset = lambda: ([one[None]] for one in x)
interpreter = tf.lite.Interpreter(model_content=converter.convert())
(given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
interpreter.resize_tensor_input(given["index"], x.shape)
interpreter.allocate_tensors()
interpreter.set_tensor(given["index"], x)
interpreter.invoke()
error = np.abs(interpreter.get_tensor(result["index"]) - model.predict(x, verbose=0))
print("mean error", error.mean())
"""


def test_an_exported_graph_can_be_made_of_integers():
    run = [sys.executable, "-c", INTEGERS]
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    process = subprocess.run(run, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert float(process.stdout.split()[-1]) < 0.1


def modulated(x, residual, gamma):
    """A residual, a gamma for each sample and the statistics, in one tensor."""
    results = ops.group_norm(x, gamma, groups=3, residual=residual, return_statistics=True)
    return tf.concat([tf.reshape(each, (-1,)) for each in results], 0)


def three():
    """x, a residual and a gamma for each sample."""
    shapes = (2, 5, 6), (2, 5, 6), (2, 6)
    return [tf.constant(samples(shape, seed)) for seed, shape in enumerate(shapes)]


def value_and_slopes(x, residual, gamma):
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([x, residual, gamma])
        y = modulated(x, residual, gamma)
        loss = tf.reduce_sum(tf.sin(y))
    # Twice, as a persistent tape allows.
    first, again = (tape.gradient(loss, [x, residual, gamma]) for _ in range(2))
    return [y, *first, *again]


@pytest.mark.parametrize("jit_compile", [False, True])
def test_operands_in_graphs(jit_compile):
    arrays = three()
    want = value_and_slopes(*arrays)
    signature = [tf.TensorSpec((None, *each.shape[1:])) for each in arrays]
    options = {"jit_compile": jit_compile, "autograph": False}
    known = tf.function(value_and_slopes, **options)
    unknown = tf.function(value_and_slopes, input_signature=signature, **options)
    for graph in (known, unknown):
        for f, w in zip(graph(*arrays), want, strict=True):
            assert_within(f, w.numpy(), 1e-4)


def test_many_inputs_at_a_time():
    x, residual, gamma = three()
    stack = tf.stack([x, tf.cos(x)])
    found = tf.vectorized_map(lambda x: modulated(x, residual, gamma), stack)
    for f, one in zip(found, stack, strict=True):
        assert_within(f, modulated(one, residual, gamma).numpy(), 1e-5)


def test_an_exported_function_with_operands(tmp_path):
    """Made for any batch, and loaded without normwise."""
    arrays = three()
    signature = [tf.TensorSpec((None, *each.shape[1:])) for each in arrays]
    module = tf.Module()
    module.serve = tf.function(modulated, input_signature=signature, autograph=False)
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    assert_within(loaded.serve(*arrays), modulated(*arrays).numpy(), 1e-5)
    graph = loaded.serve.concrete_functions[0].graph.as_graph_def()
    assert "Normwise" not in str(graph)
