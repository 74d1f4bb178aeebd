"""Weight and spectral norm: every kind of layer against float64 NumPy, training, files, errors."""

import contextlib
import copy

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

from normwise.layers import SpectralNormalization, WeightNormalization, WeightStandardization

# A layer, its input's shape, the shapes of g, and the axes of the columns of the kernels' matrices.
KINDS = {
    "dense": (lambda: keras.layers.Dense(4), (5, 3), [(4,)], [(1,)]),
    "conv2d": (lambda: keras.layers.Conv2D(4, 2), (2, 4, 5, 3), [(4,)], [(3,)]),
    "transposed": (
        lambda: keras.layers.Conv2DTranspose(4, 2, strides=2),
        (2, 3, 4, 3),
        [(3,)],
        [(2,)],
    ),
    "depthwise": (
        lambda: keras.layers.DepthwiseConv2D(2, depth_multiplier=2),
        (2, 4, 5, 3),
        [(3, 2)],
        [(2, 3)],
    ),
    "separable": (
        lambda: keras.layers.SeparableConv1D(4, 2, depth_multiplier=2),
        (2, 5, 3),
        [(3, 2), (4,)],
        [(1, 2), (2,)],
    ),
    "einsum": (
        lambda: keras.layers.EinsumDense("abc,cde->abde", (5, 2, 4)),
        (2, 5, 3),
        [(4,)],
        [(1, 2)],
    ),
    "recurrent": (
        lambda: keras.layers.RNN(keras.layers.SimpleRNNCell(4)),
        (2, 3, 3),
        [(4,)],
        [(1,)],
    ),
}
# Of the same family as one of those: built and called, not differentiated.
RELATED = {
    "conv1d": (lambda: keras.layers.Conv1D(4, 2), (2, 5, 3), [(4,)]),
    "conv3d": (lambda: keras.layers.Conv3D(4, 2), (2, 3, 3, 3, 3), [(4,)]),
    "conv1d_transpose": (lambda: keras.layers.Conv1DTranspose(4, 2), (2, 5, 3), [(3,)]),
    "conv3d_transpose": (lambda: keras.layers.Conv3DTranspose(4, 2), (2, 2, 2, 2, 3), [(3,)]),
    "depthwise1d": (lambda: keras.layers.DepthwiseConv1D(2), (2, 5, 3), [(3, 1)]),
    "separable2d": (lambda: keras.layers.SeparableConv2D(4, 2), (2, 4, 4, 3), [(3, 1), (4,)]),
    "lstm": (lambda: keras.layers.LSTM(4), (2, 3, 3), [(16,)]),
    "gru": (lambda: keras.layers.RNN(keras.layers.GRUCell(4)), (2, 3, 3), [(12,)]),
}
both = pytest.mark.parametrize("wrapper", [WeightNormalization, SpectralNormalization])
every_kind = pytest.mark.parametrize("kind", KINDS)


@contextlib.contextmanager
def dtype_policy(name):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def wrap(wrapper, layer, **options):
    if wrapper is WeightNormalization:
        options = {"data_init": False, **options}
    return wrapper(layer, **options)


def samples(shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).normal(0.3, 1.0, shape).astype(dtype)


def randomized(layer, seed=1):
    """The layer with weights that no initializer gives: some of g are negative."""
    rng = np.random.default_rng(seed)
    for w in layer.trainable_weights:
        w.assign(rng.normal(0.2, 0.8, w.shape))
    return layer


def kernels_of(layer):
    """The kernels in the wrapped layer, found by name and not by the code under test."""
    owner = getattr(layer.layer, "cell", layer.layer)
    names = (
        ("recurrent_kernel",)
        if owner is not layer.layer
        else (("kernel",) if hasattr(owner, "kernel") else ("depthwise_kernel", "pointwise_kernel"))
    )
    return [getattr(owner, name) for name in names]


class WeightNorm:
    """kernel = g * v / |v| and its gradients, in float64."""

    def __init__(self, g, v):
        axes = tuple(range(v.ndim - g.ndim))
        self.g, self.axes = g, axes
        self.length = np.sqrt((v**2).sum(axes))
        self.direction = v / self.length
        self.kernel = g * self.direction

    def gradients(self, dk):
        dg = (dk * self.direction).sum(self.axes)
        return dg, self.g / self.length * (dk - self.direction * dg)


class SpectralNorm:
    """kernel / sigma and its gradient, u and v being constants, in float64."""

    def __init__(self, w, u, columns, iterations):
        self.order = [a for a in range(w.ndim) if a not in columns] + list(columns)
        self.moved = [w.shape[a] for a in self.order]
        self.width = int(np.prod([w.shape[a] for a in columns]))
        self.matrix = self.as_matrix(w)
        left = self.matrix @ (u[0] / np.linalg.norm(u))
        left /= np.linalg.norm(left)
        right = u[0] / np.linalg.norm(u)
        for _ in range(iterations):
            left = self.matrix @ right / np.linalg.norm(self.matrix @ right)
            right = left @ self.matrix / np.linalg.norm(left @ self.matrix)
        self.u = right[None]
        self.sigma = left @ self.matrix @ right
        self.outer = np.outer(left, right)
        self.kernel = w / self.sigma

    def as_matrix(self, w):
        return w.transpose(self.order).reshape(-1, self.width)

    def gradient(self, dk):
        dk = self.as_matrix(dk)
        slope = (dk * self.matrix).sum() / self.sigma**2
        dw = dk / self.sigma - slope * self.outer
        return dw.reshape(self.moved).transpose(np.argsort(self.order))


def plain_gradients(layer, weights, x, dy):
    """Output of the wrapped layer alone with the given weights, and the gradients."""

    def call(x, *weights):
        return layer.layer.stateless_call(weights, layer.layer.non_trainable_variables, x)[0]

    return gradients(call, [x, *weights], dy)


def wrapped_gradients(layer, x, dy, training):
    weights = [to_numpy(w) for w in layer.trainable_weights]
    state = [to_numpy(w) for w in layer.non_trainable_variables]

    def call(x, *weights):
        return layer.stateless_call(weights, state, x, training=training)[0]

    y, (dx, *dw) = gradients(call, [x, *weights], dy)
    return y, dx, {id(w): d for w, d in zip(layer.trainable_weights, dw, strict=True)}


def dtype_of(kind):
    """Keras's recurrent layers refuse float64 on JAX."""
    return "float32" if kind == "recurrent" else "float64"


def tolerance_of(kind):
    """A few thousand eps of the largest, a few tens of float32's.

    Keras on PyTorch multiplies matrices of float64 in float32.
    """
    return 5e-6 if BACKEND == "torch" or kind == "recurrent" else 1e-12


def compare(layer, kind, training, references, gradients_of):
    """Output and every gradient against the plain layer's, chained through the references."""
    x = samples(KINDS[kind][1], dtype=dtype_of(kind))
    dy = samples(layer.compute_output_shape(x.shape), seed=2, dtype=dtype_of(kind))
    y, dx, found = wrapped_gradients(layer, x, dy, training)
    kernels = kernels_of(layer)
    computed = {id(k): r.kernel for k, r in zip(kernels, references, strict=True)}
    weights = [computed.get(id(w), to_numpy(w)) for w in layer.layer.trainable_weights]
    plain_y, (plain_dx, *plain_dw) = plain_gradients(layer, weights, x, dy)
    tolerance = tolerance_of(kind)
    close(y, plain_y, "y", tolerance)
    close(dx, plain_dx, "dx", tolerance)
    expected = dict(zip(map(id, layer.layer.trainable_weights), plain_dw, strict=True))
    for kernel, reference in zip(kernels, references, strict=True):
        expected |= gradients_of(reference, kernel, expected[id(kernel)])
    assert set(expected) == set(found)
    for w in layer.trainable_weights:
        close(found[id(w)], expected[id(w)], w.name, tolerance)


def close(found, expected, what, tolerance):
    assert_within(found, expected, tolerance * np.abs(expected).max(), what)


@every_kind
def test_weight_norm_and_its_gradients(kind):
    make, shape, g_shapes, _ = KINDS[kind]
    with float64_enabled(), dtype_policy(dtype_of(kind)):
        layer = WeightNormalization(make(), data_init=False)
        layer.build(shape)
        gs = layer.g if isinstance(layer.g, list) else [layer.g]
        assert [tuple(g.shape) for g in gs] == g_shapes
        randomized(layer)
        kernels = kernels_of(layer)
        references = [
            WeightNorm(to_numpy(g), to_numpy(v)) for g, v in zip(gs, kernels, strict=True)
        ]
        names = {id(v): g for g, v in zip(gs, kernels, strict=True)}

        def chained(reference, kernel, dk):
            dg, dv = reference.gradients(dk)
            return {id(names[id(kernel)]): dg, id(kernel): dv}

        compare(layer, kind, True, references, chained)


@pytest.mark.parametrize(
    ("kind", "training"), [*((kind, True) for kind in KINDS), ("transposed", False)]
)
def test_spectral_norm_and_its_gradient(kind, training):
    make, shape, _, columns = KINDS[kind]
    with float64_enabled(), dtype_policy(dtype_of(kind)):
        layer = SpectralNormalization(make(), power_iterations=2)
        layer.build(shape)
        randomized(layer)
        if not training:
            # Else inference would find a better u than the one that was made.
            layer(samples(shape), training=True)
        us = layer.u if isinstance(layer.u, list) else [layer.u]
        kernels = kernels_of(layer)
        references = [
            SpectralNorm(to_numpy(w), to_numpy(u), axes, 2 if training else 0)
            for w, u, axes in zip(kernels, us, columns, strict=True)
        ]
        compare(
            layer, kind, training, references, lambda r, kernel, dk: {id(kernel): r.gradient(dk)}
        )
        layer(samples(shape), training=training)
        for u, reference in zip(us, references, strict=True):
            close(to_numpy(u), reference.u if training else to_numpy(u), "u", tolerance_of(kind))


@pytest.mark.parametrize("kind", RELATED)
def test_related_layers(kind):
    make, shape, g_shapes = RELATED[kind]
    layer = WeightNormalization(make(), data_init=False)
    layer.build(shape)
    gs = layer.g if isinstance(layer.g, list) else [layer.g]
    assert [tuple(g.shape) for g in gs] == g_shapes
    assert (
        layer(keras.Input(shape[1:])).shape[1:]
        == tuple(layer.layer.compute_output_shape(shape))[1:]
    )
    spectral = SpectralNormalization(make())
    spectral.build(shape)
    us = spectral.u if isinstance(spectral.u, list) else [spectral.u]
    columns = [(1, 4)] if kind.endswith("transpose") else [(1, int(np.prod(g))) for g in g_shapes]
    assert [tuple(u.shape) for u in us] == columns


# torch.compile takes minutes for three models that predict; for those that train see below.
ways_to_fit = pytest.mark.parametrize(
    "jit_compile", [False] if BACKEND == "torch" else [True, False]
)


def check_fit_save_reload_and_remove(first, last, jit_compile, tmp_path):
    """A Conv1D named first and a Dense named last, wrapped, train, are saved and are unwrapped."""
    model = keras.Sequential([keras.Input((5, 3)), first, keras.layers.Flatten(), last])
    before = [to_numpy(w) for w in model.trainable_weights]
    x, y = samples((24, 5, 3)), samples((24, 2), seed=1)
    model.compile(keras.optimizers.Adam(1e-2), "mse", jit_compile=jit_compile)
    losses = model.fit(x, y, batch_size=12, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    for w, value in zip(model.trainable_weights, before, strict=True):
        assert np.abs(to_numpy(w) - value).max() > 1e-3, w.path
    predicted = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.get_layer("first")) is type(first)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), predicted)
    model.save_weights(tmp_path / "model.weights.h5")
    other = keras.models.clone_model(model)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(other.predict(x, verbose=0), predicted)
    first, flatten, last = loaded.layers
    plain = keras.Sequential([keras.Input((5, 3)), first.remove(), flatten, last.remove()])
    assert [type(part).__name__ for part in plain.layers] == ["Conv1D", "Flatten", "Dense"]
    close(plain.predict(x, verbose=0), predicted, "without the norms", 1e-5)


@both
@ways_to_fit
def test_fit_save_reload_and_remove(wrapper, jit_compile, tmp_path):
    options = {"data_init": True} if wrapper is WeightNormalization else {}
    first = wrapper(keras.layers.Conv1D(4, 2, activation="relu"), name="first", **options)
    last = wrapper(keras.layers.Dense(2), name="last", **options)
    check_fit_save_reload_and_remove(first, last, jit_compile, tmp_path)


@pytest.mark.skipif(BACKEND != "torch", reason="of torch.compile")
def test_torch_compile_trains_as_eager():
    """Every wrapper in one model: of a compilation, most seconds go to what is Keras's."""
    allow_torch_compile(True)
    x, y = samples((24, 5, 3)), samples((24, 2), seed=1)

    def trained(jit_compile):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((5, 3)),
                WeightNormalization(keras.layers.Conv1D(4, 2, activation="relu"), data_init=True),
                SpectralNormalization(keras.layers.Conv1D(4, 2, activation="relu")),
                keras.layers.Flatten(),
                WeightStandardization(keras.layers.Dense(2), scaled=True),
            ]
        )
        # Not SGD, which breaks Keras's own graph.
        model.compile(keras.optimizers.Adam(1e-2), "mse", jit_compile=jit_compile)
        before = values(model)
        model.fit(x, y, batch_size=12, epochs=3, shuffle=False, verbose=0)
        return before, values(model)

    def values(model):
        return [np.float32(to_numpy(w)) for w in model.weights]

    before, eager = trained(jit_compile=False)
    try:
        _, by_torch = trained(jit_compile=True)
    finally:
        keras.utils.clear_session()  # in which a compiled call may leave the note that it trains
    for old, want, found in zip(before, eager, by_torch, strict=True):
        assert np.abs(want - old).max() > 1e-3
        assert_within(found, want, 1e-4 * (1 + np.abs(want).max()))


@both
@pytest.mark.parametrize("training", [True, False])
def test_a_call_leaves_nothing_in_the_wrapped_layer(wrapper, training):
    layer = wrap(wrapper, keras.layers.RNN(keras.layers.SimpleRNNCell(4)))
    x = samples((2, 3, 3))
    layer.build(x.shape)
    before = dict(vars(layer.layer)), dict(vars(layer.layer.cell))
    values = [to_numpy(w) for w in layer.trainable_weights]
    state = (layer.trainable_variables, layer.non_trainable_variables)
    call = compiled(lambda x: layer.stateless_call(*state, x, training=training)[0])
    call(keras.ops.convert_to_tensor(x))
    for owner, attributes in zip((layer.layer, layer.layer.cell), before, strict=True):
        after = vars(owner)
        assert set(after) == set(attributes)
        assert all(after[name] is value for name, value in attributes.items())
    for w, value in zip(layer.trainable_weights, values, strict=True):
        np.testing.assert_array_equal(to_numpy(w), value)


@both
def test_inference_changes_nothing(wrapper):
    layer = wrapper(keras.layers.Dense(4))
    layer.build((5, 3))
    before = [to_numpy(w) for w in layer.weights]
    layer(samples((5, 3)))
    for w, value in zip(layer.weights, before, strict=True):
        np.testing.assert_array_equal(to_numpy(w), value)


@pytest.mark.parametrize("kind", ["depthwise", "separable"])
def test_the_first_call_in_training_initializes_from_data(kind):
    make, shape = KINDS[kind][:2]
    layer = WeightNormalization(make())
    layer.build(shape)
    x = samples(shape)
    plain = to_numpy(layer.layer(x)).astype("float64")
    axes = tuple(range(plain.ndim - 1))
    mean, scale = plain.mean(axes), 1 / np.sqrt(plain.var(axes) + 1e-10)
    y = to_numpy(layer(x, training=True))
    g, v = (w[-1] if isinstance(w, list) else w for w in (layer.g, layer.v))
    assert np.all(to_numpy(g) == 1)
    norm_axes = tuple(range(v.ndim - g.ndim))
    # The depthwise kernel of a separable convolution keeps its length; only the last one's counts.
    length = np.sqrt((to_numpy(v).astype("float64") ** 2).sum(norm_axes)).reshape(-1)
    close(y, plain * scale / length - mean * scale, "y", 1e-5)
    close(to_numpy(layer(x, training=True)), y, "y of the second call", 1e-6)
    close(
        to_numpy(layer(2 * x, training=True)),
        2 * plain * scale / length - mean * scale,
        "2y",
        1e-5,
    )


def test_data_of_channels_first():
    if BACKEND == "tensorflow":
        pytest.skip("TensorFlow has no convolution of channels first on a CPU")
    layer = WeightNormalization(keras.layers.Conv1D(4, 2, data_format="channels_first"))
    x = samples((3, 2, 7))
    y = to_numpy(layer(x, training=True))
    spread = y.std((0, 2)) * np.sqrt((to_numpy(layer.v) ** 2).sum((0, 1)))
    np.testing.assert_allclose(spread, np.ones(4), rtol=1e-5)


def test_without_data_the_layer_begins_as_it_was():
    dense = keras.layers.Dense(4)
    x = samples((5, 3))
    y = to_numpy(dense(x))
    close(to_numpy(WeightNormalization(dense, data_init=False)(x, training=True)), y, "y", 1e-6)


@both
def test_a_kernel_of_zeros_stays_finite(wrapper):
    layer = wrap(wrapper, keras.layers.Dense(4, kernel_initializer="zeros"))
    x = samples((5, 3))
    layer.build(x.shape)
    for training in (True, False):
        y, dx, found = wrapped_gradients(layer, x, np.ones((5, 4), "float32"), training)
        assert np.all(y == 0)
        assert all(np.isfinite(d).all() for d in [dx, *found.values()])


def test_iterations_find_the_largest_singular_value():
    layer = SpectralNormalization(keras.layers.Conv2DTranspose(4, 2), power_iterations=100)
    layer(samples((1, 3, 3, 3)), training=True)
    kernel = to_numpy(layer.remove().kernel)  # (2, 2, outputs, inputs)
    matrix = kernel.transpose(0, 1, 3, 2).reshape(-1, 4)
    np.testing.assert_allclose(np.linalg.norm(matrix, 2), 1, rtol=1e-4)


@both
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16"])
def test_dtypes(wrapper, policy):
    layer = wrap(wrapper, keras.layers.Dense(4, dtype=policy), dtype=policy)
    x = samples((5, 3))
    symbol = layer(keras.Input((3,)))
    y = layer(x, training=True)
    compute = keras.DTypePolicy(policy).compute_dtype
    assert symbol.dtype == compute
    assert keras.backend.standardize_dtype(y.dtype) == compute
    twin = wrap(wrapper, keras.layers.Dense(4))
    twin.build(x.shape)
    for w, other in zip(twin.weights, layer.weights, strict=True):
        w.assign(to_numpy(other))
    # Two roundings of the kernel and those of the product.
    tolerance = 16 * (2**-8 if "bfloat16" in policy else 2**-11)
    close(to_numpy(layer(x)), to_numpy(twin(x)), "y", tolerance)


@both
def test_masks_reach_the_recurrent_layer(wrapper):
    x = samples((2, 4, 3))
    x[0, 2:] = 0
    layer = wrap(wrapper, keras.layers.LSTM(4))
    model = keras.Sequential([keras.Input((4, 3)), keras.layers.Masking(), layer])
    short = to_numpy(layer(x[:1, :2]))
    close(model.predict(x, verbose=0)[:1], short, "y", 1e-5)


@both
def test_config_round_trip(wrapper):
    options = (
        {"data_init": False}
        if wrapper is WeightNormalization
        else {"power_iterations": 3, "compatible": True}
    )
    layer = wrapper(keras.layers.Dense(4, activation="relu"), name="n", **options)
    config = layer.get_config()
    kept = copy.deepcopy(config)
    again = wrapper.from_config(config)
    assert config == kept
    assert again.get_config() == config
    assert again.layer.units == 4
    assert options.items() <= config.items()


@pytest.mark.parametrize("older", [True, False])
@both
def test_names_of_tensorflow_addons(wrapper, older):
    dense = {"class_name": "Dense", "config": {"units": 4, "activation": "linear"}}
    if not older:
        dense = {"module": "keras.layers", **dense, "registered_name": None}
    name = wrapper.__name__
    config = {"name": "n", "layer": dense}
    saved = [
        {"class_name": f"Addons>{name}", "config": config},
        {
            "module": "tensorflow_addons.layers.wrappers",
            "class_name": name,
            "config": config,
            "registered_name": f"Addons>{name}",
        },
    ]
    for given in saved:
        layer = keras.layers.deserialize(copy.deepcopy(given))
        assert type(layer) is wrapper
        assert layer.layer.units == 4
        if wrapper is SpectralNormalization:
            assert layer.compatible
            assert wrapper.from_config(layer.get_config()).compatible
    assert keras.saving.get_registered_name(wrapper) == f"normwise>{name}"


def test_a_new_layer_is_not_the_old_arithmetic():
    assert not SpectralNormalization(keras.layers.Dense(4)).compatible
    layer = SpectralNormalization.from_config(
        SpectralNormalization(keras.layers.Dense(4)).get_config()
    )
    assert not layer.compatible


@both
def test_what_cannot_be_wrapped(wrapper):
    name = wrapper.__name__
    with pytest.raises(TypeError, match=rf"layer=3 is no Keras layer; give {name} an instance"):
        wrapper(3)
    with pytest.raises(ValueError, match="LSTMCell is a recurrent cell, which has to be called"):
        wrapper(keras.layers.LSTMCell(3))
    with pytest.raises(ValueError, match=f"Flatten has no weight to normalize: {name} needs"):
        wrapper(keras.layers.Flatten())(samples((2, 3)))
    cells = keras.layers.RNN([keras.layers.SimpleRNNCell(2), keras.layers.SimpleRNNCell(2)])
    with pytest.raises(ValueError, match=r"StackedRNNCells has no weight .* a recurrent_kernel"):
        wrap(wrapper, cells)(samples((2, 3, 2)))
    adapted = keras.layers.Dense(4, lora_rank=1)
    with pytest.raises(ValueError, match=r"enable_lora\(1\) of .* would take away the kernel"):
        wrapper(adapted)(samples((2, 3)))
    with pytest.raises(ValueError, match="n has no weights to remove the norm from; call it"):
        wrapper(keras.layers.Dense(4), name="n").remove()


def test_weight_norm_says_what_is_wrong():
    with pytest.raises(TypeError, match="data_init='no' is neither True nor False"):
        WeightNormalization(keras.layers.Dense(4), data_init="no")
    with pytest.raises(ValueError, match="Embedding has no weight to normalize"):
        WeightNormalization(keras.layers.Embedding(3, 4))(np.zeros((2, 3), "int32"))
    message = r"sets g of shape \(3,\) and the bias of shape \(4,\) by .* use data_init=False"
    with pytest.raises(ValueError, match=message):
        WeightNormalization(keras.layers.Conv1DTranspose(4, 2))(samples((2, 5, 3)))
    unknown = keras.layers.EinsumDense("bsf,fh->bhs", output_shape=(8, None))
    with pytest.raises(ValueError, match="which does not fit them; use data_init=False"):
        WeightNormalization(unknown).build((None, None, 5))


@pytest.mark.parametrize("iterations", [0, -1, 1.5, True, "1", None])
def test_spectral_norm_says_what_is_wrong(iterations):
    message = f"power_iterations={iterations!r} is no number of iterations; expected a positive int"
    with pytest.raises(ValueError, match=message):
        SpectralNormalization(keras.layers.Dense(4), power_iterations=iterations)
    with pytest.raises(TypeError, match="compatible=1 is neither True nor False"):
        SpectralNormalization(keras.layers.Dense(4), compatible=1)
