"""WeightStandardization: every kind of layer against float64 NumPy, training, files, errors."""

import copy
import json
import re

import keras
import numpy as np
import pytest
from frameworks import float64_enabled, to_numpy
from test_wrappers import (
    KINDS,
    RELATED,
    check_fit_save_reload_and_remove,
    close,
    compare,
    dtype_of,
    dtype_policy,
    kernels_of,
    randomized,
    samples,
    ways_to_fit,
    wrapped_gradients,
)

from normwise.layers import WeightStandardization

# The axes over which an output's weights are spread.
INPUT_AXES = {
    "dense": [(0,)],
    "conv2d": [(0, 1, 2)],
    "transposed": [(0, 1, 3)],
    "depthwise": [(0, 1)],
    "separable": [(0,), (0, 1)],
    "einsum": [(0,)],
    "recurrent": [(0,)],
}
GAINS = {
    "dense": [(4,)],
    "conv2d": [(4,)],
    "transposed": [(4,)],
    "depthwise": [(3, 2)],
    "separable": [(3, 2), (4,)],
    "einsum": [(2, 4)],
    "recurrent": [(4,)],
    "conv1d": [(4,)],
    "conv3d": [(4,)],
    "conv1d_transpose": [(4,)],
    "conv3d_transpose": [(4,)],
    "depthwise1d": [(3, 1)],
    "separable2d": [(3, 1), (4,)],
    "lstm": [(16,)],
    "gru": [(12,)],
}
GAMMA = 1.7128585504496627


class Standardized:
    """The kernel and its gradients, in float64."""

    def __init__(self, w, axes, epsilon=1e-6, gain=None, gamma=1.0):
        self.axes = axes
        fan_in = np.prod([w.shape[a] for a in axes])
        self.gamma = gamma / np.sqrt(fan_in) if gain is not None else 1.0
        gain = np.ones(()) if gain is None else np.expand_dims(gain, axes)
        self.scale = gain * self.gamma
        deviation = w - self.mean(w)
        self.root = np.sqrt(self.mean(deviation**2) + epsilon)
        self.normalized = deviation / self.root
        self.kernel = self.scale * self.normalized

    def mean(self, values):
        return values.mean(self.axes, keepdims=True)

    def gradients(self, dk):
        h = dk * self.scale
        dw = h - self.mean(h) - self.normalized * self.mean(h * self.normalized)
        return dw / self.root, (dk * self.gamma * self.normalized).sum(self.axes)


def gains_of(layer):
    return layer.gain if isinstance(layer.gain, list) else [layer.gain]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_and_its_gradients(kind, scaled):
    make, shape, *_ = KINDS[kind]
    with float64_enabled(), dtype_policy(dtype_of(kind)):
        options = {"scaled": True, "gamma": GAMMA} if scaled else {}
        layer = WeightStandardization(make(), epsilon=1e-3, **options)
        layer.build(shape)
        randomized(layer)
        kernels = kernels_of(layer)
        gains = gains_of(layer) if scaled else [None] * len(kernels)
        references = [
            Standardized(
                to_numpy(w).astype("float64"),
                axes,
                1e-3,
                None if gain is None else to_numpy(gain).astype("float64"),
                GAMMA,
            )
            for w, axes, gain in zip(kernels, INPUT_AXES[kind], gains, strict=True)
        ]
        gain_of = {id(w): gain for w, gain in zip(kernels, gains, strict=True)}

        def chained(reference, kernel, dk):
            dw, dgain = reference.gradients(dk)
            return {id(kernel): dw, **({id(gain_of[id(kernel)]): dgain} if scaled else {})}

        compare(layer, kind, True, references, chained)


@pytest.mark.parametrize("kind", GAINS)
def test_weights_and_shapes(kind):
    make, shape, *_ = {**KINDS, **RELATED}[kind]
    layer = WeightStandardization(make(), scaled=True, gain_initializer="zeros")
    symbol = layer(keras.Input(shape[1:]))
    assert symbol.shape[1:] == tuple(layer.layer.compute_output_shape(shape))[1:]
    gains = gains_of(layer)
    assert [tuple(gain.shape) for gain in gains] == GAINS[kind]
    assert [gain.name for gain in gains] == [
        f"{prefix}gain" for prefix in (("depthwise_", "pointwise_") if len(gains) == 2 else ("",))
    ]
    assert layer.trainable_weights[: len(gains)] == gains
    assert not any(to_numpy(gain).any() for gain in gains)
    plain = WeightStandardization(make())
    plain.build(shape)
    assert plain.gain is None
    assert plain.weights == plain.layer.weights


def test_each_output_has_mean_0_and_variance_1():
    layer = WeightStandardization(keras.layers.Conv2D(4, 3))
    layer.build((2, 8, 8, 3))
    layer.layer.kernel.assign(to_numpy(layer.layer.kernel) * 100 + 7)
    kernel = to_numpy(layer.remove().kernel)
    np.testing.assert_allclose(kernel.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(kernel.var((0, 1, 2)), 1, rtol=1e-5)


def test_a_kernel_far_from_zero_keeps_its_digits():
    """At mean 1e4 and deviation 1, squares would keep none."""
    layer = WeightStandardization(keras.layers.Dense(4))
    layer.build((2, 64))
    layer.layer.kernel.assign(samples((64, 4)) + 1e4)
    wanted = Standardized(to_numpy(layer.layer.kernel).astype("float64"), (0,)).kernel
    close(to_numpy(layer.remove().kernel), wanted, "kernel", 1e-5)


@pytest.mark.parametrize("epsilon", [1e-6, 0.0])
def test_equal_weights_become_zeros(epsilon):
    layer = WeightStandardization(
        keras.layers.Dense(4, kernel_initializer=keras.initializers.Constant(0.1)), epsilon=epsilon
    )
    x = samples((5, 3))
    layer.build(x.shape)
    y, dx, found = wrapped_gradients(layer, x, np.ones((5, 4), "float32"), True)
    assert not y.any()
    assert all(np.isfinite(d).all() for d in [dx, *found.values()])


@ways_to_fit
def test_fit_save_reload_and_remove(jit_compile, tmp_path):
    first = WeightStandardization(
        keras.layers.Conv1D(4, 2, activation="relu"), scaled=True, gamma=GAMMA, name="first"
    )
    last = WeightStandardization(keras.layers.Dense(2), epsilon=1e-3, name="last")
    check_fit_save_reload_and_remove(first, last, jit_compile, tmp_path)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16"])
def test_dtypes(policy):
    layer = WeightStandardization(keras.layers.Dense(4, dtype=policy), scaled=True, dtype=policy)
    x = samples((5, 3))
    symbol = layer(keras.Input((3,)))
    # Of which float16 could not hold the squares.
    layer.layer.kernel.assign(to_numpy(layer.layer.kernel) * 1e4)
    y = layer(x)
    compute = keras.DTypePolicy(policy).compute_dtype
    assert symbol.dtype == compute
    assert keras.backend.standardize_dtype(y.dtype) == compute
    wanted = Standardized(to_numpy(layer.layer.kernel).astype("float64"), (0,), gain=np.ones(4))
    # The rounding of the kernel, and those of x and of the product.
    tolerance = 8 * (2**-8 if "bfloat16" in policy else 2**-11)
    close(to_numpy(y), x @ wanted.kernel, "y", tolerance)


def test_masks_reach_the_recurrent_layer():
    x = samples((2, 4, 3))
    x[0, 2:] = 0
    layer = WeightStandardization(keras.layers.LSTM(4))
    model = keras.Sequential([keras.Input((4, 3)), keras.layers.Masking(), layer])
    close(model.predict(x, verbose=0)[:1], to_numpy(layer(x[:1, :2])), "y", 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "epsilon": 1e-3,
            "scaled": True,
            "gamma": 1.5,
            "gain_initializer": keras.initializers.RandomNormal(seed=1),
        },
    ],
    ids=["default", "full"],
)
def test_config_round_trip(options):
    layer = WeightStandardization(keras.layers.Dense(4, activation="relu"), name="n", **options)
    config = layer.get_config()
    json.dumps(config)
    kept = copy.deepcopy(config)
    again = WeightStandardization.from_config(config)
    assert config == kept
    assert again.get_config() == config
    for name in ("epsilon", "scaled", "gamma"):
        assert config[name] == {"epsilon": 1e-6, "scaled": False, "gamma": 1.0, **options}[name]
    name = "normwise>WeightStandardization"
    assert keras.saving.get_registered_name(WeightStandardization) == name


def raises(error, text):
    return pytest.raises(error, match=re.escape(text))


def test_what_is_wrong_is_said():
    make, dense = WeightStandardization, keras.layers.Dense(4)
    with raises(TypeError, "layer=3 is no Keras layer; give WeightStandardization an instance of"):
        make(3)
    with raises(TypeError, "scaled=1 is neither True nor False; use one of them"):
        make(dense, scaled=1)
    with raises(TypeError, "gamma='relu' is no number; expected a number > 0, as 1.7128585504"):
        make(dense, scaled=True, gamma="relu")
    for gamma in (0, -1.5, np.inf, np.nan):
        with raises(ValueError, f"gamma={gamma} cannot scale a kernel; expected a number > 0"):
            make(dense, scaled=True, gamma=gamma)
    with raises(ValueError, "gamma=1.5 belongs to the scaled kernel; set scaled=True, or leave"):
        make(dense, gamma=1.5)
    with raises(ValueError, "epsilon=-1 cannot be added to a variance"):
        make(dense, epsilon=-1)
    with raises(ValueError, "LSTMCell is a recurrent cell, which has to be called step by step"):
        make(keras.layers.LSTMCell(3))
    with raises(ValueError, "Flatten has no weight to normalize: WeightStandardization needs a"):
        make(keras.layers.Flatten())(samples((2, 3)))
    with raises(ValueError, "has no weights to remove the norm from; call it, or build it, first"):
        make(dense).remove()


def test_one_weight_for_an_output_is_refused():
    text = "kernel of shape (1, 4) has 1 weight for each output of Dense, and standardized it would"
    with raises(ValueError, text):
        WeightStandardization(keras.layers.Dense(4))(samples((2, 1)))
    text = "kernel of shape (1, 3, 2) has 1 weight for each output of DepthwiseConv1D, and"
    with raises(ValueError, text):
        WeightStandardization(keras.layers.DepthwiseConv1D(1, depth_multiplier=2)).build((2, 5, 3))
