"""The native kernels as JAX calls them: values, derivatives, transformations, programs."""

import functools
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from frameworks import assert_within, to_numpy
from plans import EPS, EPSILON, GEOMETRIES, call, every_geometry, few, few_geometries, norm_of
from reference import Norm, group_labels, layer_labels

from normwise import geometry
from normwise.activations import IDENTITY, Activation
from normwise.kernels import composite, library

if keras.backend.backend() != "jax":
    pytest.skip("the kernels of another backend", allow_module_level=True)
if library.path() is None:
    pytest.skip("the native library was not built", allow_module_level=True)

import jax
import jax.numpy as jnp

from normwise.kernels import jax as kernel

two_geometries = few("group-last", "layer-middle")

# JAX's own beside them: on JAX Keras 3.15 takes tanh of float64 in float32.
ACTIVATIONS = {
    "relu": (Activation("leaky_relu"), jax.nn.relu),
    "leaky_relu": (
        Activation("leaky_relu", 0.2),
        functools.partial(jax.nn.leaky_relu, negative_slope=0.2),
    ),
    "sigmoid": (Activation("sigmoid"), jax.nn.sigmoid),
    "tanh": (Activation("tanh"), jnp.tanh),
    "silu": (Activation("silu"), jax.nn.silu),
    "gelu": (Activation("gelu"), functools.partial(jax.nn.gelu, approximate=False)),
    "gelu_tanh": (Activation("gelu_tanh"), jax.nn.gelu),
}


def operands(plan, dtype="float32", gamma=True, beta=True, leading=()):
    """(x, gamma, beta) and a cotangent of x's shape and dtype."""
    rng = np.random.default_rng(0)
    arithmetic = "float64" if dtype == "float64" else "float32"
    x = jnp.asarray(rng.normal(3.0, 2.0, (*leading, *plan.shape)), dtype)
    shape = (*leading, *plan.parameter_shape)
    gamma, beta = (
        jnp.asarray(rng.uniform(0.5, 1.5, shape), arithmetic) if wanted else None
        for wanted in (gamma, beta)
    )
    return (x, gamma, beta), jnp.asarray(rng.normal(size=x.shape), dtype)


def native(plan, subtract_mean=True, activation=IDENTITY):
    return call(kernel.KERNELS[0], plan, subtract_mean, activation)


def readable(plan, activation=lambda y: y):
    """What `native` is to be the same as."""
    normalize = call(composite.COMPOSITE, plan)
    return lambda *operands: activation(normalize(*operands))


def reference(plan, x, gamma, beta, subtract_mean=True):
    labels = (
        group_labels(plan.shape, plan.parameter_axes[0], plan.groups)
        if "groups" in plan.per
        else layer_labels(plan.shape, plan.set_axes)
    )
    x, gamma, beta = (a if a is None else to_numpy(a) for a in (x, gamma, beta))
    return Norm(x, gamma, beta, labels, plan.parameter_axes, EPSILON, subtract_mean)


def leaves(tree):
    return [to_numpy(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same(found, expected, tolerance):
    """Assert that two trees of arrays are equal within a share of each array's largest number."""
    found, expected = leaves(found), leaves(expected)
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        assert_within(f, e, tolerance * (1 + np.abs(e).max(initial=0)))


def custom_calls(text):
    return text.count("@normwise_jax") + text.count('"normwise_jax')


def check_against_reference(plan, dtype, subtract_mean=True, gamma=True, beta=True):
    arrays, dy = operands(plan, dtype, gamma, beta)
    y, pull = jax.vjp(native(plan, subtract_mean), *arrays)
    found = pull(dy)
    assert y.dtype == arrays[0].dtype
    assert jax.tree.map(lambda a: a.dtype, found) == jax.tree.map(lambda a: a.dtype, arrays)

    norm = reference(plan, *arrays, subtract_mean)
    dy = to_numpy(dy)
    arithmetic = "float64" if dtype == "float64" else "float32"
    rounding = EPS[dtype] if dtype != arithmetic else 0
    tolerance = norm.y_tolerance(EPS[arithmetic])
    assert_within(to_numpy(y), norm.y, tolerance + rounding * np.abs(norm.y), "y")
    right = norm.gradients(dy)
    tolerances = norm.gradient_tolerances(dy, EPS[arithmetic])
    for name, g, want, tolerance in zip(
        ("x", "gamma", "beta"), found, right, tolerances, strict=True
    ):
        if g is not None:
            # A float16 below 2^-14 has fewer digits: its last is 2^-24.
            rounded = rounding * np.abs(want) + 2.0**-24 if name == "x" and rounding else 0
            assert_within(to_numpy(g), want, tolerance + rounded, name)


@every_geometry
@pytest.mark.parametrize("subtract_mean", [True, False], ids=["subtract_mean", "rms"])
def test_values_and_gradients(plan, subtract_mean):
    check_against_reference(plan, "float32", subtract_mean)


@few_geometries
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_dtypes(plan, dtype):
    with jax.enable_x64(dtype == "float64"):
        check_against_reference(plan, dtype)


@few_geometries
@pytest.mark.parametrize(("gamma", "beta"), [(True, False), (False, True), (False, False)])
def test_absent_parameters(plan, gamma, beta):
    check_against_reference(plan, "float32", gamma=gamma, beta=beta)


@pytest.mark.parametrize("name", ACTIVATIONS)
@two_geometries
def test_activations(plan, name):
    fused, function = ACTIVATIONS[name]
    with jax.enable_x64(True):
        arrays, dy = operands(plan, "float64")

        @functools.partial(jax.jit, static_argnums=0)
        def both(function):
            y, pull = jax.vjp(function, *arrays)
            return y, pull(dy)

        assert_same(both(native(plan, activation=fused)), both(readable(plan, function)), 1e-12)


@pytest.mark.parametrize("shape", [(0, 5, 6), (2, 0, 6)])
@pytest.mark.parametrize("make", [functools.partial(geometry.group, groups=3), geometry.layer])
def test_empty_inputs(shape, make):
    plan = make(shape, axis=-1)
    arrays, dy = operands(plan)
    y, pull = jax.vjp(native(plan), *arrays)
    assert y.shape == shape
    for gradient, array in zip(pull(dy), arrays, strict=True):
        assert_within(to_numpy(gradient), np.zeros(array.shape), 0)


@few_geometries
def test_the_statistics_are_the_same_everywhere(plan):
    for subtract_mean in (True, False):
        (x, gamma, beta), _ = operands(plan)
        norm = norm_of(plan, "float32", subtract_mean=subtract_mean)
        tensors = x, gamma, beta, jnp.zeros(0)
        found = kernel._NATIVE.forward.bind(*tensors, norm=norm)
        expected = jax.jit(functools.partial(kernel._meant_forward, norm=norm))(*tensors)
        assert_same(found, expected, 1e-6)


@pytest.mark.parametrize(
    ("plan", "name"),
    [
        (GEOMETRIES["group-last"], None),
        (GEOMETRIES["layer-two"], None),
        (GEOMETRIES["layer-middle"], "silu"),
    ],
)
def test_derivatives_of_higher_order(plan, name):
    """Of a gradient penalty, and in forward mode over both modes."""
    with jax.enable_x64(True):
        arrays, dy = operands(plan, "float64")
        directions = jax.tree.map(jnp.cos, arrays)

        def derivatives(function):
            def slopes(*arrays):
                return jax.vjp(function, *arrays)[1](dy)

            def penalty(*arrays):
                return sum(jnp.sum(g**2) for g in slopes(*arrays))

            def forward(*arrays):
                return jax.jvp(function, arrays, directions)[1]

            @jax.jit
            def every(*arrays):
                return (
                    jax.grad(penalty, (0, 1, 2))(*arrays),
                    forward(*arrays),
                    jax.jvp(slopes, arrays, directions)[1],
                    jax.jvp(forward, arrays, directions)[1],
                    jax.vjp(forward, *arrays)[1](dy),
                )

            return every(*arrays)

        fused, function = ACTIVATIONS.get(name, (IDENTITY, lambda y: y))
        pair = native(plan, activation=fused), readable(plan, function)
        found, expected = map(derivatives, pair)
        assert_same(found, expected, 1e-10)


@two_geometries
@pytest.mark.parametrize("axes", [(1, None, None), (None, 0, None), (-1, 0, 0)])
def test_vmap(plan, axes):
    stacked = list(zip(operands(plan, leading=(3,))[0], axes, strict=True))
    arrays = [a[0] if axis is None else jnp.moveaxis(a, 0, axis) for a, axis in stacked]
    each = [[a[0 if axis is None else i] for a, axis in stacked] for i in range(3)]

    def loss(*arrays):
        return jnp.sum(native(plan)(*arrays) ** 3)

    def total(*arrays):
        return jnp.sum(jax.vmap(loss, axes)(*arrays))

    for function in (native(plan), jax.grad(loss, (0, 1, 2))):
        found = jax.jit(jax.vmap(function, axes))(*arrays)
        function = jax.jit(function)
        expected = jax.tree.map(lambda *one: jnp.stack(one), *(function(*a) for a in each))
        assert_same(found, expected, 1e-5)

    found = jax.jit(jax.grad(total, (0, 1, 2)))(*arrays)
    slopes = jax.jit(jax.grad(loss, (0, 1, 2)))
    parts = [slopes(*a) for a in each]
    for g, axis, *one in zip(found, axes, *parts, strict=True):
        assert_same(g, sum(one) if axis is None else jnp.stack(one, axis), 1e-5)


@few_geometries
def test_vmap_over_x_is_one_call(plan):
    (x, gamma, beta), _ = operands(plan, leading=(2, 3))
    (gamma, beta) = (p[0, 0] for p in (gamma, beta))
    function = jax.jit(jax.vmap(jax.vmap(native(plan), (0, None, None)), (0, None, None)))
    text = function.lower(x, gamma, beta).as_text()
    assert custom_calls(text) == 1
    assert "while" not in text
    expected = [[native(plan)(one, gamma, beta) for one in some] for some in x]
    assert_same(function(x, gamma, beta), jnp.asarray(expected), 1e-6)

    slope = jax.jit(jax.grad(lambda x: jnp.sum(native(plan)(x, None, None) ** 3)))
    slopes = jax.jit(jax.vmap(slope))
    assert custom_calls(slopes.lower(x[0]).as_text()) == 2
    assert_same(slopes(x[0]), jnp.stack([slope(one) for one in x[0]]), 1e-5)


@two_geometries
def test_checkpoint_and_scan(plan):
    arrays, _ = operands(plan)

    def twice(function, x, gamma, beta):
        x, _ = jax.lax.scan(lambda x, _: (function(x, gamma, beta), None), x, length=2)
        return jnp.sum(x**3)

    def slopes(function):
        loss = functools.partial(twice, function)
        return jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)

    assert_same(slopes(jax.checkpoint(native(plan))), slopes(readable(plan)), 1e-4)


@two_geometries
def test_an_exported_program_needs_no_library(plan):
    arrays, dy = operands(plan)

    def function(*arrays):
        y, pull = jax.vjp(native(plan), *arrays)
        return y, pull(dy)

    here = jax.jit(function)
    assert custom_calls(here.lower(*arrays).as_text()) == 2
    exported = jax.export.export(here, platforms=["cpu", "cuda"])(*arrays)
    assert custom_calls(exported.mlir_module()) == 0
    assert_same(exported.call(*arrays), here(*arrays), 1e-5)
    elsewhere = here.trace(*arrays).lower(lowering_platforms=("cuda",))
    assert custom_calls(elsewhere.as_text()) == 0


def test_an_exported_program_takes_any_batch():
    (x, gamma, beta), _ = operands(geometry.group((5, 3, 6), -1, 3))
    function = jax.jit(lambda x: native(geometry.group(x.shape, -1, 3))(x, gamma, beta))
    symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 3, 6"), "float32")
    exported = jax.export.export(function)(symbolic)
    assert custom_calls(exported.mlir_module()) == 0
    assert_same(exported.call(x), function(x), 1e-6)


def test_a_call_that_does_not_fit_is_an_error():
    (x, gamma, beta), _ = operands(geometry.group((2, 5, 6), -1, 3))
    norm = norm_of(geometry.group((2, 5, 8), -1, 4), "float32")
    bind = jax.jit(kernel._NATIVE.forward.bind, static_argnames="norm")
    absent = jnp.zeros(0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="groups must divide the channels"):
        bind(x, gamma, beta, absent, norm=norm)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from normwise import geometry
from normwise.kernels import jax as kernel
from normwise.norm import Norm, Operands

assert kernel._register.cache_info().currsize == 0, "loaded at import"
assert len(jax.devices()) == 4
mesh = Mesh(np.array(jax.devices()), ("batch",))
split, whole = (NamedSharding(mesh, PartitionSpec(*names)) for names in (["batch"], []))
rng = np.random.default_rng(0)
for plan in (
    geometry.group((8, 5, 6), -1, 3),
    geometry.group((8, 6, 5), 1, 3),
    geometry.layer((8, 4, 6)),
    geometry.layer((8, 6, 5), 1),
):
    def function(x, gamma, beta):
        norm = Norm(plan, "float32", "float32", 1e-3)
        y, pull = jax.vjp(
            lambda x, *parameters: kernel.KERNELS[0].run(norm, x, Operands(*parameters)),
            x, gamma, beta)
        return y, pull(jnp.cos(x))

    x = rng.normal(3, 2, plan.shape).astype("float32")
    for parameters in (rng.uniform(0.5, 1.5, (2, 6)).astype("float32"), (None, None)):
        arrays = [x, *parameters]
        spread = [a if a is None else jax.device_put(a, s)
                  for a, s in zip(arrays, (split, whole, whole))]
        program = jax.jit(function)
        text = program.lower(*spread).compile().as_text()
        assert "normwise_jax_forward" in text and "normwise_jax_backward" in text, text
        assert "all-gather" not in text and "all-to-all" not in text, text
        y, slopes = program(*spread)
        assert y.sharding.is_equivalent_to(split, y.ndim), y.sharding
        assert slopes[0].sharding.is_equivalent_to(split, y.ndim), slopes[0].sharding
        for found, one in zip(jax.tree.leaves((y, slopes)), jax.tree.leaves(program(*arrays))):
            error = np.abs(np.asarray(found) - np.asarray(one))
            assert (error <= 1e-5 * (1 + np.abs(one).max())).all(), (plan, error.max())

    # Where a type says how its array is split.
    explicit = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit):
        y, _ = jax.jit(function)(jax.device_put(x, PartitionSpec("batch")), None, None)
        assert y.sharding.spec[0] == "batch", y.sharding
print("equal")
"""


def test_split_over_devices():
    """Output and dx stay where x is; the gradients of gamma and beta are summed over devices."""
    flags = "--xla_force_host_platform_device_count=4"
    run = subprocess.run(
        [sys.executable, "-c", SHARDED],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert run.stdout.strip() == "equal", run.stderr


DATA_PARALLEL = """
import sys
import jax, keras, numpy as np
import normwise

if sys.argv[1] == "4":
    assert len(jax.devices()) == 4
    keras.distribution.set_distribution(keras.distribution.DataParallel())
keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
x, y = rng.normal(3, 2, (16, 6, 6, 3)).astype("float32"), rng.integers(0, 3, 16)
model = keras.Sequential([
    keras.Input((6, 6, 3)),
    keras.layers.Conv2D(8, 3),
    normwise.layers.GroupNormalization(4, activation="relu"),
    normwise.layers.InstanceNormalization(),
    normwise.layers.LayerNormalization(axis=[1, 2, 3]),
    keras.layers.Flatten(),
    keras.layers.Dense(3, activation="softmax"),
])
model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
np.savez(sys.argv[2], *model.get_weights(), model.predict(x, batch_size=8, verbose=0))
"""


def test_keras_data_parallel_trains_as_one_device(tmp_path):
    """And gathers no activations: each device normalizes its part of the batch."""
    programs = tmp_path / "programs"

    def trained(devices):
        file = tmp_path / f"{devices}.npz"
        flags = f"--xla_force_host_platform_device_count={devices} --xla_dump_to={programs}"
        subprocess.run(
            [sys.executable, "-c", DATA_PARALLEL, str(devices), str(file)],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            check=True,
        )
        return np.load(file).values()

    for one, four in zip(trained(1), trained(4), strict=True):
        assert_within(four, one, 1e-5 * (1 + np.abs(one)), "trained on four devices")
    texts = [file.read_text() for file in programs.glob("*train_step*after_optimizations.txt")]
    steps = [text for text in texts if "num_partitions=4" in text]
    assert steps
    for text in steps:
        assert "normwise" in text
        assert "all-reduce" in text
        assert "all-gather" not in text
        assert "all-to-all" not in text


THREADS = """
import os
import jax, jax.numpy as jnp
from normwise import ops

def threads():
    return len(os.listdir("/proc/self/task"))

x = jnp.ones((64, 64, 64, 16))
jax.block_until_ready(jax.jit(lambda x: x @ x.mT)(x))
before = threads()
for norm in (ops.instance_norm, ops.layer_norm):
    jax.block_until_ready(norm(x))
    assert threads() == before, f"{before} threads became {threads()}"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc names the threads")
def test_no_thread_is_started_beside_those_of_xla():
    subprocess.run([sys.executable, "-c", THREADS], check=True)
