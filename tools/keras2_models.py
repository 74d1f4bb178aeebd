"""Make tests/golden/keras2_models.zip: small models of what a model of Keras 2 may be made of.

It needs an environment of its own, with Keras 2 (tensorflow-cpu==2.14.1,
tensorflow-addons==0.23.0, numpy<2):

    python tools/keras2_models.py

Each model is there as `NAME.h5` and `NAME.keras`, three as `NAME.savedmodel`, its weights as
`NAME.weights.h5`, `NAME.legacy.h5` and the checkpoint `NAME.checkpoint`, and in `NAME.npz` inputs
`x0`, `x1`... and predictions `y0`, `y1`...
"""

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tensorflow_addons as tfa

OUT = Path(__file__).parents[1] / "tests" / "golden" / "keras2_models.zip"
keras, layers = tf.keras, tf.keras.layers


def nested():
    """A model in a model, twice; a layer used twice; one that is not trained; two outputs."""
    shared = layers.Dense(4, name="shared")
    inner_input = keras.Input((4,), name="inner_input")
    x = layers.BatchNormalization(name="bn")(layers.Dense(4, name="z_first")(inner_input))
    x = tfa.layers.GroupNormalization(groups=2, name="gn")(x)
    branch = layers.Dense(4, name="a_branch")(inner_input)
    inner = keras.Model(inner_input, layers.Add(name="sum")([x, branch]), name="inner")
    block = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, trainable=False), layers.BatchNormalization()],
        name="block",
    )
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    y = inner(shared(a))
    z = block(inner(b))
    out = layers.Concatenate(name="both")([y, z, block(y)])
    return keras.Model([a, b], [layers.Dense(2, name="head")(out), shared(z)], name="outer")


def recurrent():
    """Wrappers and cells in layers; an initial state; a mask."""
    words = keras.Input((6,), dtype="int32", name="words")
    x = layers.Embedding(7, 4, mask_zero=True)(words)
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
    x = layers.TimeDistributed(keras.Sequential([keras.Input((6,)), layers.Dense(4)]))(x)
    x, state = layers.GRU(4, return_sequences=True, return_state=True)(x)
    x = layers.GRU(4, return_sequences=True)(x, initial_state=state)
    cells = [layers.LSTMCell(3), tfa.rnn.LayerNormSimpleRNNCell(3), layers.GRUCell(3)]
    x = layers.RNN(cells, return_sequences=True)(x)
    x = tfa.layers.WeightNormalization(layers.SimpleRNN(3), data_init=False)(x)
    return keras.Model(words, x)


def axes():
    """Norms over several axes, in a policy of mixed precision."""
    x = y = keras.Input((4, 6), dtype="float32")
    policy = keras.mixed_precision.Policy("mixed_float16")
    y = layers.LayerNormalization(axis=[1, 2], dtype=policy)(y)
    y = layers.LayerNormalization(axis=1)(y)
    y = layers.BatchNormalization(axis=1, dtype=policy)(y)
    y = tfa.layers.InstanceNormalization(axis=2, gamma_initializer="random_uniform")(y)
    return keras.Model(x, layers.Dense(3, dtype=policy, kernel_regularizer="l2")(y))


def arithmetic():
    """TensorFlow's functions between the layers."""
    x, y = keras.Input((4, 6), name="x"), keras.Input((4, 6), name="y")
    z = 2.0 - x * y + 1.0
    z = tf.concat([z, x[:, :2], tf.nn.relu(y)[:, 1:3]], axis=1)
    z = layers.MultiHeadAttention(2, 3)(z, z, attention_mask=None)
    z = tf.reduce_mean(z, axis=[1], keepdims=True) / (1.0 + tf.square(y))
    z = tf.transpose(tf.reshape(z, [-1, 6, 4]), perm=[0, 2, 1])
    z = tf.matmul(z, x, transpose_b=True)
    return keras.Model({"x": x, "y": y}, layers.Dense(2)(tf.nn.softmax(z, axis=-1)))


def convolutions():
    """Layers whose configs Keras 3 refuses as Keras 2 wrote them; TensorFlow Addons' wrappers."""
    return keras.Sequential(
        [
            layers.DepthwiseConv2D(3, depth_multiplier=2, input_shape=(8, 8, 2)),
            layers.SeparableConv2D(4, 3, activation="relu"),
            tfa.layers.SpectralNormalization(layers.Conv2D(4, 2, use_bias=False)),
            layers.LeakyReLU(alpha=0.2),
            layers.Conv2DTranspose(3, 2, strides=2),
            tfa.layers.FilterResponseNormalization(learned_epsilon=True),
            tfa.layers.TLU(affine=True),
            layers.PReLU(shared_axes=[1, 2]),
            layers.SpatialDropout2D(0.5),
            layers.ThresholdedReLU(theta=0.1),
            layers.GlobalAveragePooling2D(),
            tfa.layers.WeightNormalization(layers.Dense(3)),
        ]
    )


@keras.utils.register_keras_serializable("tests")
class Scale(layers.Layer):
    """A layer of its own, with a weight."""

    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def build(self, input_shape):
        """Create the weight."""
        self.scale = self.add_weight("scale", input_shape[-1:], initializer="ones")

    def call(self, x):
        """Multiply."""
        return x * self.scale * self.factor

    def get_config(self):
        """The arguments of the layer."""
        return {**super().get_config(), "factor": self.factor}


class Shift(Scale):
    """One that is not registered."""

    def call(self, x):
        """Add."""
        return x + self.scale * self.factor


def double(x):
    """An activation of its own."""
    return 2.0 * x


def custom():
    """Classes and a function of the user's."""
    return keras.Sequential(
        [keras.Input((4,)), Scale(3.0), Shift(2.0), layers.Dense(2, activation=double)]
    )


def code():
    """A layer whose code is in the file."""
    return keras.Sequential([keras.Input((4,)), layers.Lambda(lambda x: x + 1.0), layers.Dense(2)])


MODELS = [nested, recurrent, axes, arithmetic, convolutions, custom, code]
# TensorFlow 2.14 cannot save WeightNormalization around a recurrent layer so.
SAVED_MODELS = [nested, arithmetic, convolutions]


def inputs_of(model, rng):
    """Random inputs in a batch of 3."""
    for each in model.inputs:
        shape = (3, *each.shape[1:])
        if each.dtype.is_integer:
            yield rng.integers(0, 7, shape).astype("int32")
        else:
            yield rng.normal(size=shape).astype("float32")


def write(make, folder, rng):
    """One model in every format."""
    keras.utils.set_random_seed(0)
    keras.backend.clear_session()
    model = make()
    xs = list(inputs_of(model, rng))
    given = dict(zip(model.input_names, xs, strict=True)) if isinstance(model.input, dict) else xs
    given = given[0] if isinstance(given, list) and len(given) == 1 else given
    # What initializes itself by its first data does so now; then every weight is some number.
    model(given)
    for weight in model.weights:
        if weight.dtype.is_floating and "data_dep_init" not in weight.name:
            value = rng.uniform(0.2, 1.2, weight.shape)
            if not any(part in weight.name for part in ("gamma", "variance", "/g:")):
                value *= rng.choice([-1.0, 1.0], weight.shape)
            weight.assign(tf.cast(value.astype("float32"), weight.dtype))
    ys = tf.nest.flatten(model(given))
    arrays = {f"x{i}": x for i, x in enumerate(xs)} | {f"y{i}": y for i, y in enumerate(ys)}
    name = str(folder / make.__name__)
    np.savez_compressed(f"{name}.npz", **arrays)
    model.compile("adam", "mse")
    options = {"include_optimizer": make is nested}
    model.save(f"{name}.h5", **options)
    model.save(f"{name}.keras")
    if make in SAVED_MODELS:
        model.save(f"{name}.savedmodel", save_format="tf", **options)
        for unread in ("assets", "fingerprint.pb", "saved_model.pb"):
            path = Path(f"{name}.savedmodel") / unread
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    model.save_weights(f"{name}.weights.h5")
    model.save_weights(f"{name}.checkpoint", save_format="tf")
    model.save_weights(f"{name}.legacy.h5")


def main():
    """Write all models to one archive: an HDF5 file is mostly zeros."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for make in MODELS:
            write(make, folder, rng)
        (folder / "checkpoint").unlink()
        OUT.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(OUT, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    info = zipfile.ZipInfo(str(path.relative_to(folder)))
                    info.compress_type = zipfile.ZIP_DEFLATED
                    archive.writestr(info, path.read_bytes())


if __name__ == "__main__":
    main()
