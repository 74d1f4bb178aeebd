"""The recurrent cells as Keras layers: weights, configs, dtypes, training, files, errors."""

import copy
import inspect
import json
import re

import keras
import numpy as np
import pytest
from frameworks import allow_torch_compile, assert_within, to_numpy
from recurrent import (
    FEATURES,
    MASK,
    RATES,
    UNITS,
    every_cell,
    flat,
    randomize,
    recurrent,
    reference,
    sequences,
)

import normwise
from normwise.rnn import LayerNormLSTMCell, LayerNormSimpleRNNCell

NORMS = {
    LayerNormLSTMCell: [
        ("kernel_norm/gamma", (16,)),
        ("kernel_norm/beta", (16,)),
        ("recurrent_norm/gamma", (16,)),
        ("recurrent_norm/beta", (16,)),
        ("state_norm/gamma", (4,)),
        ("state_norm/beta", (4,)),
    ],
    LayerNormSimpleRNNCell: [("layernorm/gamma", (4,))],
}


@pytest.mark.parametrize("use_bias", [True, False])
@every_cell
def test_weights(cell_type, use_bias):
    cell = cell_type(UNITS, use_bias=use_bias, name="cell", **RATES)
    cell.build((None, FEATURES))
    width = 16 if cell_type is LayerNormLSTMCell else 4
    own = [("kernel", (3, width)), ("recurrent_kernel", (4, width)), ("bias", (width,))]
    wanted = [*(own if use_bias else own[:2]), *NORMS[cell_type]]
    assert [(w.path, tuple(w.shape)) for w in cell.weights] == [
        (f"cell/{path}", shape) for path, shape in wanted
    ]
    assert cell.trainable_weights == cell.weights


# Names, order and defaults, as TensorFlow Addons has them; one new keyword at the end.
SIGNATURES = {
    LayerNormLSTMCell: {
        "activation": "tanh",
        "recurrent_activation": "sigmoid",
        "use_bias": True,
        "kernel_initializer": "glorot_uniform",
        "recurrent_initializer": "orthogonal",
        "bias_initializer": "zeros",
        "unit_forget_bias": True,
        "kernel_regularizer": None,
        "recurrent_regularizer": None,
        "bias_regularizer": None,
        "kernel_constraint": None,
        "recurrent_constraint": None,
        "bias_constraint": None,
        "dropout": 0.0,
        "recurrent_dropout": 0.0,
        "norm_gamma_initializer": "ones",
        "norm_beta_initializer": "zeros",
        "norm_epsilon": 1e-3,
        "seed": None,
    },
    LayerNormSimpleRNNCell: {
        "activation": "tanh",
        "use_bias": True,
        "layernorm_epsilon": 1e-5,
        "kernel_initializer": "glorot_uniform",
        "recurrent_initializer": "orthogonal",
        "bias_initializer": "zeros",
        "gamma_initializer": "ones",
        "kernel_regularizer": None,
        "recurrent_regularizer": None,
        "bias_regularizer": None,
        "gamma_regularizer": None,
        "kernel_constraint": None,
        "recurrent_constraint": None,
        "bias_constraint": None,
        "gamma_constraint": None,
        "dropout": 0.0,
        "recurrent_dropout": 0.0,
        "seed": None,
    },
}


@every_cell
def test_signature(cell_type):
    _, units, *others, rest = inspect.signature(cell_type.__init__).parameters.values()
    assert (units.name, units.default) == ("units", inspect.Parameter.empty)
    assert [(p.name, p.default) for p in others] == list(SIGNATURES[cell_type].items())
    assert rest.kind is inspect.Parameter.VAR_KEYWORD


def full_options(cell_type):
    """Every argument other than its default."""
    made = {"units": 3, "name": "n", "trainable": False, "dtype": "mixed_bfloat16"}
    for option, default in SIGNATURES[cell_type].items():
        if option.endswith("initializer"):
            made[option] = keras.initializers.RandomNormal(seed=len(made))
        elif option.endswith("regularizer"):
            made[option] = keras.regularizers.L2(0.01 * len(made))
        elif option.endswith("constraint"):
            made[option] = keras.constraints.MaxNorm(len(made), axis=0)
        elif option.endswith("activation"):
            made[option] = "softsign"
        elif isinstance(default, bool):
            made[option] = not default
        else:
            made[option] = 7 if option == "seed" else 0.25
    return made


@every_cell
def test_config_round_trip(cell_type):
    options = full_options(cell_type)
    config = cell_type(**options).get_config()
    json.dumps(config)
    assert set(config) == set(options)
    for name, value in options.items():
        if name != "dtype" and isinstance(value, (str, int, float)):
            assert config[name] == value
        elif name != "dtype":
            assert config[name]["config"] == value.get_config()
    assert cell_type.from_config(copy.deepcopy(config)).get_config() == config


@every_cell
def test_every_weight_gets_its_initializer_regularizer_and_constraint(cell_type):
    options = full_options(cell_type) | {"use_bias": True, "dtype": "float32"}
    cell = cell_type(**options)
    cell.build((None, FEATURES))
    for weight in cell.weights:
        which = "recurrent" if weight.name == "recurrent_kernel" else weight.name
        if cell_type is LayerNormLSTMCell and which in ("gamma", "beta"):
            which = f"norm_{which}"
        drawn = to_numpy(options[f"{which}_initializer"](weight.shape))
        np.testing.assert_array_equal(to_numpy(weight), drawn)
        for kind in ("regularizer", "constraint"):
            given, got = options.get(f"{which}_{kind}"), getattr(weight, kind)
            assert (got and got.get_config()) == (given and given.get_config())


def test_the_forget_gate_begins_open():
    cell = LayerNormLSTMCell(2)
    cell.build((None, FEATURES))
    assert to_numpy(cell.bias).tolist() == [0, 0, 1, 1, 0, 0, 0, 0]


@every_cell
def test_a_cell_made_frozen_stays_so(cell_type):
    layer = keras.layers.RNN(cell_type(UNITS, trainable=False))
    layer.build((None, 5, FEATURES))
    assert layer.weights
    assert layer.trainable_weights == []


ROUNDING = {"mixed_float16": 2**-11, "mixed_bfloat16": 2**-8}


@pytest.mark.parametrize("policy", ROUNDING)
@every_cell
def test_dtype_policies(cell_type, policy):
    layer = recurrent(cell_type, dtype=policy, return_sequences=True, return_state=True)
    kinds = keras.DTypePolicy(policy)
    assert {w.dtype for w in layer.weights} == {kinds.variable_dtype}
    x = sequences(steps=2)
    outputs = layer(x)
    assert {keras.backend.standardize_dtype(y.dtype) for y in outputs} == {kinds.compute_dtype}
    right = reference(cell_type, x, [to_numpy(w) for w in layer.weights])
    assert_within(to_numpy(flat(outputs)), right, 32 * ROUNDING[policy])


def stacked_model(rates=None):
    """Both cells, over sequences that end early."""
    rates = rates or {}
    return keras.Sequential(
        [
            keras.Input((None, FEATURES)),
            keras.layers.Masking(),
            keras.layers.RNN(LayerNormLSTMCell(UNITS, **rates), return_sequences=True),
            keras.layers.Bidirectional(keras.layers.RNN(LayerNormSimpleRNNCell(3, **rates))),
            keras.layers.Dense(1),
        ]
    )


@pytest.mark.parametrize("jit_compile", [True, False])
def test_fit_moves_every_weight(jit_compile):
    allow_torch_compile(jit_compile)
    keras.utils.set_random_seed(1)
    model = stacked_model({**RATES, "seed": 3})
    model.compile("adam", "mse", jit_compile=jit_compile)
    x = np.where(MASK[..., None], sequences(), 0)
    before = model.get_weights()
    model.fit(x, np.ones(len(x)), verbose=0)
    for path, old, new in zip(
        (w.path for w in model.weights), before, model.get_weights(), strict=True
    ):
        assert np.isfinite(new).all(), path
        assert not np.allclose(old, new, atol=1e-5), path


# Files and names.


def test_saved_models_come_back(tmp_path):
    model, x = stacked_model(RATES), np.where(MASK[..., None], sequences(), 0)
    for layer in model.layers[1:]:
        randomize(layer)
    y = to_numpy(model(x))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(loaded(x)), y)
    model.save_weights(tmp_path / "model.weights.h5")
    other = stacked_model(RATES)
    assert not np.allclose(to_numpy(other(x)), y)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(to_numpy(other(x)), y)


@every_cell
def test_registered_names(cell_type):
    name = f"normwise>{cell_type.__name__}"
    assert keras.saving.get_registered_name(cell_type) == name
    assert keras.saving.get_registered_object(name) is cell_type
    assert keras.saving.serialize_keras_object(cell_type(2))["registered_name"] == name
    assert keras.saving.get_registered_object(f"Addons>{cell_type.__name__}") is cell_type
    assert getattr(normwise.rnn, cell_type.__name__) is cell_type


@every_cell
def test_what_keras_2_added_to_configs_changes_nothing(cell_type):
    old = {"implementation": 1, "enable_caching_device": True}
    cell = cell_type(UNITS, name="n", **old)
    assert cell.get_config() == cell_type(UNITS, name="n").get_config()
    assert not old.keys() & cell.get_config().keys()


# Errors, word for word.

NO_SIZE = " is no size of a state; expected a positive int, as in units=64"


@pytest.mark.parametrize("units", [0, -3, 2.0, "4", None, True])
@every_cell
def test_units_that_are_no_size(cell_type, units):
    with raises(ValueError, f"units={units!r}{NO_SIZE}"):
        cell_type(units)


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan"), "0.5", None, True])
@pytest.mark.parametrize("name", RATES)
@every_cell
def test_rates_that_are_no_share(cell_type, name, rate):
    rule = "is no share to drop; expected a number >= 0 and < 1, as in"
    with raises(ValueError, f"{name}={rate!r} {rule} {name}=0.1"):
        cell_type(UNITS, **{name: rate})


@pytest.mark.parametrize(
    ("epsilon", "error", "text"),
    [
        (-1.0, ValueError, "epsilon=-1.0 cannot be added to a variance"),
        ("1", TypeError, "epsilon='1' is no number"),
    ],
)
@every_cell
def test_epsilons_that_fit_no_variance(cell_type, epsilon, error, text):
    name = "norm_epsilon" if cell_type is LayerNormLSTMCell else "layernorm_epsilon"
    with raises(error, f"{text}; expected a number >= 0, as in epsilon=1e-3"):
        cell_type(UNITS, **{name: epsilon})


def raises(error, text):
    return pytest.raises(error, match=f"^{re.escape(text)}$")
