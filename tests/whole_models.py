"""Models for the tests of normwise.models, and whether one was left as it was."""

import json

import keras
import numpy as np
from frameworks import to_numpy


@keras.saving.register_keras_serializable("tests")
class Block(keras.layers.Layer):
    """A layer that makes norms itself: its config does not say which."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = keras.layers.LayerNormalization(name="first")
        self.parts = [keras.layers.Dense(6), keras.layers.BatchNormalization(name="last")]

    def build(self, input_shape):
        self.first.build(input_shape)
        self.parts[0].build(input_shape)
        self.parts[1].build(input_shape)

    def call(self, x, training=None):
        return self.parts[1](self.parts[0](self.first(x)), training=training)


class Subclassed(keras.Model):
    """A model whose layers are plain attributes, and whose class nobody has registered."""

    def __init__(self, width=6, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(width)
        self.norm = keras.layers.LayerNormalization(name="norm")
        self.block = Block(name="block")

    def call(self, x, training=None):
        return self.block(self.norm(self.dense(x)), training=training)


def functional():
    """A norm that is called twice, a block, and a nested model."""
    inputs = keras.Input((4, 6))
    twice = keras.layers.LayerNormalization(name="twice")
    x = twice(inputs)
    x = twice(keras.layers.Dense(6)(x)) + x
    x = Block(name="block")(x)
    x = sequential()(x)
    return keras.Model(inputs, keras.layers.Dense(3)(x), name="functional")


def sequential():
    """A small stack of norms."""
    return keras.Sequential(
        [
            keras.Input((4, 6)),
            keras.layers.GroupNormalization(3, name="group"),
            keras.layers.BatchNormalization(name="batch"),
            keras.layers.RMSNormalization(name="rms"),
            keras.layers.Dense(6),
        ],
        name="stack",
    )


def subclassed():
    """Built by a call."""
    model = Subclassed(name="subclassed")
    model(np.zeros((2, 4, 6), "float32"))
    return model


SMALL = {"functional": functional, "sequential": sequential, "subclassed": subclassed}


def images(*shape, seed=0):
    """Random numbers, float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def randomize(model, seed=0):
    """Random weights, of which none is what it begins with; variances are positive."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if weight.dtype.startswith(("float", "bfloat")):
            old = to_numpy(weight)
            weight.assign(old + rng.uniform(0.02, 0.2, old.shape).astype("float32"))
    return model


def trained(model, x, y, steps=1, **options):
    """The loss of each step of SGD or another optimizer; compiles the model if there is none."""
    if not model.compiled:
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", **options)
    return [float(model.train_on_batch(x, y)) for _ in range(steps)]


class Untouched:
    """That a model is left as it was, bit for bit: weights, config, trainability, optimizer."""

    def __init__(self, model):
        self.model, self.before = model, self.state(model)

    @staticmethod
    def state(model):
        config = json.dumps(keras.saving.serialize_keras_object(model), sort_keys=True)
        optimizer = getattr(model, "optimizer", None)
        slots = optimizer.variables if optimizer is not None else []
        layers = model._flatten_layers()
        return (
            config,
            [(type(layer), layer.trainable, id(layer)) for layer in layers],
            [(v.path, id(v), to_numpy(v).tobytes()) for v in [*model.weights, *slots]],
        )

    def check(self):
        assert self.state(self.model) == self.before
