"""Batch normalization folded into the layers beside it: predictions stay, or it is kept."""

import keras
import numpy as np
import pytest
from frameworks import to_numpy
from keras import layers

from normwise.models import comparison, fold_batch_norm, folding, surgery

BACKEND = keras.backend.backend()
# TensorFlow has no convolution of channels_first on CPUs.
FORMATS = ("channels_last",) if BACKEND == "tensorflow" else ("channels_last", "channels_first")
SWITCHES = [{"center": c, "scale": s} for c in (True, False) for s in (True, False)]
CHANNELS = 4

# Every kind of layer, with how many axes its input has between batch and channels.
LINEAR = {
    "Dense": (lambda **o: layers.Dense(6, **o), 0),
    "Dense of sequences": (lambda **o: layers.Dense(6, **o), 1),
    "Conv1D": (lambda **o: layers.Conv1D(6, 3, **o), 1),
    "Conv2D": (lambda **o: layers.Conv2D(6, (3, 2), **o), 2),
    "Conv3D": (lambda **o: layers.Conv3D(6, 2, **o), 3),
    "Conv2D, strides": (lambda **o: layers.Conv2D(6, 3, strides=2, **o), 2),
    "Conv2D, dilated": (lambda **o: layers.Conv2D(6, 2, dilation_rate=2, **o), 2),
    "Conv2D, groups": (lambda **o: layers.Conv2D(6, 3, groups=2, **o), 2),
    "Conv2D, a group each": (lambda **o: layers.Conv2D(8, 3, groups=4, **o), 2),
    "Conv1DTranspose": (lambda **o: layers.Conv1DTranspose(6, 3, strides=2, **o), 1),
    "Conv2DTranspose": (lambda **o: layers.Conv2DTranspose(6, 3, **o), 2),
    "Conv3DTranspose": (lambda **o: layers.Conv3DTranspose(6, 2, **o), 3),
    "DepthwiseConv1D": (lambda **o: layers.DepthwiseConv1D(3, depth_multiplier=2, **o), 1),
    "DepthwiseConv2D": (lambda **o: layers.DepthwiseConv2D(3, depth_multiplier=2, **o), 2),
    "SeparableConv1D": (lambda **o: layers.SeparableConv1D(6, 3, depth_multiplier=2, **o), 1),
    "SeparableConv2D": (lambda **o: layers.SeparableConv2D(6, 3, depth_multiplier=2, **o), 2),
}
CASES = [
    (name, data_format)
    for name in LINEAR
    for data_format in (FORMATS if "Dense" not in name else FORMATS[:1])
]
every_case = pytest.mark.parametrize(("name", "data_format"), CASES)


@pytest.fixture(autouse=True)
def drawn_by_numpy(monkeypatch):
    """Draw kernels without JAX, which compiles that for each shape: most of the time, else."""

    def draw(_, shape, dtype=None):
        deviation = (shape[-1] / np.prod(shape)) ** 0.5
        drawn = np.random.default_rng(0).normal(0.0, deviation, shape)
        return keras.ops.convert_to_tensor(drawn.astype("float32"), dtype)

    monkeypatch.setattr(keras.initializers.GlorotUniform, "__call__", draw)


def norm(**options):
    return layers.BatchNormalization(name="norm", **options)


def conv(filters=6, size=3, **options):
    return layers.Conv2D(filters, size, name="conv", **options)


def sequential(*chosen, shape=(9, 8, CHANNELS)):
    return randomize(keras.Sequential([keras.Input(shape), *chosen]))


def functional(call, shape=(9, 8, CHANNELS), **options):
    inputs = keras.Input(shape)
    return randomize(keras.Model(inputs, call(inputs), **options))


def randomize(model, seed=0):
    """Give all weights values, as batch norms have after some training."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if weight.name in ("gamma", "moving_variance"):
            weight.assign(rng.uniform(0.5, 2.0, weight.shape))
        else:
            weight.assign(rng.normal(0.0, 0.5, weight.shape))
    return model


def samples(model, seed=1):
    (shape,) = [each.shape for each in model.inputs]
    return np.random.default_rng(seed).normal(size=(2, *shape[1:])).astype("float32")


def assert_predicts_the_same(model, folded, factor=1.0):
    x = samples(model)
    pairs = [keras.tree.flatten(each(x, training=False)) for each in (model, folded)]
    for was, now in zip(*(map(to_numpy, outputs) for outputs in pairs), strict=True):
        was, now = was.astype("float64"), now.astype("float64")
        assert np.isfinite(was).all()
        assert was.any()
        assert np.abs(was - now).max() <= factor * 1e-5 * np.abs(was).max()


def assert_folded(model, *records, factor=1.0):
    """That each batch norm went where the records say, and predictions are what they were."""
    folded, report = fold_batch_norm(model)
    assert [(record.done, record.why) for record in report] == [(each, "") for each in records]
    assert all(record.changed for record in report)
    kinds = [type(layer) for _, layer in surgery.layers_of(folded)]
    assert layers.BatchNormalization not in kinds
    assert_predicts_the_same(model, folded, factor)
    return folded


def assert_kept(model, why):
    folded, report = fold_batch_norm(model)
    assert [(r.done, r.why, r.changed) for r in report] == [("kept", why, False)]
    assert isinstance(dict(surgery.layers_of(folded))[report[0].layer], layers.BatchNormalization)
    for was, now in zip(model.weights, folded.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(was), to_numpy(now))


def made(kind, data_format, **options):
    """A layer of the table, the axis of its channels, and the shape of its input."""
    make, rank = LINEAR[kind]
    if "Dense" not in kind:
        options["data_format"] = data_format
    shape = (9, 8, 7)[:rank]
    first = data_format == "channels_first"
    shape = (CHANNELS, *shape) if first else (*shape, CHANNELS)
    return make(**options), 1 if first else -1, shape


def branches(name, data_format, before):
    """A model of an output for each of SWITCHES: a layer of the table, and a norm beside it."""
    pairs = []
    for at, switches in enumerate(SWITCHES):
        # Without a bias, too, and with.
        layer, axis, shape = made(name, data_format, name=f"linear{at}", use_bias=at % 3 > 0)
        pair = layer, layers.BatchNormalization(axis=axis, name=f"norm{at}", **switches)
        pairs.append(pair if before else pair[::-1])
    return functional(lambda x: [second(first(x)) for first, second in pairs], shape)


@every_case
def test_into_the_layer_before(name, data_format):
    model = branches(name, data_format, before=True)
    folded = assert_folded(model, *(f"folded into linear{at}" for at in range(4)))
    assert all(folded.get_layer(f"linear{at}").use_bias for at in range(4))


@every_case
def test_into_the_layer_after(name, data_format):
    model = branches(name, data_format, before=False)
    if "Transpose" not in name:
        assert_folded(model, *(f"folded into linear{at}" for at in range(4)))
        return
    _, report = fold_batch_norm(model)
    assert [record.why for record in report] == [
        f"before it, the model {model.name} begins; after it, linear{at} is transposed: its "
        "outputs take a shift unequally often"
        for at in range(4)
    ]


def centred(model):
    """Take every shift from the batch norms of a model."""
    for weight in model.weights:
        if weight.name in ("beta", "moving_mean"):
            weight.assign(np.zeros(weight.shape))
    return model


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.Conv2D(6, 3, padding="same", strides=2, name="linear"),
        lambda: layers.DepthwiseConv2D(3, padding="same", name="linear"),
        lambda: layers.SeparableConv2D(6, 3, padding="same", name="linear"),
        lambda: layers.Conv2DTranspose(6, 3, padding="same", strides=2, name="linear"),
    ],
)
def test_padding_matters_only_to_a_shift_before_it(layer):
    assert_folded(sequential(layer(), norm()), "folded into linear")
    model = sequential(norm(), layer())
    _, report = fold_batch_norm(model)
    assert not report[0].changed
    assert "linear pads its input with zeros" in report[0].why or "transposed" in report[0].why
    folded = assert_folded(centred(model), "folded into linear")
    assert folded.count_params() == layer_params(model)


def layer_params(model):
    """How many numbers the layer beside a norm has, a bias included."""
    return model.get_layer("linear").count_params()


@pytest.mark.parametrize("strides", [1, 2, 3])
def test_a_kernel_of_one_position_reaches_no_padding(strides):
    layer = conv(size=1, padding="same", strides=strides)
    assert_folded(sequential(norm(), layer), "folded into conv")


def test_a_causal_convolution():
    def causal(size):
        return layers.Conv1D(6, size, padding="causal", dilation_rate=2, name="conv")

    assert_folded(sequential(causal(3), norm(), shape=(9, 4)), "folded into conv")
    assert_folded(sequential(norm(), causal(1), shape=(9, 4)), "folded into conv")
    model = sequential(norm(), causal(3), shape=(9, 4))
    assert_kept(model, f"before it, the model {model.name} begins; after it, {PADS}")


class Doubled(layers.Conv2D):
    """A layer that is more than the one it is a kind of."""

    def call(self, inputs):
        return 2 * super().call(inputs)


class Clipped(layers.BatchNormalization):
    """A norm that does more than batch normalization."""

    def call(self, inputs, training=None, mask=None):
        return keras.ops.clip(super().call(inputs, training=training, mask=mask), -1, 1)


class Held(layers.Layer):
    """A layer that calls others in a way of its own."""

    def __init__(self, *inner, **options):
        super().__init__(**options)
        self.inner = inner

    def build(self, shape):
        for each in self.inner:
            if not each.built:
                each.build(shape)
            shape = each.compute_output_shape(shape)

    def call(self, inputs):
        for each in self.inner:
            inputs = each(inputs)
        return inputs

    def get_config(self):
        inner = [keras.saving.serialize_keras_object(each) for each in self.inner]
        return {**super().get_config(), "inner": inner}

    @classmethod
    def from_config(cls, config):
        inner = map(keras.saving.deserialize_keras_object, config.pop("inner"))
        return cls(*inner, **config)


def shared_layer(x):
    shared = conv(CHANNELS, padding="same")
    return shared(norm()(shared(x)))


def shared_norm(x):
    shared = norm()
    return shared(conv(CHANNELS)(shared(x)))


def used_twice(x):
    y = conv()(x)
    return layers.Add(name="add")([y, norm()(y)])


def an_output(x):
    y = conv()(x)
    return [y, norm()(y)]


def passed_on_twice(x):
    y = norm()(x)
    return layers.Concatenate()([conv()(y), layers.Conv2D(6, 3, name="other")(y)])


def in_a_model(*inner, **options):
    def call(x):
        nested = keras.Sequential([keras.Input(x.shape[1:]), *inner], name="inner")
        return layers.ReLU(name="relu")(nested(x, **options))

    return call


def a_border_before(x):
    return in_a_model(norm(), layers.ReLU(name="last"))(conv()(x))


BEGINS = "before it, the model outer begins"
ENDS = "after it, it makes an output of the model outer"
PADS = "conv pads its input with zeros, which the norm does not shift"
KEPT = {
    "nothing beside it": (norm(), f"{BEGINS}; {ENDS}"),
    "other layers": (
        lambda x: layers.ReLU(name="after")(norm()(layers.MaxPooling2D(name="pool")(x))),
        "before it, pool is a MaxPooling2D; after it, after is a ReLU",
    ),
    "an operation": (
        lambda x: layers.ReLU(name="after")(norm()(keras.ops.exp(x))),
        "before it, {exp} is a Exp; after it, after is a ReLU",
    ),
    "an activation": (
        lambda x: norm()(conv(activation="relu")(x)),
        f"before it, conv has the activation relu; {ENDS}",
    ),
    "another axis before": (
        lambda x: norm(axis=1)(conv()(x)),
        f"before it, conv has its channels on axis 3, the norm on 1; {ENDS}",
    ),
    "another axis after": (
        lambda x: conv()(norm(axis=2)(x)),
        f"{BEGINS}; after it, conv has its channels on axis 3, the norm on 2",
    ),
    "padding": (lambda x: conv(padding="same")(norm()(x)), f"{BEGINS}; after it, {PADS}"),
    "a subclass": (
        lambda x: norm()(Doubled(6, 3, name="conv")(x)),
        "before it, conv is a Doubled, which may compute something else than a Conv2D; " + ENDS,
    ),
    "a norm of a subclass": (
        lambda x: Clipped()(conv()(x)),
        "its class may compute something else than a BatchNormalization",
    ),
    "another reader": (
        used_twice,
        "before it, 2 layers take what conv makes; after it, add is a Add",
    ),
    "an output": (an_output, f"before it, conv makes an output of the model outer; {ENDS}"),
    "two readers": (passed_on_twice, f"{BEGINS}; after it, 2 layers take what it makes"),
    "a layer called twice": (
        shared_layer,
        "before it, conv is called 2 times; after it, conv is called 2 times",
    ),
    "a norm called twice": (shared_norm, "it is called 2 times"),
    "in training": (lambda x: norm()(conv()(x), training=True), "it is called with training=True"),
    "a model in training": (
        in_a_model(conv(), norm(), training=True),
        "it is called with training=True",
    ),
    "the border before": (
        a_border_before,
        "before it, the model inner begins; after it, last is a ReLU",
    ),
    "the border after": (
        in_a_model(layers.ReLU(name="first"), norm()),
        "before it, first is a ReLU; after it, it makes an output of the model inner",
    ),
    "a model before": (
        lambda x: norm()(keras.Sequential([keras.Input(x.shape[1:]), conv()], name="inner")(x)),
        f"before it, inner is a Sequential; {ENDS}",
    ),
    "a layer of layers": (
        Held(conv(), norm(), name="held"),
        "its caller is not a graph: held is a Held",
    ),
    "a wrapper": (
        lambda x: layers.TimeDistributed(norm(), name="steps")(conv()(x)),
        "its caller is not a graph: steps is a TimeDistributed",
    ),
}


@pytest.mark.parametrize(("call", "why"), KEPT.values(), ids=KEPT)
def test_what_is_kept_and_why(call, why):
    inputs = keras.Input((9, 8, CHANNELS))
    outputs = call(inputs)
    model = randomize(keras.Model(inputs, outputs, name="outer"))
    if "{exp}" in why:
        why = why.format(exp=next(each.name for each in model.operations if "exp" in each.name))
    assert_kept(model, why)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda dense: dense.quantize("int8"), "is quantized to int8"),
        (lambda dense: dense.enable_lora(2), "has a LoRA"),
    ],
)
def test_a_layer_whose_kernel_is_not_all(change, what, before):
    dense = layers.Dense(6, name="dense")
    model = sequential(*((dense, norm()) if before else (norm(), dense)), shape=(CHANNELS,))
    change(dense)
    _, report = fold_batch_norm(model)
    assert f"{'before' if before else 'after'} it, dense {what}" in report[0].why
    assert not report[0].changed


def test_a_norm_with_a_mask():
    """An Identity would give what comes after it the mask of its input, and not that one."""
    inputs = keras.Input((9, CHANNELS))
    x = layers.Dense(6, name="dense")(layers.Masking(name="masking")(inputs))
    assert_kept(randomize(keras.Model(inputs, norm()(x))), "it is called with a mask")


class Net(keras.Model):
    """A model that is no graph, with one in it."""

    def __init__(self, **options):
        super().__init__(**options)
        inner = [keras.Input((9, 8, CHANNELS)), conv(), layers.BatchNormalization(name="first")]
        self.backbone = keras.Sequential(inner, name="backbone")
        self.norm = norm()

    def call(self, inputs):
        return self.norm(self.backbone(inputs))


def test_a_model_that_is_no_graph():
    model, no_graph = Net(name="net"), "its caller is not a graph: net is a Net"
    model(np.zeros((2, 9, 8, CHANNELS), "float32"))
    _, report = fold_batch_norm(model)
    assert {record.layer: record.why for record in report} == {
        "backbone/first": f"{no_graph}; fold each model in it by itself",
        "norm": no_graph,
    }
    assert_folded(model.backbone, "folded into conv")


def test_into_the_layer_after_where_the_one_before_will_not_do():
    before = layers.Conv2D(5, 3, activation="relu", name="before")
    assert_folded(sequential(before, norm(), conv()), "folded into conv")


def test_two_norms_into_one_layer():
    first, last = (layers.BatchNormalization(name=name) for name in ("first", "last"))
    folded = assert_folded(sequential(first, conv(), last), "folded into conv", "folded into conv")
    assert [layer.name for layer in folded.layers] == ["first", "conv", "last"]


@pytest.mark.parametrize("times", [1, 2])
def test_models_in_models(times):
    """A model that is called twice is folded once."""
    inputs = keras.Input((9, 8, CHANNELS))
    deepest = keras.Sequential([keras.Input((9, 8, CHANNELS)), conv(CHANNELS), norm()], name="b")
    middle_inputs = keras.Input((9, 8, CHANNELS))
    middle = keras.Model(middle_inputs, layers.ReLU()(deepest(middle_inputs)), name="a")
    held = Held(keras.Sequential([keras.Input((7, 6, CHANNELS)), conv(), norm()], name="c"))
    outputs = [held(middle(inputs * number)) for number in range(1, times + 1)]
    model = randomize(keras.Model(inputs, outputs))
    folded = assert_folded(model, "folded into conv", "folded into conv")
    _, report = fold_batch_norm(model)
    assert [record.layer for record in report] == ["a/b/norm", f"{held.name}/c/norm"]
    assert folded.get_layer("a").get_layer("b").get_layer("conv").use_bias


def test_the_graph_stays_what_it_was():
    """Its names, and what may be asked of it, as the output of a norm."""
    model = sequential(conv(use_bias=False), norm(), layers.ReLU(name="relu"))
    folded = assert_folded(model, "folded into conv")
    assert [layer.name for layer in folded.layers] == [layer.name for layer in model.layers]
    assert folded.get_layer("conv").bias.path == folded.get_layer("conv").kernel.path.replace(
        "kernel", "bias"
    )
    parts = (keras.Model(each.inputs[0], each.get_layer("norm").output) for each in (model, folded))
    assert_predicts_the_same(*parts)


def test_the_model_given_stays_as_it_is():
    inputs = keras.Input((6, CHANNELS), batch_size=2)
    x = layers.Conv1D(5, 2, use_bias=False, name="conv")(inputs)
    x = layers.GRU(3, stateful=True, recurrent_initializer="zeros")(norm()(x))
    model = randomize(keras.Model(inputs, layers.Dropout(0.5)(x)))
    before = [to_numpy(each).copy() for each in model.variables]
    config = model.get_config()
    _, report = fold_batch_norm(model)
    assert report[0].changed
    assert model.get_config() == config
    for was, now in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(to_numpy(now), was)


@pytest.mark.parametrize("training", [None, False])
def test_saved_and_loaded(training, tmp_path):
    options = {} if training is None else {"training": training}
    inputs = keras.Input((9, 8, CHANNELS))
    model = keras.Model(inputs, layers.ReLU()(norm()(conv(use_bias=False)(inputs), **options)))
    folded = assert_folded(randomize(model), "folded into conv")
    folded.save(tmp_path / "folded.keras")
    loaded = keras.models.load_model(tmp_path / "folded.keras")
    x = samples(model)
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(folded(x)))
    assert type(loaded.get_layer("norm")) is layers.Identity


def test_what_it_was_compiled_with():
    model = sequential(layers.Dense(3, use_bias=False, name="dense"), norm(), shape=(CHANNELS,))
    model.compile("adam", "mse", metrics=["mae"])
    x = samples(model)
    y = np.ones((2, 3), "float32")
    model.fit(x, y, verbose=0)
    folded = assert_folded(model, "folded into dense")
    was, now = (each.evaluate(x, y, verbose=0, return_dict=True) for each in (model, folded))
    assert was.keys() == now.keys() == {"loss", "mae"}
    np.testing.assert_allclose([*now.values()], [*was.values()], rtol=1e-5)
    folded.fit(x, y, verbose=0)
    _, report = fold_batch_norm(model)
    assert report.notes[-1] == "for inference: to train this model is to train another one"


@pytest.mark.parametrize(
    ("policy", "weights_dtype"), [("mixed_bfloat16", "float32"), ("float16", "float16")]
)
def test_the_dtypes_stay(policy, weights_dtype):
    inputs = keras.Input((9, 8, CHANNELS))
    x = layers.Conv2D(6, 3, use_bias=False, dtype=policy, name="conv")(inputs)
    model = randomize(keras.Model(inputs, norm(dtype=policy)(x)))
    eps = 2**-7 if "bfloat16" in policy else 2**-10
    folded = assert_folded(model, "folded into conv", factor=eps / 2**-23 / 20)
    assert {weight.dtype for weight in folded.weights} == {weights_dtype}
    given = samples(model)
    assert folded(given).dtype == model(given).dtype


def test_weights_that_are_not_finite():
    model = sequential(conv(), norm(epsilon=0.0))
    model.get_layer("norm").moving_variance.assign(np.zeros(6))
    assert_kept(model, "its weights give a scale or a shift that is not finite")
    inputs = keras.Input((CHANNELS,))
    dense = layers.Dense(6, dtype="float16", name="dense")
    model = randomize(keras.Model(inputs, norm(epsilon=1e-10)(dense(inputs)), name="outer"))
    model.get_layer("norm").moving_variance.assign(np.full(6, 1e-10))
    _, report = fold_batch_norm(model)
    assert "dense would have weights that are not finite in float16" in report[0].why


def test_an_input_of_integers():
    inputs = keras.Input((CHANNELS,), dtype="int32")
    model = randomize(keras.Model(inputs, layers.Dense(6, name="dense")(norm()(inputs))))
    _, report = fold_batch_norm(model)
    assert "after it, dense would be given int32" in report[0].why


@pytest.mark.parametrize("wrong", [1e-3, np.nan])
def test_a_fold_that_moves_predictions_is_refused(wrong, monkeypatch):
    give = folding._give

    def give_wrongly(layer, kernels, bias):
        give(layer, kernels, bias)
        layer.bias.assign(layer.bias + wrong)

    monkeypatch.setattr(folding, "_give", give_wrongly)
    model = sequential(conv(), norm())
    with pytest.raises(ValueError, match=r"folded: its output 0, .* moves by (0\.001|nan)"):
        fold_batch_norm(model)


def test_a_mean_of_many_deviations():
    """Nothing is wrong with the weights, and the rounding errors are those of the layer."""
    model = sequential(layers.Dense(6, name="dense"), norm(), shape=(CHANNELS,))
    model.get_layer("norm").moving_mean.assign(np.full(6, 100.0))
    assert_folded(model, "folded into dense")


def test_no_model_or_none_yet():
    with pytest.raises(TypeError, match="is no model"):
        fold_batch_norm(norm())
    with pytest.raises(ValueError, match="has no weights yet"):
        fold_batch_norm(keras.Sequential([conv(), norm()]))


def test_without_a_batch_norm():
    model = sequential(conv())
    folded, report = fold_batch_norm(model)
    assert not len(report)
    assert not report.notes
    assert_predicts_the_same(model, folded)


REAL = {
    "ResNet50V2": keras.applications.ResNet50V2,
    "MobileNetV3Small": keras.applications.MobileNetV3Small,
}


@pytest.mark.parametrize("name", REAL)
def test_real_models(name, monkeypatch):
    if BACKEND == "jax":
        # As one program: to compile each operation for each shape takes ten times as long.
        monkeypatch.setattr(comparison, "_predict", lambda model, x: [model.predict_on_batch(x)])
    model = realistic(REAL[name](weights=None, input_shape=(32, 32, 3), classes=10))
    folded, report = fold_batch_norm(model)
    kept = {record.why.partition(",")[0] for record in report if not record.changed}
    assert len(report.changed) == {"ResNet50V2": 32, "MobileNetV3Small": 34}[name]
    assert len(report) == {"ResNet50V2": 49, "MobileNetV3Small": 34}[name]
    assert kept <= {"before it"}
    x = samples(model)
    was, now = (each.predict_on_batch(x) for each in (model, folded))
    assert np.abs(was - now).max() <= 1e-5 * np.abs(was).max()


def realistic(model):
    """Statistics about what a trained model has, so that activations neither vanish nor grow."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if weight.name in ("gamma", "moving_variance"):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
        elif weight.name in ("beta", "moving_mean", "bias"):
            weight.assign(rng.normal(0.0, 0.1, weight.shape))
    return model


@keras.saving.register_keras_serializable("tests")
class Backbone(keras.Model):
    """As KerasHub's: a functional model whose config says how it is made, and not of what."""

    def __init__(self, filters=4, **kwargs):
        inputs = keras.Input((6, 6, 3))
        x = keras.layers.Conv2D(filters, 3, use_bias=False, name="conv")(inputs)
        outputs = keras.layers.BatchNormalization(name="norm")(x)
        super().__init__(inputs, outputs, **kwargs)
        self.filters = filters

    def get_config(self):
        return {"filters": self.filters, "name": self.name}


def test_a_model_whose_config_does_not_say_its_layers():
    folded, report = fold_batch_norm(Backbone())
    assert type(folded) is Backbone
    assert (report[0].done, report[0].why) == ("folded into conv", surgery.NOT_TO_BE_SAVED)
