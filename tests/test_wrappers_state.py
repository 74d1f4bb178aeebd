"""What weight and spectral norm keep from call to call: when it is set, and from which data."""

import contextlib
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from frameworks import BACKEND, allow_torch_compile, assert_within, to_numpy
from test_wrappers import both, dtype_policy, samples, wrap

from normwise.layers import SpectralNormalization, WeightNormalization, WeightStandardization

POLICIES = ["mixed_float16", "mixed_bfloat16"]


def initialized(layer):
    return bool(to_numpy(layer.non_trainable_weights[0]))


def offsets(layer):
    return {w.name: to_numpy(w) for w in layer.weights if w.name.endswith("_offset")}


def expected_offsets(t, epsilon=1e-10):
    """g_offset and bias_offset of a g of ones and a bias of zeros, in float64."""
    t = np.float64(t).reshape(-1, t.shape[-1])
    scale = 1 / np.sqrt(t.var(0) + epsilon)
    return {"g_offset": scale - 1, "bias_offset": -t.mean(0) * scale}


# Weight norm's data


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_data_in_mixed_precision_is_not_rounded(policy, everywhere):
    """A dozen eps of float32, where one rounding to half precision would be 2^-12 or 2^-9."""
    x = samples((64, 5))
    with dtype_policy(policy if everywhere else "float32"):
        dtype = None if everywhere else policy
        layer = WeightNormalization(keras.layers.Dense(3, dtype=dtype), dtype=dtype)
        model = keras.Sequential([keras.Input((5,)), layer])
        layer.layer.bias.assign([0.1, 20.3, -0.7])
        bias = to_numpy(layer.layer.bias)
        t = np.float64(x) @ to_numpy(layer.v) + bias
        y = (model if not everywhere else layer)(x, training=True)
    assert keras.backend.standardize_dtype(y.dtype) == policy.removeprefix("mixed_")
    assert {w.dtype for w in layer.trainable_weights} == {"float32"}
    expected = expected_offsets(t)
    expected["bias_offset"] -= bias
    for name, found in offsets(layer).items():
        assert found.dtype == "float32"
        assert_within(found, expected[name], 1e-5 * np.abs(expected[name]).max(), name)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("make", [lambda: keras.layers.Dense(2), lambda: keras.layers.LSTM(2)])
def test_fit_from_data_in_mixed_precision(make, policy):
    with dtype_policy(policy):
        layer = WeightNormalization(make())
        model = keras.Sequential([keras.Input((3, 4)), layer])
        model.compile("sgd", "mse")
        x = samples((8, 3, 4))
        model.fit(x, to_numpy(keras.ops.zeros_like(model(x))), verbose=0)
        assert np.isfinite(np.float32(model.predict(x, verbose=0))).all()
    assert initialized(layer)


def test_weights_made_within_a_layer_of_mixed_precision_are_whole():
    """The layer around it has Keras round weights, and they say they were of half precision."""

    class Around(keras.Layer):
        def __init__(self):
            super().__init__(dtype="mixed_float16")
            self.inner = WeightNormalization(keras.layers.Dense(3, dtype=self.dtype_policy))

        def call(self, x):
            return self.inner(x)

    layer = Around()
    layer(samples((4, 5)))
    assert {w.dtype for w in layer.inner.weights} == {"float32", "bool"}


@pytest.mark.parametrize("compiled", [True, False])
def test_an_empty_batch_initializes_nothing(compiled):
    layer = WeightNormalization(keras.layers.Dense(3))
    layer.build((None, 5))
    before = [to_numpy(w) for w in layer.weights]
    call = layer
    if compiled and BACKEND == "tensorflow":
        import tensorflow as tf

        spec = tf.TensorSpec((None, 5))
        call = tf.function(layer, autograph=False).get_concrete_function(spec, training=True)
        call = (lambda function: lambda x, training: function(x))(call)
    elif compiled and BACKEND == "jax":
        import jax

        def step(weights, state, x):
            return layer.stateless_call(weights, state, x, training=True)

        def call(x, training):
            values = [w.value for w in layer.trainable_variables]
            state = [w.value for w in layer.non_trainable_variables]
            y, state = jax.jit(step)(values, state, x)
            for w, value in zip(layer.non_trainable_variables, state, strict=True):
                w.assign(value)
            return y

    y = call(keras.ops.convert_to_tensor(samples((0, 5))), training=True)
    assert tuple(y.shape) == (0, 3)
    for w, value in zip(layer.weights, before, strict=True):
        np.testing.assert_array_equal(to_numpy(w), value)
    x = samples((9, 5))
    expected = expected_offsets(x @ to_numpy(layer.v))
    call(keras.ops.convert_to_tensor(x), training=True)
    assert initialized(layer)
    for name, found in offsets(layer).items():
        assert_within(found, expected[name], 1e-5 * np.abs(expected[name]).max(), name)


# Replicas

SETUP = """
import os, sys
import keras, numpy as np, normwise
keras.utils.set_random_seed(0)

def make():
    L, K = normwise.layers, keras.layers
    weight = L.WeightNormalization(K.Dense(4), name="weight")
    spectral = L.SpectralNormalization(K.Dense(4), name="spectral")
    compatible = L.SpectralNormalization(K.Dense(4), compatible=True, name="compatible")
    return keras.Sequential([keras.Input((4,)), weight, spectral, compatible, K.Dense(1)])

# The shards of the first batch are far apart, so that the mean of their variances is not enough.
x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
x[4:8] += 100.0

def check(model, kernel, others):
    t = np.float64(x[:8]) @ kernel
    scale = 1 / np.sqrt(t.var(0) + 1e-10)
    for values in others:
        for w, value in zip(model.weights, values, strict=True):
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(w), value, w.path)
    g_offset, bias_offset = model.get_layer("weight").non_trainable_weights[1:]
    np.testing.assert_allclose(keras.ops.convert_to_numpy(g_offset), scale - 1, rtol=1e-4)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(bias_offset), -t.mean(0) * scale, rtol=1e-4, atol=1e-5
    )
    u = keras.ops.convert_to_numpy(model.get_layer("spectral").u)
    assert abs(np.linalg.norm(u) - 1) < 1e-5
"""

IN_TENSORFLOW = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    model = make()
    model.compile(keras.optimizers.SGD(1e-6), "mse")
kernel = keras.ops.convert_to_numpy(model.get_layer("weight").v)
model.fit(x, x[:, :1], batch_size=8, shuffle=False, verbose=0)
values = [strategy.experimental_local_results(w.value) for w in model.weights]
check(model, kernel, [[v[i].numpy() for v in values] for i in range(2)])

class Cell(keras.Layer):
    state_size = 4

    def build(self, shape):
        self.inner = normwise.layers.WeightNormalization(keras.layers.Dense(4))
        self.inner.build(shape)

    def call(self, x, states, training=False):
        return [self.inner(x, training=training)] * 2

with strategy.scope():
    model = keras.Sequential([keras.Input((3, 4)), keras.layers.RNN(Cell())])
    model.compile("sgd", "mse")
try:
    model.fit(np.ones((8, 3, 4)), np.ones((8, 4)), verbose=0)
except ValueError as error:
    assert "2 replicas cannot meet in a loop, as that of a recurrent layer" in str(error), error
else:
    raise AssertionError("initialized, each replica from its own data")
"""

IN_JAX = """
import jax
assert jax.device_count() == 2
keras.distribution.set_distribution(keras.distribution.DataParallel())
model = make()
model.compile(keras.optimizers.SGD(1e-6), "mse")
kernel = keras.ops.convert_to_numpy(model.get_layer("weight").v)
model.fit(x, x[:, :1], batch_size=8, shuffle=False, verbose=0)
values = [w.value.addressable_shards for w in model.weights]
check(model, kernel, [[np.asarray(v[i].data) for v in values] for i in range(2)])
"""

IN_TORCH = """
import torch
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
keras.utils.set_random_seed(rank)
model = make()
if rank == 0:
    # Alone: it may not wait for the other, which does not come.
    alone = normwise.layers.WeightNormalization(keras.layers.Dense(4))
    alone(x[:4], training=True)
    assert alone.non_trainable_weights[0].numpy()
parallel = torch.nn.parallel.DistributedDataParallel(model)
kernel = keras.ops.convert_to_numpy(model.get_layer("weight").v).copy()
for half in (torch.tensor(x[:8]), torch.tensor(x[8:])):
    # The second rank has nothing in the first part of what it gets.
    shard = half[:5] if rank == 0 else half[5:]
    parallel(shard, training=True).square().mean().backward()
values = [keras.ops.convert_to_numpy(w).copy() for w in model.weights]
others = [None] * 2
torch.distributed.all_gather_object(others, values)
check(model, kernel, others)
torch.distributed.destroy_process_group()
"""


def run_together(program, count, **environment):
    """The program in `count` processes, with what each said where one of them failed."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SETUP + program],
            env={**os.environ, **environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, "\n".join(said)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow's strategies")
def test_replicas_of_a_strategy_are_one_model():
    run_together(IN_TENSORFLOW, 1)


@pytest.mark.skipif(BACKEND != "jax", reason="of Keras's distribution on JAX")
def test_devices_of_data_parallel_jax_are_one_model():
    flags = "--xla_force_host_platform_device_count=2"
    run_together(IN_JAX, 1, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")


@pytest.mark.skipif(BACKEND != "torch", reason="of torch's DistributedDataParallel")
def test_ranks_of_data_parallel_torch_are_one_model(tmp_path):
    import torch

    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    # A port that is free now.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = str(store.port)
    del store
    run_together(IN_TORCH, 2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2")


# Inside of a recurrent cell


class Cell(keras.Layer):
    """A recurrent cell of two wrapped layers."""

    def __init__(self, wrapper, **options):
        super().__init__()
        self.state_size = 4
        self.of_x = wrapper(keras.layers.Dense(4), **options)
        self.of_h = wrapper(keras.layers.Dense(4), **options)

    def build(self, shape):
        self.of_x.build(shape)
        self.of_h.build((shape[0], 4))

    def call(self, x, states, training=False):
        h = self.of_x(x, training=training) + self.of_h(states[0], training=training)
        h = keras.ops.tanh(h)
        return h, [h]


@pytest.mark.parametrize("options", [{}, {"compatible": True}, {"power_iterations": 2}])
def test_spectral_norm_in_a_recurrent_cell(options):
    cell = Cell(SpectralNormalization, **options)
    model = keras.Sequential([keras.Input((6, 5)), keras.layers.RNN(cell)])
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    x = samples((8, 6, 5))
    model.fit(x, x[:, 0, :4], epochs=30, verbose=0)
    assert np.isfinite(model.predict(x, verbose=0)).all()
    for layer in (cell.of_x, cell.of_h):
        kernel = to_numpy(layer.remove().kernel)
        assert_within(np.linalg.norm(kernel, 2), 1.0, 0.02, "largest singular value")
    model(x, training=True)


def test_weight_norm_in_a_recurrent_cell():
    cell = Cell(WeightNormalization)
    model = keras.Sequential([keras.Input((6, 5)), keras.layers.RNN(cell)])
    model.compile("sgd", "mse")
    x = samples((8, 6, 5))
    message = "cannot take its data to initialize here, in a loop .* use data_init=False"
    warned = BACKEND == "jax"
    with pytest.warns(UserWarning, match=message) if warned else contextlib.nullcontext():
        model.fit(x, x[:, 0, :4], verbose=0)
    assert initialized(cell.of_x) == (BACKEND != "jax")
    assert np.isfinite(model.predict(x, verbose=0)).all()


# Spectral norm before, after and without training


def largest(layer, rows):
    """The largest singular value of the kernel that inference uses."""
    return np.linalg.norm(to_numpy(layer(np.eye(rows, dtype="float32"))), 2)


def kernels():
    """Of few large singular values, as a trained layer's; of many; and orthogonal."""
    rng = np.random.default_rng(0)
    strong = np.outer(rng.normal(size=96), rng.normal(size=64)) + 0.01 * rng.normal(size=(96, 64))
    flat = np.linalg.qr(rng.normal(size=(96, 64)))[0]
    outlier = flat + 4 * np.outer(flat[:, 0], np.eye(64)[0])
    return {"strong": strong, "random": rng.normal(size=(96, 64)), "flat": flat, "outlier": outlier}


KERNELS = kernels()


# A random kernel's sigma is 5% too small after 32 steps from one in a thousand of random u.
NEAR = 0.1


def spectral(**options):
    dense = keras.layers.Dense(64, use_bias=False)
    layer = SpectralNormalization(dense, **options)
    layer.build((None, 96))
    return layer


@pytest.mark.parametrize("kind", KERNELS)
def test_inference_before_training_finds_sigma(kind):
    layer = spectral()
    before = to_numpy(layer.u)
    assert_within(largest(layer, 96), 1.0, NEAR, "as initialized")
    layer.layer.kernel.assign(KERNELS[kind])
    assert_within(largest(layer, 96), 1.0, NEAR, "assigned")
    layer.layer.set_weights([1e-3 * KERNELS[kind]])
    assert_within(largest(layer, 96), 1.0, NEAR, "set, a thousandth")
    np.testing.assert_array_equal(to_numpy(layer.u), before)
    kernel = to_numpy(layer.remove().kernel)
    assert_within(np.linalg.norm(kernel, 2), 1.0, NEAR, "removed")


def test_inference_before_training_has_a_gradient():
    """That of kernel / sigma with fixed vectors: no gradient is along the kernel itself."""
    from test_wrappers import wrapped_gradients

    layer = spectral()
    layer.layer.kernel.assign(KERNELS["strong"])
    x, dy = samples((5, 96)), samples((5, 64), seed=1)
    _, dx, found = wrapped_gradients(layer, x, dy, training=False)
    (dw,) = found.values()
    scale = np.abs(dw).max() * np.abs(KERNELS["strong"]).sum()
    assert_within((dw * KERNELS["strong"]).sum(), 0.0, 1e-5 * scale, "dw along the kernel")
    kernel = KERNELS["strong"] / np.linalg.norm(KERNELS["strong"], 2)
    assert_within(dx, dy @ kernel.T, 1e-4 * np.abs(dx).max(), "dx")


@pytest.mark.parametrize("kind", KERNELS)
def test_inference_after_training_uses_its_u(kind, tmp_path):
    """sigma = |W u| of the u that is kept, not a better one; files and weights keep it."""
    layer = spectral(power_iterations=3)
    layer.layer.kernel.assign(KERNELS[kind])
    layer(samples((2, 96)), training=True)
    x = np.eye(96, dtype="float32")
    y = to_numpy(layer(x, training=False))
    sigma = np.linalg.norm(KERNELS[kind] @ np.float64(to_numpy(layer.u)[0]))
    assert_within(y, KERNELS[kind] / sigma, 1e-5 * np.abs(y).max(), "y")
    other = spectral()
    other.set_weights(layer.get_weights())
    # A product's last bit may follow from where in memory its operands lie.
    assert_within(to_numpy(other(x)), y, 1e-6 * np.abs(y).max())
    model = keras.Sequential([keras.Input((96,)), layer])
    model.save_weights(tmp_path / "w.weights.h5")
    model = keras.Sequential([keras.Input((96,)), spectral()])
    model.load_weights(tmp_path / "w.weights.h5")
    assert_within(to_numpy(model.layers[0](x)), y, 1e-6 * np.abs(y).max())


def test_inference_with_a_kernel_that_is_set_after_training_finds_its_sigma():
    layer = spectral(power_iterations=20)
    layer.layer.kernel.assign(KERNELS["random"])
    layer(samples((2, 96)), training=True)
    layer.layer.kernel.assign(KERNELS["strong"])
    assert_within(largest(layer, 96), 1.0, NEAR, "largest singular value")


def test_inference_before_training_in_batches_of_weights():
    """torch.vmap and jax.vmap cannot branch by a value."""
    if BACKEND == "tensorflow":
        pytest.skip("TensorFlow maps layers with their weights by loops")
    layer = spectral()
    many = np.stack([KERNELS["strong"], KERNELS["random"]]).astype("float32")
    x, u = np.eye(96, dtype="float32"), to_numpy(layer.u)

    def call(kernel):
        return layer.stateless_call([kernel], [u], x)[0]

    if BACKEND == "jax":
        import jax as framework
    else:
        import torch as framework
    with contextlib.nullcontext() if BACKEND == "jax" else framework.no_grad():
        found = to_numpy(framework.vmap(call)(keras.ops.convert_to_tensor(many)))
    for kernel in found:
        assert_within(np.linalg.norm(kernel, 2), 1.0, NEAR, "largest singular value")


# Compiled by torch, in one piece

PIECES = {
    "spectral": lambda: SpectralNormalization(keras.layers.Dense(4)),
    "compatible": lambda: SpectralNormalization(keras.layers.Dense(4), compatible=True),
    "separable": lambda: SpectralNormalization(keras.layers.SeparableConv1D(4, 2)),
    "weight": lambda: WeightNormalization(keras.layers.Conv1D(4, 2)),
    "standardized": lambda: WeightStandardization(keras.layers.Conv1D(4, 2), scaled=True),
}


@pytest.mark.skipif(BACKEND != "torch", reason="of torch.compile")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", PIECES)
def test_one_graph_of_torch(kind, training, monkeypatch):
    import torch

    # A trace goes through a loop as often as that runs, and each round of it is like another.
    monkeypatch.setattr("normwise.layers.spectral._ITERATIONS", 4)
    allow_torch_compile(True)
    layer = PIECES[kind]()
    x = torch.tensor(samples((3, 5, 8)))
    layer.build(tuple(x.shape))
    first = layer.get_weights()
    want = [to_numpy(layer(x, training=training).detach()) for _ in range(2)]
    kept = layer.get_weights()
    layer.set_weights(first)
    call = torch.compile(lambda x: layer(x, training=training), fullgraph=True, backend="aot_eager")
    for expected in want:
        y = call(x)
        y.sum().backward()
        assert_within(to_numpy(y.detach()), expected, 1e-5 * np.abs(expected).max(), "y")
    for w, value in zip(layer.weights, kept, strict=True):
        assert_within(to_numpy(w), value, 1e-5, w.path)


@pytest.mark.skipif(BACKEND != "torch", reason="of torch.compile")
@pytest.mark.xfail(strict=True, reason="torch 2.13 forgets what a trace sets after a torch.cond")
def test_a_compiled_call_does_not_leave_keras_in_training():
    """Keras notes that a call trains, and takes the note back after the layer's torch.cond."""
    import torch

    allow_torch_compile(True)
    layer = PIECES["weight"]()
    x = torch.tensor(samples((3, 5, 8)))
    layer.build(tuple(x.shape))
    call = torch.compile(lambda x: layer(x, training=True), fullgraph=True, backend="aot_eager")
    call(x)
    try:
        np.testing.assert_array_equal(to_numpy(keras.layers.Dropout(0.5)(x)), to_numpy(x))
    finally:
        call(x)  # which takes the note back


@pytest.mark.skipif(BACKEND != "torch", reason="of torch.compile")
def test_compiling_a_layer_that_calls_others_breaks_the_graph():
    import torch

    allow_torch_compile(True)
    layer = WeightNormalization(keras.layers.SimpleRNN(4))
    x = torch.tensor(samples((3, 5, 8)))
    layer.build(tuple(x.shape))
    y = torch.compile(lambda x: layer(x, training=True), backend="aot_eager")(x)
    assert initialized(layer)
    assert np.isfinite(to_numpy(y.detach())).all()


# Quantization and LoRA


# Of Keras, which asks each layer.
@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize` method")
@both
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_wrapped_kernel_cannot_be_quantized(wrapper, mode):
    layer = wrap(wrapper, keras.layers.Dense(4, name="inner"))
    model = keras.Sequential([keras.Input((16,)), layer])
    x = samples((3, 16))
    want = model.predict(x, verbose=0)
    message = rf"quantize\('{mode}'\) of inner would take away the kernel of floats from which "
    with pytest.raises(ValueError, match=f"{message}{wrapper.__name__} .*remove"):
        model.quantize(mode)
    np.testing.assert_array_equal(model.predict(x, verbose=0), want)
    plain = keras.Sequential([keras.Input((16,)), layer.remove()])
    plain.layers[0].quantize(mode)
    assert_within(plain.predict(x, verbose=0), want, 0.2 * np.abs(want).max(), "quantized")
    with pytest.raises(ValueError, match="Dense has no weight to normalize"):
        layer(x)


@both
def test_float8_keeps_the_norm(wrapper):
    layer = wrap(wrapper, keras.layers.Dense(4))
    model = keras.Sequential([keras.Input((16,)), layer])
    x = samples((8, 16))
    want = model.predict(x, verbose=0)
    layer.layer.quantize("float8")
    assert_within(model.predict(x, verbose=0), want, 0.15 * np.abs(want).max(), "float8")
    model.compile("sgd", "mse")
    model.fit(x, x[:, :4], verbose=0)
    want = model.predict(x, verbose=0)
    assert np.isfinite(want).all()


@both
def test_a_wrapped_kernel_takes_no_lora(wrapper):
    layer = wrap(wrapper, keras.layers.Dense(4, name="inner"))
    x = samples((3, 16))
    y = to_numpy(layer(x))
    message = rf"enable_lora\(2\) of inner would take away .* {wrapper.__name__} .*remove"
    with pytest.raises(ValueError, match=message):
        layer.layer.enable_lora(2)
    with pytest.raises(ValueError, match=r"enable_lora\(2\) of inner would take away"):
        layer.layer.enable_lora(rank=2)
    np.testing.assert_array_equal(to_numpy(layer(x)), y)
    dense = layer.remove()
    dense.enable_lora(2)
    assert_within(to_numpy(dense(x)), y, 1e-5 * np.abs(y).max(), "adapted")


@both
def test_a_kernel_of_integers_cannot_be_wrapped(wrapper):
    dense = keras.layers.Dense(4)
    dense.build((None, 16))
    dense.quantize("int8")
    with pytest.raises(ValueError, match=r"Dense has no weight to normalize: .* or quantization"):
        wrapper(dense)(samples((3, 16)))
