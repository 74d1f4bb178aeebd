"""The model of TensorFlow Addons' normalization tutorial, with the norm to be chosen."""

import keras

from normwise import geometry, layers
from normwise.tutorial import NORMS
from normwise.tutorial.data import CLASS_COUNT


def norm_layer(norm: str) -> keras.layers.Layer | None:
    """The layer that the tutorial means by `group`, `instance`, `layer` or `batch`; None for none.

    Example:

    >>> norm_layer("group").groups
    5
    """
    match norm:
        case "group":
            return layers.GroupNormalization(groups=5, axis=3)
        case "instance":
            return layers.InstanceNormalization(
                axis=3,
                center=True,
                scale=True,
                beta_initializer="random_uniform",
                gamma_initializer="random_uniform",
            )
        case "layer":
            return layers.LayerNormalization(axis=3, center=True, scale=True)
        case "batch":
            return keras.layers.BatchNormalization(axis=3)
        case "none":
            return None
    raise ValueError(f"norm={norm!r} is no norm of the tutorial; use {', '.join(NORMS)}")


def build(norm: str, image_shape: tuple[int, int]) -> keras.Model:
    """The tutorial's model, compiled; it differs from the original in nothing but the norm.

    Args:
        norm: one of `NORMS`.
        image_shape: height and width of an image, at least 3 each.

    Example:

    >>> [layer.name for layer in build("none", (28, 28)).layers]
    ['image', 'convolution', 'flatten', 'hidden', 'dropout', 'classes']
    """
    chosen = norm_layer(norm)
    model = keras.Sequential(
        [
            keras.Input(image_shape),
            keras.layers.Reshape((*image_shape, 1), name="image"),
            keras.layers.Conv2D(
                10, kernel_size=(3, 3), data_format="channels_last", name="convolution"
            ),
            *([] if chosen is None else [chosen]),
            keras.layers.Flatten(name="flatten"),
            keras.layers.Dense(128, activation="relu", name="hidden"),
            keras.layers.Dropout(0.2, name="dropout"),
            keras.layers.Dense(CLASS_COUNT, activation="softmax", name="classes"),
        ]
    )
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def norms_to_draw(shape: tuple[int, int, int, int] = (4, 5, 5, 10)) -> dict[str, geometry.Geometry]:
    """The tutorial's norms on a small input of ten channels, by title, for the picture of sets.

    Layer norm comes twice: over all activations of a sample, which is what the original's text
    says, and over the channels of each pixel, which is what its `axis=3` does.
    """
    return {
        "batch": geometry.batch(shape, axis=3),
        "layer, axis=[1, 2, 3]": layers.LayerNormalization(axis=[1, 2, 3]).geometry(shape),
        "layer, axis=3": norm_layer("layer").geometry(shape),
        "instance": norm_layer("instance").geometry(shape),
        "group, groups=5": norm_layer("group").geometry(shape),
    }
