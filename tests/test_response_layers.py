"""FilterResponseNormalization and TLU as layers: weights, dtypes, masks, training and files."""

import copy
import inspect
import json
from pathlib import Path

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
    to_numpy,
)
from norms import expected, randomize, samples
from reference import EPS

from normwise.layers import TLU, FilterResponseNormalization

OLD_MODEL = Path(__file__).parents[2] / "shared" / "tfa_models" / "functional.h5"

both_epsilons = pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])


def layer(**options):
    """A layer for an input (batch, positions, 6)."""
    return FilterResponseNormalization(**{"axis": [1], **options})


def signature(made):
    parameters = list(inspect.signature(made.__init__).parameters.values())[1:]
    assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    return [(p.name, p.default) for p in parameters[:-1]]


def test_signature_is_that_of_tensorflow_addons_and_two_arguments_more():
    assert signature(FilterResponseNormalization) == [
        ("epsilon", 1e-6),
        ("axis", (1, 2)),
        ("beta_initializer", "zeros"),
        ("gamma_initializer", "ones"),
        ("beta_regularizer", None),
        ("gamma_regularizer", None),
        ("beta_constraint", None),
        ("gamma_constraint", None),
        ("learned_epsilon", False),
        ("learned_epsilon_constraint", None),
        ("name", None),
        ("activation", None),
        ("gamma_offset", 0.0),
    ]


@pytest.mark.parametrize(
    ("shape", "axis", "wanted"),
    [
        ((4, 6), [], (1, 6)),
        ((2, 5, 6), 1, (1, 1, 6)),
        ((2, 6, 5), [-1], (1, 6, 1)),
        ((2, 3, 4, 6), (1, 2), (1, 1, 1, 6)),
        ((2, 6, 3, 4), [3, 2], (1, 6, 1, 1)),
        ((2, 3, 6, 4), [1, -1], (1, 1, 6, 1)),
        ((2, 3, 1, 4, 6), [1, 2, 3], (1, 1, 1, 1, 6)),
        ((2, 6, 3, 1, 4), [2, 3, 4], (1, 6, 1, 1, 1)),
    ],
)
@both_epsilons
def test_every_rank_and_axes(shape, axis, wanted, learned):
    made, x = FilterResponseNormalization(axis=axis, learned_epsilon=learned), samples(shape)
    made.build((None, *shape[1:]))
    names = [("learned_epsilon", (1,))] * learned + [("gamma", wanted), ("beta", wanted)]
    assert [(w.name, tuple(w.shape)) for w in made.trainable_weights] == names
    assert {w.dtype for w in made.weights} == {"float32"}
    if learned:
        assert to_numpy(made.eps_learned) == np.float32(1e-4)
    randomize(made)
    right = expected(made, x)
    assert_within(to_numpy(made(x)), right.y, right.y_tolerance(EPS["float32"]))
    assert made.compute_output_shape((None, *shape[1:])) == (None, *shape[1:])
    assert made.get_config()["axis"] == ([axis] if isinstance(axis, int) else list(axis))


@both_epsilons
def test_gamma_offset(learned):
    made, x = layer(gamma_offset=-1.0, learned_epsilon=learned), samples()
    made.build(x.shape)
    randomize(made)
    found = to_numpy(made(x))
    made.gamma.assign(to_numpy(made.gamma) - 1)
    right = expected(made, x)
    assert_within(found, right.y, right.y_tolerance(EPS["float32"]))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "bool"])
@both_epsilons
def test_dtypes(policy, dtype, learned):
    with float64_enabled():
        made = layer(dtype=policy, learned_epsilon=learned)
        # What float16 cannot hold is no trouble: the statistics are of the input as it comes.
        x = samples() > 3 if dtype == "bool" else samples().astype(dtype)
        x = x * np.float32(1e5) if dtype == "float32" else x
        made.build(x.shape)
        randomize(made)
        y, result = made(x), keras.DTypePolicy(policy).compute_dtype
        assert keras.backend.standardize_dtype(y.dtype) == result
        assert {w.dtype for w in made.weights} == {keras.DTypePolicy(policy).variable_dtype}
        right = expected(made, x.astype("float64"))
        tolerance = right.y_tolerance(EPS["float64" if policy == "float64" else "float32"])
        assert_within(to_numpy(y), right.y, tolerance + 2 * EPS[result] * np.abs(right.y))


@both_epsilons
def test_dynamic_extents(learned):
    inputs = keras.Input((6, None, None))
    made = FilterResponseNormalization(axis=[2, 3], learned_epsilon=learned)
    model = keras.Model(inputs, made(inputs))
    assert model.output_shape == (None, 6, None, None)
    randomize(made)
    for shape in [(2, 6, 3, 4), (1, 6, 5, 1)]:
        right = expected(made, samples(shape))
        found = to_numpy(model(samples(shape)))
        assert_within(found, right.y, right.y_tolerance(EPS["float32"]))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="extents unknown to the graph")
@pytest.mark.parametrize("jit_compile", [True, False])
@both_epsilons
def test_tensorflow_graph_of_unknown_extents(jit_compile, learned):
    import tensorflow as tf

    made = FilterResponseNormalization(learned_epsilon=learned)
    made.build((None, 3, 4, 6))
    randomize(made)
    spec = [tf.TensorSpec([None, None, None, 6])]
    function = tf.function(made, jit_compile=jit_compile, input_signature=spec)
    right = expected(made, samples((2, 3, 4, 6)))
    found = function(samples((2, 3, 4, 6))).numpy()
    assert_within(found, right.y, right.y_tolerance(EPS["float32"]))


@both_epsilons
def test_stateless_call_compiled(learned):
    made = layer(learned_epsilon=learned, activation="tanh")
    made.build((None, 5, 6))
    randomize(made)
    weights = [to_numpy(w) for w in made.weights]
    y, state = compiled(lambda w, x: made.stateless_call(w, [], x))(weights, samples())
    assert state == []
    assert_within(to_numpy(y), np.tanh(expected(made, samples()).y), 1e-5)


@pytest.mark.parametrize("jit_compile", [True, False])
def test_fit_moves_every_weight(jit_compile):
    allow_torch_compile(jit_compile)
    made = [layer(learned_epsilon=True), TLU(affine=True)]
    model = keras.Sequential([keras.Input((5, 6)), *made, keras.layers.Dense(1)])
    model.compile("adam", "mse", jit_compile=jit_compile)
    before = model.get_weights()
    model.fit(samples((4, 5, 6)) - 3, np.ones((4, 5, 1)), verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.isfinite(new).all()
        assert not np.allclose(old, new, atol=1e-5)


@both_epsilons
def test_masking_layer_in_a_model(learned):
    keep = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]], bool)
    x = samples()
    x[~keep] = 0
    norm, unit = layer(learned_epsilon=learned), TLU()
    model = keras.Sequential([keras.Input((5, 6)), keras.layers.Masking(), norm, unit])
    randomize(norm)
    right = expected(norm, x, keep[..., None])
    y = model(x)
    assert_within(to_numpy(y), np.maximum(right.y, 0), right.y_tolerance(EPS["float32"]))
    np.testing.assert_array_equal(to_numpy(y._keras_mask), keep)


def test_constraints_and_regularizers_reach_the_weights():
    limit, square = keras.constraints.MinMaxNorm(0.1, 0.2, axis=-1), keras.regularizers.L2(0.5)
    made = layer(
        learned_epsilon=True,
        learned_epsilon_constraint=keras.constraints.NonNeg(),
        gamma_constraint=limit,
        gamma_regularizer=square,
        beta_regularizer=square,
        beta_initializer="ones",
    )
    made.build((None, 5, 6))
    assert made.gamma.constraint is limit
    assert isinstance(made.eps_learned.constraint, keras.constraints.NonNeg)
    np.testing.assert_allclose([to_numpy(loss) for loss in made.losses], [3.0, 3.0])


FULL = {
    FilterResponseNormalization: {
        "epsilon": 1e-2,
        "axis": [1],
        "learned_epsilon": True,
        "learned_epsilon_constraint": keras.constraints.NonNeg(),
        "gamma_initializer": keras.initializers.RandomNormal(seed=1),
        "beta_regularizer": keras.regularizers.L2(0.1),
        "activation": "relu",
        "name": "n",
        "dtype": "mixed_bfloat16",
    },
    TLU: {
        "affine": True,
        "tau_initializer": keras.initializers.RandomNormal(seed=1),
        "alpha_regularizer": keras.regularizers.L2(0.1),
        "alpha_constraint": keras.constraints.NonNeg(),
        "name": "n",
        "dtype": "mixed_bfloat16",
    },
}
every_layer = pytest.mark.parametrize("kind", FULL)


@every_layer
@pytest.mark.parametrize("full", [False, True], ids=["default", "full"])
def test_config_round_trip(kind, full):
    made = kind(**(FULL[kind] if full else {}))
    config = made.get_config()
    json.dumps(config)
    assert kind.from_config(copy.deepcopy(config)).get_config() == config
    arguments = [name for name, _ in signature(kind)]
    assert {*config} == {*arguments, "name", "trainable", "dtype"}
    if full:
        made(samples())
        assert made.get_config() == config


@every_layer
def test_names_of_registration(kind):
    name = kind.__name__
    assert keras.saving.get_registered_name(kind) == f"normwise>{name}"
    for registered in (f"normwise>{name}", f"Addons>{name}"):
        assert keras.saving.get_registered_object(registered) is kind
    legacy = {"class_name": f"Addons>{name}", "config": {"name": "old"}}
    current = {**legacy, "class_name": name, "registered_name": f"Addons>{name}"}
    current["module"] = "tensorflow_addons.layers"
    for saved in (legacy, current):
        made = keras.layers.deserialize(saved)
        assert type(made) is kind
        assert made.name == "old"


def model_of_both():
    inputs = keras.Input((5, 6))
    y = layer(learned_epsilon=True, name="n", activation="tanh")(inputs)
    return keras.Model(inputs, TLU(affine=True, name="t")(y))


@pytest.mark.parametrize("reload", ["keras", "weights", "clone", "copy"])
def test_files_and_copies(reload, tmp_path):
    model = model_of_both()
    for made in model.layers[1:]:
        randomize(made)
    y = to_numpy(model(samples()))
    if reload == "keras":
        model.save(tmp_path / "model.keras")
        other = keras.models.load_model(tmp_path / "model.keras")
    elif reload == "weights":
        model.save_weights(tmp_path / "model.weights.h5")
        other = model_of_both()
        assert not np.array_equal(to_numpy(other(samples())), y)
        other.load_weights(tmp_path / "model.weights.h5")
    elif reload == "clone":
        other = keras.models.clone_model(model)
        other.set_weights(model.get_weights())
    else:
        other = copy.deepcopy(model)
    assert [type(made) for made in other.layers] == [type(made) for made in model.layers]
    np.testing.assert_array_equal(to_numpy(other(samples())), y)


@pytest.mark.skipif(not OLD_MODEL.exists(), reason="the old models are not beside this checkout")
def test_weights_stored_by_tensorflow_addons_go_in_as_they_are():
    import h5py

    made = {
        "filter_response_normalization": FilterResponseNormalization(learned_epsilon=True),
        "tlu": TLU(),
    }
    with h5py.File(OLD_MODEL) as file:
        for name, ours in made.items():
            stored = file["model_weights"][name]
            order = [*stored.attrs["weight_names"]]
            ours.build((None, 16, 16, 8))
            assert [w.name for w in ours.weights] == [
                key.rpartition("/")[2].removesuffix(":0") for key in order
            ]
            ours.set_weights([stored[key][()] for key in order])


def thresholded(x, tau, alpha=0.0):
    """TLU in float64, and where x is above."""
    threshold = tau + alpha * x
    return np.maximum(x, threshold), x >= threshold


@pytest.mark.parametrize("shape", [(4, 6), (2, 5, 6), (2, 3, 4, 6), (2, 3, 2, 4, 6)])
@pytest.mark.parametrize("affine", [False, True])
def test_tlu_and_its_gradients(shape, affine):
    rng = np.random.default_rng(0)
    x, dy, tau, alpha = (
        rng.normal(size=s).astype("float32") for s in (shape, shape, shape[1:], shape[1:])
    )
    # Zeros at a threshold of 0, as behind a relu: there all of the gradient is that of x.
    x[0, 0], tau[0] = 0, 0
    made = TLU(affine=affine)
    made.build((None, *shape[1:]))
    assert [(w.name, tuple(w.shape)) for w in made.trainable_weights] == [
        (name, shape[1:]) for name in ("tau", "alpha")[: 1 + affine]
    ]
    assert made.compute_output_shape((None, *shape[1:])) == (None, *shape[1:])
    weights = [tau, alpha][: 1 + affine]

    def call(x, *weights):
        return made.stateless_call(weights, [], x)[0]

    y, (dx, *dw) = gradients(call, [x, *weights], dy)
    alpha = alpha if affine else 0.0
    wanted, above = thresholded(x.astype("float64"), tau, alpha)
    assert above[0, 0].all()
    below = np.where(above, 0, dy.astype("float64"))
    assert_within(y, wanted, 1e-6)
    assert_within(dx, np.where(above, dy, alpha * below), 1e-6)
    for found, want in zip(dw, (below.sum(axis=0), (below * x).sum(axis=0)), strict=False):
        assert_within(found, want, 1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "bool"])
def test_tlu_of_every_dtype(policy, dtype):
    with float64_enabled():
        made = TLU(affine=True, dtype=policy)
        made.build((None, 5, 6))
        randomize(made)
        x = (samples() > 3) if dtype == "bool" else samples().astype(dtype)
        y, result = made(x), keras.DTypePolicy(policy).compute_dtype
        assert keras.backend.standardize_dtype(y.dtype) == result
        assert {w.dtype for w in made.weights} == {keras.DTypePolicy(policy).variable_dtype}
        tau, alpha = (to_numpy(w).astype("float64") for w in made.weights)
        wanted, _ = thresholded(x.astype("float64"), tau, alpha)
        eps = EPS["float64" if "float64" in (policy, dtype) else "float32"]
        assert_within(to_numpy(y), wanted, (4 * eps + EPS[result]) * (1 + np.abs(wanted)))


def test_tlu_keeps_what_is_not_finite_where_it_is():
    x = np.array([[np.nan, np.inf, -np.inf], [1, -1, 0]], "float32")
    y = to_numpy(TLU()(x))
    np.testing.assert_array_equal(y, [[np.nan, np.inf, 0], [1, 0, 0]])


def test_tlu_signature_is_that_of_tensorflow_addons():
    assert signature(TLU) == [
        ("affine", False),
        ("tau_initializer", "zeros"),
        ("tau_regularizer", None),
        ("tau_constraint", None),
        ("alpha_initializer", "zeros"),
        ("alpha_regularizer", None),
        ("alpha_constraint", None),
    ]


def test_tlu_reads_a_config_without_alpha():
    """As TensorFlow Addons writes it where affine is False."""
    config = {k: v for k, v in TLU().get_config().items() if not k.startswith("alpha")}
    assert TLU.from_config(config).get_config() == {**TLU().get_config(), "name": config["name"]}


def test_empty_batch():
    for made in (layer(), TLU(affine=True)):
        assert to_numpy(made(np.zeros((0, 5, 6), "float32"))).shape == (0, 5, 6)
