"""The norms as functions: what they take, what they give, and their place in functional models."""

import keras
import numpy as np
import pytest
from frameworks import BACKEND, assert_within, compiled, float64_enabled, gradients, to_numpy
from norms import NORMS, every_norm, expected, samples

import normwise
from normwise import ops

EPS = np.finfo(np.float32).eps
GAMMA = np.linspace(0.5, 1.5, 6, dtype="float32")
BETA = np.linspace(-1.0, 1.0, 6, dtype="float32")


def call(norm, x, gamma=None, beta=None, **options):
    options = {**norm.options, **options}
    return norm.op(x, gamma, beta, **options)


def reference(norm, x, gamma=None, beta=None, keep=None):
    """The reference's reading of the same call, by way of the layer of the same options."""
    layer = norm.make(scale=False, **({} if len(norm.weights) == 1 else {"center": False}))
    layer.gamma, layer.beta = gamma, beta
    return expected(layer, x, keep)


@every_norm
@pytest.mark.parametrize("gamma", [None, GAMMA], ids=["", "gamma"])
@pytest.mark.parametrize("beta", [None, BETA], ids=["", "beta"])
def test_output_and_gradients_with_and_without_gamma_and_beta(norm, gamma, beta):
    x, dy = samples(), samples(seed=9)
    given = [p for p in (gamma, beta) if p is not None]

    def function(x, *parameters):
        parameters = iter(parameters)
        g, b = (p if p is None else next(parameters) for p in (gamma, beta))
        return call(norm, x, g, b)

    right = reference(norm, x, gamma, beta)
    y, (dx, *rest) = gradients(function, [x, *given], dy)
    assert_within(y, right.y, right.y_tolerance(EPS), "y")
    names = [n for n, p in (("gamma", gamma), ("beta", beta)) if p is not None]
    wanted = dict(zip(("x", "gamma", "beta"), right.gradients(dy), strict=True))
    allowed = dict(zip(("x", "gamma", "beta"), right.gradient_tolerances(dy, EPS), strict=True))
    for name, found in zip(["x", *names], [dx, *rest], strict=True):
        assert_within(found, wanted[name], allowed[name], f"d{name}")


@every_norm
def test_every_array_may_be_a_list(norm):
    x = samples()
    keep = np.arange(10).reshape(2, 5) % 3 > 0
    lists = call(norm, x.tolist(), GAMMA.tolist(), BETA.tolist(), mask=keep.tolist())
    arrays = call(norm, x, GAMMA, BETA, mask=keep)
    assert_within(to_numpy(lists), to_numpy(arrays), 1e-5)


@every_norm
@pytest.mark.parametrize("given", ["int32", "uint8", "bool"])
def test_integers_are_never_truncated(norm, given):
    x = (samples() > 3) if given == "bool" else samples().clip(0).astype(given)
    y = call(norm, x)
    right = reference(norm, x.astype(np.float64))
    assert keras.backend.standardize_dtype(y.dtype) == "float32"
    assert_within(to_numpy(y), right.y, right.y_tolerance(EPS))


@every_norm
@pytest.mark.parametrize(
    ("given", "dtype", "result"),
    [
        ("float16", None, "float16"),
        ("bfloat16", None, "bfloat16"),
        ("float16", "float32", "float32"),
        ("float32", "float16", "float16"),
        ("float32", "bfloat16", "bfloat16"),
        ("int32", "float16", "float16"),
        ("float64", None, "float64"),
        ("float32", "float64", "float64"),
        ("float64", "float32", "float32"),
    ],
)
def test_dtype_of_the_result(norm, given, dtype, result):
    with float64_enabled():
        x = keras.ops.cast(samples(), given)
        y = call(norm, x, GAMMA, BETA, dtype=dtype)
        assert keras.backend.standardize_dtype(y.dtype) == result
        right = reference(norm, to_numpy(x), GAMMA, BETA)
        rounding = {"float16": 2**-11, "bfloat16": 2**-8, "float32": EPS}.get(result, 2**-52)
        # Arithmetic is in float32 whatever is narrower: one rounding on the way out.
        arithmetic = 2**-52 if "float64" in (given, result) else EPS
        tolerance = right.y_tolerance(arithmetic) + rounding * np.abs(right.y)
        assert_within(to_numpy(y), right.y, tolerance)


@every_norm
@pytest.mark.parametrize("activation", ["relu", keras.activations.tanh])
def test_activation_is_applied_to_the_result(norm, activation):
    x = samples()
    plain = to_numpy(call(norm, x, GAMMA, BETA))
    active = to_numpy(call(norm, x, GAMMA, BETA, activation=activation))
    function = np.tanh if callable(activation) else lambda y: np.maximum(y, 0)
    assert_within(active, function(plain), 1e-6)


def symbolic_model(norm):
    """Everything symbolic: x, gamma, beta and mask."""
    x = keras.Input((None, 6), name="x")
    gamma = keras.Input(batch_shape=(6,), name="gamma")
    beta = keras.Input(batch_shape=(6,), name="beta")
    mask = keras.Input((None,), dtype="bool", name="mask")
    y = call(norm, x, gamma, beta, mask=mask, activation="relu")
    assert isinstance(y, keras.KerasTensor)
    assert y.shape == (None, None, 6)
    return keras.Model([x, gamma, beta, mask], y)


@every_norm
def test_symbolic_tensors_save_and_load(norm, tmp_path):
    x, keep = samples(), np.arange(10).reshape(2, 5) % 3 > 0
    model = symbolic_model(norm)
    arguments = [keras.ops.convert_to_tensor(a) for a in (x, GAMMA, BETA, keep)]
    found = to_numpy(model(arguments))
    right = reference(norm, x, GAMMA, BETA, keep[..., None])
    assert_within(found, np.maximum(right.y, 0), right.y_tolerance(EPS))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(loaded(arguments)), found)


@every_norm
def test_an_op_with_constant_parameters_saves_and_loads(norm, tmp_path):
    x = keras.Input((5, 6))
    where = {"axis": 2} if norm in (NORMS["group"], NORMS["instance"]) else {"axis": (2,)}
    y = call(norm, x, GAMMA, epsilon=1e-2, dtype="float16", **where)
    assert y.dtype == "float16"
    model = keras.Model(x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(loaded(samples())), to_numpy(model(samples())))


@every_norm
def test_compiled_is_the_same(norm):
    x = samples()
    function = compiled(lambda x: call(norm, x, GAMMA, BETA))
    right = reference(norm, x, GAMMA, BETA)
    found = to_numpy(function(keras.ops.convert_to_tensor(x)))
    assert_within(found, right.y, right.y_tolerance(EPS))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="extents unknown to the graph")
@pytest.mark.parametrize("axis", [[2], [1], [1, 2]])
@pytest.mark.parametrize("op", [ops.layer_norm, ops.rms_norm])
def test_tensorflow_graph_of_unknown_extents(op, axis):
    import tensorflow as tf

    x = samples()
    gamma = np.ones([x.shape[a] for a in axis], "float32")
    function = tf.function(
        lambda x, gamma: op(x, gamma, axis=axis),
        input_signature=[tf.TensorSpec([None] * 3), tf.TensorSpec([None] * len(axis))],
    )
    np.testing.assert_allclose(function(x, gamma), op(x, gamma, axis=axis), atol=1e-6)


@pytest.mark.skipif(BACKEND != "jax", reason="JAX's symbolic shapes")
@every_norm
@pytest.mark.parametrize("axis", [2, 1])
def test_jax_export_of_symbolic_extents(norm, axis):
    import jax
    from jax import export

    symbols = export.symbolic_shape("batch, height, 6" if axis == 2 else "batch, 6, height")
    spec = jax.ShapeDtypeStruct(symbols, "float32")
    exported = export.export(jax.jit(lambda x: call(norm, x, axis=axis)))(spec)
    x = samples((3, 7, 6)) if axis == 2 else samples((3, 6, 7))
    assert_within(exported.call(x), to_numpy(call(norm, x, axis=axis)), 1e-5)


def test_a_set_of_one_element_divides_by_it_alone():
    """Filter response norm of (batch, 1), whose set is all of gamma's axes, subtracts no mean."""
    x = np.array([[3.0], [-2.0]], "float32")
    for mode in ("auto", "composite"):
        with normwise.use_kernels(mode):
            y = to_numpy(ops.filter_response_norm(x, axis=()))
        assert_within(y, np.sign(x), 1e-5)


def test_a_wrong_axis_is_one_after_a_right_one_too():
    x = samples((2, 3, 4))
    ops.layer_norm(x, axis=(1, 2))
    for wrong in ((1.0, 2), (True, 2)):
        with pytest.raises(TypeError, match="is no axis; expected an int"):
            ops.layer_norm(x, axis=wrong)


def test_an_op_with_options_of_other_libraries_saves_and_loads(tmp_path):
    """NumPy's int as an axis, and a framework's own dtype."""
    x = samples((2, 5, 6))
    inputs = keras.Input(x.shape[1:])
    dtype = keras.ops.convert_to_tensor(x).dtype
    outputs = ops.layer_norm(inputs, axis=np.int64(1), dtype=dtype)
    model = keras.Model(inputs, outputs)
    want = model.predict(x, verbose=0)
    for suffix in ("keras", "h5"):
        model.save(tmp_path / f"model.{suffix}")
        loaded = keras.saving.load_model(tmp_path / f"model.{suffix}")
        assert_within(loaded.predict(x, verbose=0), want, 1e-6)
