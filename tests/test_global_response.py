"""GlobalResponseNormalization: values, gradients, masks, dtypes, training and files.

The reference is the formula in float64 NumPy, with its gradients. A right value is off by a few
roundings of each of its terms, and sqrt(n) more for the sum of n squares.
"""

import copy
import json
import re

import keras
import numpy as np
import pytest
from frameworks import (
    BACKEND,
    allow_torch_compile,
    assert_within,
    compiled,
    float64_enabled,
    gradients,
    second_gradients,
    to_numpy,
)
from norms import randomize, samples
from reference import EPS

from normwise.layers import GlobalResponseNormalization

KEEP = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]], bool)


class Response:
    """y = gamma * x * n + beta + x with n = g / (mean(g) + epsilon), in float64."""

    def __init__(self, x, gamma, beta, axis=-1, epsilon=1e-6, keep=True):
        self.x, self.keep = np.asarray(x, np.float64), keep
        self.channel = axis % self.x.ndim
        self.positions = tuple(a for a in range(1, self.x.ndim) if a != self.channel)
        self.count = np.prod([self.x.shape[a] for a in self.positions])
        self.gamma, self.beta = (self.spread(p) for p in (gamma, beta))
        kept = np.where(keep, self.x, 0)
        self.g = np.sqrt((kept**2).sum(self.positions, keepdims=True))
        divisor = self.g.mean(self.channel, keepdims=True) + epsilon
        self.divisor = np.where(divisor == 0, 1, divisor)
        self.n = self.g / self.divisor
        self.y = self.gamma * self.x * self.n + self.beta + self.x

    def spread(self, parameter):
        shape = [-1 if a == self.channel else 1 for a in range(self.x.ndim)]
        return np.asarray(parameter, np.float64).reshape(shape)

    def gather(self, values):
        return values.sum(tuple(a for a in range(self.x.ndim) if a != self.channel))

    def gradients(self, dy, size=lambda values: values):
        """The gradients of sum(y * dy) by x, gamma and beta; of `size` np.abs their terms."""
        dy = np.asarray(dy, np.float64)
        dn = size(dy * self.gamma * self.x).sum(self.positions, keepdims=True)
        shared = (dn * self.n).mean(self.channel, keepdims=True)
        dg = dn + shared if size is np.abs else dn - shared
        slope = np.divide(self.x, self.g, out=np.zeros_like(self.x), where=self.g > 0)
        through = size(np.where(self.keep, slope, 0)) * dg / self.divisor
        dx = size(dy) * size(self.gamma * self.n) + size(dy) + through
        if size is not np.abs:
            dx = dy * (self.gamma * self.n + 1) + through
        return dx, self.gather(size(dy * self.x * self.n)), self.gather(size(dy))

    def roundings(self, eps):
        return eps * (32 + np.sqrt(self.count))

    def y_tolerance(self, eps):
        terms = np.abs(self.gamma * self.x * self.n) + np.abs(self.beta) + np.abs(self.x)
        return self.roundings(eps) * terms

    def gradient_tolerances(self, dy, eps):
        return [self.roundings(eps) * terms for terms in self.gradients(dy, np.abs)]


def made(x, **options):
    """A layer built on x with weights that no initializer gives, and the reference's reading."""
    layer = GlobalResponseNormalization(**options)
    layer.build((None, *x.shape[1:]))
    return randomize(layer)


def expected(layer, x, keep=True):
    gamma, beta = (to_numpy(w) for w in (layer.gamma, layer.beta))
    return Response(x, gamma, beta, layer.axis, layer.epsilon, keep)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((4, 6), -1),
        ((2, 5, 6), [2]),
        ((2, 6, 5), 1),
        ((2, 3, 4, 6), -1),
        ((2, 6, 3, 4), -3),
        ((2, 3, 6, 4), 2),
        ((2, 3, 2, 4, 6), 4),
    ],
)
def test_output_and_gradients_of_every_rank_and_axis(shape, axis):
    x, dy = samples(shape) - 2, samples(shape, seed=1) - 3
    layer = made(x, axis=axis)
    right = expected(layer, x)

    def call(x, *weights):
        return layer.stateless_call(weights, [], x)[0]

    y, found = gradients(call, [x, *(to_numpy(w) for w in layer.weights)], dy)
    assert_within(y, right.y, right.y_tolerance(EPS["float32"]), "y")
    tolerances = right.gradient_tolerances(dy, EPS["float32"])
    wanted = right.gradients(dy)
    for name, *each in zip(("dx", "dgamma", "dbeta"), found, wanted, tolerances, strict=True):
        assert_within(*each, name)


def test_second_gradients():
    """Along a direction, against the difference of the reference's gradients to either side."""
    x, dy, direction, step = (samples((2, 5, 6), seed=seed) - 3 for seed in range(4))
    layer = made(x)
    weights = [to_numpy(w) for w in layer.weights]

    def slope(t):
        dx, *_ = Response(x + t * step.astype("float64"), *weights).gradients(dy)
        return (dx * direction).sum()

    found, *_ = second_gradients(
        lambda x: layer.stateless_call(weights, [], x)[0], [x], dy, direction
    )
    wanted = (slope(1e-4) - slope(-1e-4)) / 2e-4
    assert abs(wanted) > 1
    assert_within((found * step).sum(), wanted, 1e-5 * np.abs(found * step).sum())


def test_weights_are_zeros_and_the_output_is_the_input():
    layer, x = GlobalResponseNormalization(), samples((2, 3, 4, 6))
    np.testing.assert_array_equal(to_numpy(layer(x)), x)
    assert [(w.name, tuple(w.shape)) for w in layer.trainable_weights] == [
        ("gamma", (6,)),
        ("beta", (6,)),
    ]
    assert not any(to_numpy(w).any() for w in layer.weights)


@pytest.mark.parametrize("epsilon", [1e-6, 0.0])
def test_zeros_have_finite_gradients(epsilon):
    """A channel of zeros in one sample, and a sample of nothing else."""
    x, dy = samples((3, 5, 6)), samples((3, 5, 6), seed=1)
    x[0, :, 2], x[1] = 0, 0
    layer = made(x, epsilon=epsilon)
    weights = [to_numpy(w) for w in layer.weights]
    y, (dx,) = gradients(lambda x: layer.stateless_call(weights, [], x)[0], [x], dy)
    right = expected(layer, x)
    assert_within(y, right.y, right.y_tolerance(EPS["float32"]))
    assert_within(dx[[0, 2]], right.gradients(dy)[0][[0, 2]], 1e-4)
    np.testing.assert_array_equal(dx[1], dy[1])


@pytest.mark.parametrize("mask", [KEEP, KEEP[..., None], KEEP[:1]], ids=["time", "whole", "one"])
def test_masked_positions_leave_the_norms(mask):
    x, dy = samples(), samples(seed=1) - 3
    layer = made(x)
    right = expected(layer, x, mask if mask.ndim == 3 else mask[..., None])
    weights = [to_numpy(w) for w in layer.weights]

    def call(x, *weights):
        return layer.stateless_call(weights, [], x, mask=mask)[0]

    y, found = gradients(call, [x, *weights], dy)
    assert_within(y, right.y, right.y_tolerance(EPS["float32"]))
    tolerances = right.gradient_tolerances(dy, EPS["float32"])
    for each in zip(found, right.gradients(dy), tolerances, strict=True):
        assert_within(*each)


def test_masked_nan_reaches_no_kept_value_and_no_gradient():
    x, dy = samples(), np.where(KEEP[..., None], samples(seed=1), 0).astype("float32")
    layer = made(x)
    weights = [to_numpy(w) for w in layer.weights]

    def call(x, *weights):
        return layer.stateless_call(weights, [], x, mask=KEEP)[0]

    plain = gradients(call, [x, *weights], dy)
    spoilt = gradients(call, [np.where(KEEP[..., None], x, np.nan), *weights], dy)
    np.testing.assert_array_equal(spoilt[0][KEEP], plain[0][KEEP])
    for found, wanted in zip(spoilt[1], plain[1], strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_nan_stays_in_its_sample():
    x = samples()
    layer = made(x)
    clean = to_numpy(layer(x))
    x[0, 1, 2] = np.nan
    y = to_numpy(layer(x))
    assert np.isnan(y[0]).all()
    np.testing.assert_array_equal(y[1], clean[1])


def test_masking_layer_in_a_model():
    x = np.where(KEEP[..., None], samples(), 0)
    layer = made(x)
    model = keras.Sequential([keras.Input((5, 6)), keras.layers.Masking(), layer])
    right = expected(layer, x, KEEP[..., None])
    y = model(x)
    assert_within(to_numpy(y), right.y, right.y_tolerance(EPS["float32"]))
    np.testing.assert_array_equal(to_numpy(y._keras_mask), KEEP)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "bool"])
def test_dtypes(policy, dtype):
    with float64_enabled():
        x = samples() > 3 if dtype == "bool" else samples().astype(dtype)
        layer = made(x, dtype=policy)
        y, result = layer(x), keras.DTypePolicy(policy).compute_dtype
        assert keras.backend.standardize_dtype(y.dtype) == result
        assert {w.dtype for w in layer.weights} == {keras.DTypePolicy(policy).variable_dtype}
        right = expected(layer, x.astype("float64"))
        tolerance = right.y_tolerance(EPS["float64" if policy == "float64" else "float32"])
        assert_within(to_numpy(y), right.y, tolerance + 2 * EPS[result] * np.abs(right.y))


def test_squares_that_float16_cannot_hold():
    x = (samples() * 100).astype("float16")
    layer = made(x, dtype="mixed_float16")
    right = expected(layer, x)
    assert x.max().astype("float64") ** 2 > np.finfo("float16").max
    assert_within(to_numpy(layer(x)), right.y, 2 * EPS["float16"] * np.abs(right.y))


def test_dynamic_extents():
    inputs = keras.Input((6, None, None), dtype="float16")
    layer = GlobalResponseNormalization(axis=1, dtype="mixed_bfloat16")
    model = keras.Model(inputs, layer(inputs))
    assert (model.output.shape, model.output.dtype) == ((None, 6, None, None), "bfloat16")
    for shape in [(2, 6, 3, 4), (1, 6, 5, 1)]:
        assert to_numpy(model(samples(shape))).shape == shape


@pytest.mark.skipif(BACKEND != "tensorflow", reason="extents unknown to the graph")
@pytest.mark.parametrize("jit_compile", [True, False])
def test_tensorflow_graph_of_unknown_extents(jit_compile):
    import tensorflow as tf

    x = samples((2, 3, 4, 6))
    layer = made(x)
    spec = [tf.TensorSpec([None, None, None, 6])]
    function = tf.function(layer, jit_compile=jit_compile, input_signature=spec)
    right = expected(layer, x)
    assert_within(function(x).numpy(), right.y, right.y_tolerance(EPS["float32"]))


def test_stateless_call_compiled():
    layer = made(samples())
    weights = [to_numpy(w) for w in layer.weights]
    y, state = compiled(lambda w, x: layer.stateless_call(w, [], x))(weights, samples())
    assert state == []
    right = expected(layer, samples())
    assert_within(to_numpy(y), right.y, right.y_tolerance(EPS["float32"]))


@pytest.mark.parametrize("jit_compile", [True, False])
def test_fit_moves_every_weight(jit_compile):
    allow_torch_compile(jit_compile)
    layer = GlobalResponseNormalization()
    model = keras.Sequential([keras.Input((None, 6)), layer, keras.layers.Dense(1)])
    model.compile("adam", "mse", jit_compile=jit_compile)
    model.fit(samples((4, 5, 6)), np.ones((4, 5, 1)), verbose=0)
    for weight in layer.get_weights():
        assert (np.abs(weight) > 1e-5).all()


def test_constraints_and_regularizers_reach_the_weights():
    limit, square = keras.constraints.MaxNorm(0.1), keras.regularizers.L2(0.5)
    layer = GlobalResponseNormalization(
        gamma_initializer="ones",
        gamma_constraint=limit,
        gamma_regularizer=square,
        beta_initializer="ones",
        beta_regularizer=square,
    )
    layer.build((None, 5, 6))
    assert layer.gamma.constraint is limit
    np.testing.assert_allclose([to_numpy(loss) for loss in layer.losses], [3.0, 3.0])


FULL = {
    "epsilon": 1e-2,
    "axis": 1,
    "gamma_initializer": keras.initializers.RandomNormal(seed=1),
    "beta_regularizer": keras.regularizers.L2(0.1),
    "gamma_constraint": keras.constraints.NonNeg(),
    "name": "n",
    "dtype": "mixed_bfloat16",
}


@pytest.mark.parametrize("options", [{}, FULL], ids=["default", "full"])
def test_config_round_trip(options):
    layer = GlobalResponseNormalization(**options)
    config = layer.get_config()
    json.dumps(config)
    again = GlobalResponseNormalization.from_config(copy.deepcopy(config))
    assert again.get_config() == config
    assert {k: config[k] for k in ("epsilon", "axis")} == {
        "epsilon": options.get("epsilon", 1e-6),
        "axis": options.get("axis", -1),
    }
    name = "normwise>GlobalResponseNormalization"
    assert keras.saving.get_registered_name(GlobalResponseNormalization) == name


@pytest.mark.parametrize("suffix", ["keras", "h5"])
# Of Keras, that the format is an old one.
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_a_model_that_was_saved_predicts_the_same(suffix, tmp_path):
    inputs = keras.Input((5, 6))
    model = keras.Model(inputs, GlobalResponseNormalization(axis=[1])(inputs))
    randomize(model.layers[-1])
    model.save(tmp_path / f"model.{suffix}")
    loaded = keras.models.load_model(tmp_path / f"model.{suffix}")
    x = samples()
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(model(x)))


def test_empty_batch():
    y = GlobalResponseNormalization()(np.zeros((0, 5, 6), "float32"))
    assert to_numpy(y).shape == (0, 5, 6)


def raises(error, text):
    return pytest.raises(error, match=re.escape(text))


def test_what_is_wrong_is_said():
    layer = GlobalResponseNormalization
    with raises(TypeError, "axis='1' is no axis; expected an int, or a list or tuple of ints"):
        layer(axis="1")
    with raises(ValueError, "axis=[1, 2] names 2 axes, but the channels lie on one; use axis=2"):
        layer(axis=[1, 2])
    with raises(ValueError, "axis=0 is the batch axis"):
        layer(axis=0)
    with raises(ValueError, "epsilon=-1 cannot be added"):
        layer(epsilon=-1)
    with raises(ValueError, "axis=3 is out of range for shape (2, 5, 6) of rank 3"):
        layer(axis=3)(samples())
    with raises(ValueError, "the number of channels on axis -1 of shape (None, 5, None)"):
        layer()(keras.Input((5, None)))
    with raises(ValueError, "mask has shape (2, 4), which does not fit x of shape (2, 5, 6)"):
        layer()(samples(), mask=np.ones((2, 4), bool))
    with raises(ValueError, "mask has shape (None, 4), which does not fit x of shape"):
        layer()(keras.Input((5, 6)), mask=keras.Input((4,), dtype="bool"))
    with raises(TypeError, "x has dtype complex64, and no norm is defined on complex numbers"):
        layer()(keras.Input((5, 6), dtype="complex64"))


def test_it_keeps_to_the_rank_and_channels_it_was_built_on():
    layer = made(samples())
    with raises(ValueError, "expected ndim=3, found ndim=4"):
        layer(samples((2, 5, 5, 6)))
    with raises(ValueError, "expected axis -1 of input shape to have value 6"):
        layer(samples((2, 5, 8)))
