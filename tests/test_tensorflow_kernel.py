"""The native kernels on TensorFlow, as ops: values, gradients, traces, and where they stay out."""

import dataclasses
import itertools
import math
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
from frameworks import BACKEND, assert_within, gradients, second_gradients, to_numpy
from plans import EPSILON, call, norm_of
from reference import EPS, Norm, group_labels, layer_labels

from normwise import geometry
from normwise.activations import IDENTITY, Activation
from normwise.kernels import composite, cpu, library, tensorflow
from normwise.norm import NONE

pytestmark = [
    pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's door to the kernels"),
    pytest.mark.skipif(library.path() is None, reason="the native library was not built"),
]


@dataclasses.dataclass(frozen=True)
class Case:
    """A norm of one shape: group norm where it has groups, else layer norm, or RMS norm."""

    shape: tuple
    axis: int | tuple
    groups: int | None = None
    subtract_mean: bool = True

    def plan(self, unknown=()):
        shape = [None if axis in unknown else extent for axis, extent in enumerate(self.shape)]
        if self.groups is None:
            return geometry.layer(shape, self.axis)
        return geometry.group(shape, self.axis, self.groups)

    def labels(self):
        if self.groups is None:
            return layer_labels(self.shape, np.ravel(self.axis))
        return group_labels(self.shape, self.axis, self.groups)

    def arrays(self, dtype="float64"):
        """x, gamma, beta and dy, of x's dtype or that of the arithmetic."""
        rng = np.random.default_rng(0)
        x, dy = rng.normal(1.0, 2.0, (2, *self.shape))
        gamma, beta = rng.uniform(0.5, 1.5, (2, *self.plan().parameter_shape))
        arithmetic = arithmetic_of(dtype)
        x, dy = (to_numpy(keras.ops.cast(a, dtype)) for a in (x, dy))
        return x, gamma.astype(arithmetic), beta.astype(arithmetic), dy

    def native(self, x, gamma, beta, activation=IDENTITY, plan=None):
        kernel = tensorflow.KERNELS[0]
        return call(kernel, plan or self.plan(), self.subtract_mean, activation)(x, gamma, beta)

    def composite(self, x, gamma, beta, activation=IDENTITY):
        kernel = composite.COMPOSITE
        return call(kernel, self.plan(), self.subtract_mean, activation)(x, gamma, beta)


CASES = {
    "group last": Case((2, 3, 4, 6), 3, 3),
    "group first": Case((2, 6, 3, 4), 1, 3),
    "group middle": Case((2, 3, 6, 5), 2, 2),
    "one group": Case((3, 4, 6), 2, 1),
    "one group first": Case((3, 6, 4), 1, 1),
    "instance": Case((2, 3, 4, 5), 3, 5),
    "dense": Case((5, 6), 1, 2),
    "layer": Case((2, 3, 7), -1),
    "layer of two axes": Case((4, 3, 5), (1, 2)),
    "layer middle": Case((2, 6, 3, 4), 1),
    "layer of two middle axes": Case((2, 3, 4, 5), (1, 2)),
    "rms": Case((2, 3, 7), -1, subtract_mean=False),
    "rms middle": Case((2, 6, 5), 1, subtract_mean=False),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
GROUP = CASES["group last"]


@dataclasses.dataclass(frozen=True)
class Fused:
    """An activation by its number, and in float64 with its derivative."""

    activation: Activation
    function: callable
    slope: callable


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def normal_cdf(z):
    return 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))


def gelu_inner(z):
    return np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))


def gelu_tanh_slope(z):
    inner = gelu_inner(z)
    steepness = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)
    return 0.5 * (1 + inner) + 0.5 * z * (1 - inner**2) * steepness


FUSED = {
    "identity": Fused(IDENTITY, lambda z: z, np.ones_like),
    "relu": Fused(Activation("leaky_relu"), lambda z: np.maximum(z, 0), lambda z: z > 0),
    "leaky relu": Fused(
        Activation("leaky_relu", 0.3),
        lambda z: np.where(z > 0, z, 0.3 * z),
        lambda z: np.where(z > 0, 1, 0.3),
    ),
    "sigmoid": Fused(Activation("sigmoid"), sigmoid, lambda z: sigmoid(z) * (1 - sigmoid(z))),
    "tanh": Fused(Activation("tanh"), np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "silu": Fused(
        Activation("silu"),
        lambda z: z * sigmoid(z),
        lambda z: sigmoid(z) * (1 + z * (1 - sigmoid(z))),
    ),
    "gelu": Fused(
        Activation("gelu"),
        lambda z: z * normal_cdf(z),
        lambda z: normal_cdf(z) + z * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi),
    ),
    "gelu tanh": Fused(
        Activation("gelu_tanh"), lambda z: 0.5 * z * (1 + gelu_inner(z)), gelu_tanh_slope
    ),
}
every_activation = pytest.mark.parametrize("fused", FUSED.values(), ids=FUSED.keys())


def arithmetic_of(dtype):
    return "float64" if dtype == "float64" else "float32"


def check(case, dtype="float32", present=(True, True), fused=FUSED["identity"]):
    """Compare y and every gradient with the reference."""
    x, gamma, beta, dy = case.arrays(dtype)
    given = [p for p, there in zip((gamma, beta), present, strict=True) if there]

    def function(x, *parameters):
        rest = iter(parameters)
        gamma, beta = (next(rest) if there else None for there in present)
        return case.native(keras.ops.cast(x, dtype), gamma, beta, fused.activation)

    y, found = gradients(function, [x, *given], dy)

    axes = case.plan().parameter_axes
    gamma, beta = (p if there else None for p, there in zip((gamma, beta), present, strict=True))
    right = Norm(x, gamma, beta, case.labels(), axes, EPSILON, case.subtract_mean)
    eps, rounding = EPS[arithmetic_of(dtype)], EPS[dtype]
    # No activation is steeper than 1.13, and none adds more than a few roundings.
    want = fused.function(right.y)
    assert_within(y, want, 1.2 * right.y_tolerance(eps) + (8 * eps + rounding) * np.abs(want), "y")

    right_gradients = right.gradients(dy * fused.slope(right.y))
    # For dy itself: where the slope is small, its error is not.
    tolerances = right.gradient_tolerances(dy, eps)
    compared = (True, *present)
    want = list(itertools.compress(right_gradients, compared))
    tolerances = list(itertools.compress(tolerances, compared))
    tolerances[0] = tolerances[0] + rounding * np.abs(want[0])
    for g, w, tolerance in zip(found, want, tolerances, strict=True):
        assert_within(g, w, tolerance, "gradient")


@every_case
@pytest.mark.parametrize("dtype", EPS)
def test_values_and_gradients(case, dtype):
    check(case, dtype)


@every_case
@pytest.mark.parametrize("present", [(True, False), (False, True), (False, False)])
def test_without_gamma_or_beta(case, present):
    check(case, present=present)


@every_activation
@pytest.mark.parametrize("name", ["group last", "layer", "layer middle", "rms"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_activations(name, fused, dtype):
    check(CASES[name], dtype, fused=fused)


@every_case
@pytest.mark.parametrize("present", [(True, True), (False, True), (False, False)])
def test_second_gradients_are_the_composites(case, present):
    compare_second_gradients(case, present, FUSED["tanh"].activation)


@every_activation
def test_second_gradients_through_activations(fused):
    compare_second_gradients(GROUP, (True, True), fused.activation)


def compare_second_gradients(case, present, activation):
    x, *parameters, dy = case.arrays()
    given = list(itertools.compress(parameters, present))

    def of(normalize):
        def function(x, *given):
            rest = iter(given)
            return normalize(x, *(next(rest) if p else None for p in present), activation)

        return second_gradients(function, [x, *given], dy, np.cos(x))

    for found, want in zip(of(case.native), of(case.composite), strict=True):
        assert_within(found, want, 1e-11 * (1 + np.abs(want).max()))


def test_second_gradients_in_half_precision():
    x, gamma, beta, dy = GROUP.arrays("float16")

    def function(x, gamma, beta):
        return keras.ops.cast(GROUP.native(keras.ops.cast(x, "float16"), gamma, beta), "float32")

    def in_single(x, gamma, beta):
        return GROUP.composite(x, gamma, beta)

    arrays = [x.astype("float32"), gamma, beta]
    found, want = (
        second_gradients(f, arrays, dy.astype("float32"), np.cos(arrays[0]))
        for f in (function, in_single)
    )
    for f, w in zip(found, want, strict=True):
        assert_within(f, w, 8 * EPS["float16"] * (1 + np.abs(w).max()))


def test_third_gradients_in_a_function():
    import tensorflow as tf

    x, gamma, beta, _ = map(tf.constant, GROUP.arrays())

    def third(normalize):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(tf.sin(normalize(x, gamma, beta)))
            for _ in range(2):
                with tf.GradientTape() as nested:
                    nested.watch(x)
                    y = tf.reduce_sum(tf.sin(normalize(x, gamma, beta)))
                y = tf.reduce_sum(tf.sin(nested.gradient(y, x)))
        return tape.gradient(y, x)

    def by_gradients(normalize):
        y = tf.reduce_sum(tf.sin(normalize(x, gamma, beta)))
        for _ in range(3):
            (slope,) = tf.gradients(y, x)
            y = tf.reduce_sum(tf.sin(slope))
        return slope

    for derivative in (third, by_gradients):
        found, want = (
            tf.function(derivative, autograph=False)(f) for f in (GROUP.native, GROUP.composite)
        )
        assert_within(found, want.numpy(), 1e-10 * (1 + np.abs(want).max()))


@pytest.mark.parametrize("name", ["group last", "group first", "layer", "layer middle", "rms"])
def test_unknown_extents_and_static_shapes(name):
    import tensorflow as tf

    case = CASES[name]
    x, gamma, beta, _ = map(tf.constant, case.arrays("float32"))
    unknown = set(range(len(case.shape))) - set(case.plan().parameter_axes)
    plan = case.plan(unknown)

    @tf.function(input_signature=[tf.TensorSpec(plan.shape)], autograph=False)
    def slopes(x):
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            y = case.native(x, gamma, beta, plan=plan)
            total = tf.reduce_sum(tf.sin(y))
        found = tape.gradient(total, [x, gamma, beta])
        for tensor, shape in zip(
            (y, *found), (x.shape, x.shape, gamma.shape, beta.shape), strict=True
        ):
            assert tensor.shape.as_list() == shape.as_list()
        return y, *found

    for count in (2, 1, 0):
        part = x[:count]
        with tf.GradientTape() as tape:
            tape.watch([part, gamma, beta])
            y = call(composite.COMPOSITE, plan, case.subtract_mean)(part, gamma, beta)
            total = tf.reduce_sum(tf.sin(y))
        want = y, *tape.gradient(total, [part, gamma, beta])
        for found, w in zip(slopes(part), want, strict=True):
            assert_within(found, w.numpy(), 1e-5)


@pytest.mark.parametrize("around", ["while_loop", "scan", "map_fn", "vectorized_map", "gather"])
def test_gradients_through(around):
    import tensorflow as tf

    x, gamma, beta, _ = map(tf.constant, GROUP.arrays())
    surround = {
        "while_loop": lambda f: tf.while_loop(
            lambda i, x: i < 3, lambda i, x: (i + 1, f(x) + 1), (tf.constant(0), x)
        )[1],
        "scan": lambda f: tf.scan(lambda x, _: f(x) + 1, tf.range(3), x),
        "map_fn": lambda f: tf.map_fn(f, tf.stack([x, 2 * x])),
        "vectorized_map": lambda f: tf.vectorized_map(f, tf.stack([x, 2 * x])),
        # Its gradient is an IndexedSlices.
        "gather": lambda f: tf.gather(f(x), [1, 0, 1]),
    }[around]

    def slope(normalize):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(tf.sin(surround(lambda x: normalize(x, gamma, beta))))
        return tape.gradient(y, x)

    want = slope(GROUP.composite).numpy()
    assert_within(slope(GROUP.native), want, 1e-11 * (1 + np.abs(want).max()))
    found = tf.function(slope, autograph=False)(GROUP.native)
    assert_within(found, want, 1e-11 * (1 + np.abs(want).max()))


@keras.saving.register_keras_serializable("test")
class Chosen(keras.Layer):
    """A norm that takes the native kernel wherever nothing speaks against it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.reasons = set()

    def call(self, x):
        native, norm = tensorflow.KERNELS[0], norm_of(geometry.group(x.shape, -1, 3), "float32")
        reason = native.why_not(norm, x)
        self.reasons.add(reason)
        return (composite.COMPOSITE if reason else native).run(norm, x, NONE)

    def reasons_of(self, work):
        """The reasons against it that `work` met, and what it returned."""
        self.reasons.clear()
        result = work()
        return set(self.reasons), result


def chosen_model(**options):
    model = keras.Sequential([keras.Input((None, 6)), Chosen(), keras.layers.Dense(2)])
    model.compile("sgd", "mse", **options)
    return model


def samples():
    return np.random.default_rng(0).normal(3, 2, (4, 5, 6)).astype("float32")


def test_xla_gets_the_composite():
    import tensorflow as tf

    layer, x = Chosen(), tf.constant(samples())
    met, want = layer.reasons_of(lambda: layer(x))
    assert met == {None}

    def slope(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.function(layer, autograph=False)(x)
            total = tf.reduce_sum(tf.sin(y))
        return y, tape.gradient(total, x)

    def looped(x):
        return tf.while_loop(lambda i, x: i < 1, lambda i, x: (i + 1, layer(x)), (0, x))[1]

    _, want_slope = slope(x)
    compiled = tf.function(slope, jit_compile=True, autograph=False)
    (met,), (y, found) = layer.reasons_of(lambda: compiled(x))
    assert "XLA" in met
    assert_within(y, want.numpy(), 1e-5)
    assert_within(found, want_slope.numpy(), 1e-4)

    compiled = tf.function(looped, jit_compile=True, autograph=False)
    (met,), y = layer.reasons_of(lambda: compiled(x))
    assert "XLA" in met
    assert_within(y, want.numpy(), 1e-5)


def test_keras_fit_takes_what_it_can():
    x, y = samples(), np.zeros((4, 5, 2), "float32")

    def losses(jit_compile):
        keras.utils.set_random_seed(0)
        model = chosen_model(jit_compile=jit_compile)
        layer = model.layers[0]
        fitted, history = layer.reasons_of(lambda: model.fit(x, y, epochs=3, verbose=0))
        predicted, _ = layer.reasons_of(lambda: model.predict(x, verbose=0))
        return history.history["loss"], fitted | predicted

    native, met = losses(jit_compile=False)
    assert met == {None}
    compiled, (reason,) = losses(jit_compile=True)
    assert "XLA" in reason
    assert_within(native, np.array(compiled), 1e-5)


def run(program, *arguments):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert not result.returncode, result.stderr
    return result.stdout


SERVE = """
import sys, numpy as np, tensorflow as tf
for folder in sys.argv[1:]:
    serve = tf.saved_model.load(folder).signatures["serving_default"]
    (y,) = serve(tf.constant(np.load(folder + "/x.npy"))).values()
    np.save(folder + "/y.npy", y)
assert "normwise" not in sys.modules
"""


def test_exports_run_without_normwise(tmp_path):
    """Whatever was traced before, and by each way that leads to a SavedModel."""
    import tensorflow as tf

    x, model = samples(), chosen_model()
    layer = model.layers[0]
    met, want = layer.reasons_of(lambda: model.predict(x, verbose=0))
    assert met == {None}
    called = tf.function(model, autograph=False, input_signature=[tf.TensorSpec((None, 5, 6))])
    met, _ = layer.reasons_of(lambda: called(x))
    assert met == {None}

    def concrete():
        fresh = tf.function(lambda x: model(x), autograph=False)
        return fresh.get_concrete_function(tf.TensorSpec((None, 5, 6)))

    ways = {
        "keras": lambda folder: model.export(folder, verbose=False),
        "function": lambda folder: tf.saved_model.save(model, folder, signatures=called),
        "concrete": lambda folder: tf.saved_model.save(model, folder, signatures=concrete()),
    }
    for name, save in ways.items():
        folder = tmp_path / name
        met, _ = layer.reasons_of(lambda save=save, folder=folder: save(str(folder)))
        assert all("exported" in reason for reason in met), name
        assert met, name
        np.save(folder / "x.npy", x)
    run(SERVE, *(tmp_path / name for name in ways))
    for name in ways:
        assert_within(np.load(tmp_path / name / "y.npy"), want, 1e-5, name)


TWO_DEVICES = """
import keras, numpy as np, tensorflow as tf
cpu = tf.config.LogicalDeviceConfiguration()
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], [cpu] * 2)
import normwise
from normwise.kernels import tensorflow

calls = []
native = tensorflow._native
tensorflow._native = lambda: calls.append(1) or native()

def trained(strategy):
    keras.utils.set_random_seed(0)
    with strategy.scope():
        norms = [
            normwise.layers.GroupNormalization(groups=3, activation="relu"),
            normwise.layers.LayerNormalization(activation="gelu"),
        ]
        model = keras.Sequential([keras.Input((5, 6)), *norms, keras.layers.Dense(2)])
        model.compile("sgd", "mse", jit_compile=False)
    before = model.get_weights()
    x = np.random.default_rng(0).normal(size=(8, 5, 6)).astype("float32")
    model.fit(x, x[..., :2], epochs=3, batch_size=4, shuffle=False, verbose=0)
    assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(before, model.get_weights()))
    return model.get_weights()

one = trained(tf.distribute.get_strategy())
calls.clear()
two = trained(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))
assert len(calls) >= 8, calls  # two passes of two layers in two replicas
print(all(np.abs(a - b).max() < 1e-6 for a, b in zip(one, two)))
"""


def test_two_devices_train_as_one():
    assert run(TWO_DEVICES).split()[-1] == "True"


def test_other_devices_get_the_composite():
    def why_not(device):
        x = types.SimpleNamespace(device=device)
        return tensorflow.KERNELS[0].why_not(norm_of(GROUP.plan(), "float32"), x)

    assert why_not("/job:w/device:CPU:1") is None
    assert "GPU:0" in why_not("/job:w/device:GPU:0")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": np.zeros((2, 6), "float32")}, "rank of at least channels_end"),
        ({"groups": 4}, "groups must divide the channels"),
        ({"groups": 0}, "groups must be at least 1"),
        ({"gamma": np.zeros(5, "float32")}, "one element per channel"),
        ({"beta": np.zeros(7, "float32")}, "one element per channel"),
        ({"before_end": 4}, "before_end < channels_end"),
        ({"outer_end": -1}, "0 <= outer_end"),
        ({"keeps_after": True}, "keeps_after needs"),
        ({"epsilon": -1e-3}, "epsilon must be a finite number"),
        ({"epsilon": math.nan}, "epsilon must be a finite number"),
        ({"activation": 7}, "none of enum NormwiseActivation"),
        ({"activation": -1}, "none of enum NormwiseActivation"),
        ({"size": 2**32}, "the norm is of another version of normwise"),
        ({"size": 4}, "the norm is of another version of normwise"),
        ({"norm": b"short"}, "the norm is of another version of normwise"),
        ({"dy": np.zeros((1, 3, 4, 6), "float32")}, "dy must have the shape of x"),
        ({"statistics": np.zeros((2, 3), "float32")}, "those of the forward pass"),
        ({"residual": np.zeros((1, 3, 4, 6), "float32")}, "residual and dsum must have the shape"),
        ({"dsum": np.zeros((2, 3, 4, 5), "float32")}, "residual and dsum must have the shape"),
        ({"per_sample": 1}, "one element per channel .and sample, where they have their own"),
        ({"per_sample": 1, "outer_end": 0}, "per_sample needs axis 0 to belong to outer"),
    ],
)
def test_ops_refuse_what_does_not_fit(changed, message):
    import tensorflow as tf

    x, gamma, beta, dy = GROUP.arrays("float32")
    ops = tensorflow._native()
    described = cpu.describe(norm_of(GROUP.plan(), "float32"))
    changed = dict(changed)
    for name in dict(described._fields_).keys() & changed.keys():
        setattr(described, name, changed.pop(name))
    inputs = {"x": x, "gamma": gamma, "beta": beta, "norm": bytes(described)}
    absent = np.zeros(0, "float32")
    if changed.keys() & {"dy", "statistics", "dsum"}:
        op = ops.normwise_backward
        inputs |= {"dy": dy, "statistics": np.zeros((2, 2, 3), "float32"), "dsum": absent}
    else:
        op = ops.normwise_forward
        inputs |= {"residual": absent}
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        op(**(inputs | changed))


@every_case
@every_activation
def test_a_description_tells_the_norm(case, fused):
    norm = norm_of(case.plan(), "float32", NONE, case.subtract_mean, fused.activation)
    described = bytes(cpu.describe(norm))
    same = cpu.norm_of(described, case.shape, "float32", has_gamma=False, has_beta=False)
    assert bytes(cpu.describe(same)) == described
    assert same.of(norm.geometry) == norm
    assert same.geometry.extents == norm.geometry.extents
    assert same.geometry.set_axes == norm.geometry.set_axes


def test_the_library_loads_without_tensorflow():
    program = (
        "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]);"
        "library.normwise_instructions.restype = ctypes.c_char_p;"
        "print(library.normwise_instructions().decode(), 'tensorflow' in sys.modules)"
    )
    assert run(program, library.path()).split()[-1] == "False"
