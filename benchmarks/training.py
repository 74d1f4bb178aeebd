"""Time a training step of the tutorial's model: what a norm adds, Keras's own and normwise's.

    KERAS_BACKEND=jax python benchmarks/training.py [--json FILE] [--seconds S]

The model is built without a norm and, for each norm, with Keras's layer and with normwise's; it is
compiled as Keras does by default. A step is `train_on_batch`, which calls the function that `fit`
calls, on 32 random images of 28 x 28. All models are stepped in random order, again and again, and
what a norm adds is its median less that of the model without one.

Beside it stands what the layer keeps in memory from its forward pass for its backward pass, x
included: as PyTorch's autograd saves it, or as `jax.vjp` does before XLA sees the program. For
TensorFlow no such number is to be had.
"""

import argparse
import functools
import math
import pathlib

import keras
import measuring
import numpy as np
from rich.table import Table

import normwise
from normwise.tutorial import model as tutorial

BACKEND = keras.backend.backend()
NORMS = ("group", "instance", "layer")
BATCH, IMAGE = 32, (28, 28)
# What the convolution hands to the norm.
NORM_INPUT = (32, 26, 26, 10)


def keras_layer(norm):
    """The tutorial's norm in Keras's own layers."""
    match norm:
        case "group":
            return keras.layers.GroupNormalization(groups=5, axis=3)
        case "instance":
            return keras.layers.GroupNormalization(
                groups=-1,
                axis=3,
                beta_initializer="random_uniform",
                gamma_initializer="random_uniform",
            )
        case "layer":
            return keras.layers.LayerNormalization(axis=3)
    raise ValueError(f"norm={norm!r} is none of {', '.join(NORMS)}")


def with_keras_layer(norm):
    """The tutorial's model with normwise's layer exchanged for Keras's."""
    model = tutorial.build(norm, IMAGE)
    ours = type(tutorial.norm_layer(norm))

    def exchanged(layer):
        return keras_layer(norm) if type(layer) is ours else layer.from_config(layer.get_config())

    clone = keras.models.clone_model(model, clone_function=exchanged)
    clone.compile_from_config(model.get_compile_config())
    return clone


def steps():
    """Every model by its name, and as a function that trains it on one batch."""
    models = {"none": tutorial.build("none", IMAGE)}
    for norm in NORMS:
        models[f"{norm}, Keras"] = with_keras_layer(norm)
        models[f"{norm}, normwise"] = tutorial.build(norm, IMAGE)
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(BATCH, *IMAGE)).astype("float32")
    labels = rng.integers(0, tutorial.CLASS_COUNT, BATCH)
    calls = {
        name: functools.partial(model.train_on_batch, images, labels)
        for name, model in models.items()
    }
    return models, calls


def check(models):
    """Hold each pair of models together: with the same weights they predict the same."""
    images = np.random.default_rng(1).uniform(size=(2, *IMAGE)).astype("float32")
    for norm in NORMS:
        theirs, ours = models[f"{norm}, Keras"], models[f"{norm}, normwise"]
        theirs.set_weights(ours.get_weights())
        predictions = [np.asarray(model.predict_on_batch(images)) for model in (theirs, ours)]
        np.testing.assert_allclose(*predictions, rtol=1e-4, atol=1e-6, err_msg=norm)


def saved_bytes(layer):
    """What a layer keeps for its backward pass, its parameters aside; None where no one can say."""
    x = keras.random.normal(NORM_INPUT)
    layer.build(NORM_INPUT)
    parameters = [variable.value for variable in layer.trainable_variables]
    if BACKEND == "torch":
        kept = _kept_by_torch(layer, x)
    elif BACKEND == "jax":
        kept = _kept_by_jax(layer, x, parameters)
    else:
        return None
    # What is kept twice, as x is, lies in memory once.
    buffers = {_address(tensor): tensor.nbytes for tensor in kept}
    for parameter in parameters:
        buffers.pop(_address(parameter), None)
    return sum(buffers.values())


def _address(tensor):
    if BACKEND == "torch":
        return tensor.untyped_storage().data_ptr()
    return tensor.unsafe_buffer_pointer()


def _kept_by_torch(layer, x):
    import torch

    kept = []

    def note(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x.requires_grad_())
    return kept


def _kept_by_jax(layer, x, parameters):
    import jax

    def apply(parameters, x):
        return layer.stateless_call(parameters, [], x)[0]

    _, pull = jax.vjp(apply, parameters, x)
    return [leaf for leaf in jax.tree.leaves(pull) if isinstance(leaf, jax.Array)]


def memory(norm):
    """The bytes kept by normwise, by its composite and by Keras's layer."""
    found = {"normwise": saved_bytes(tutorial.norm_layer(norm))}
    with normwise.use_kernels("composite"):
        found["composite"] = saved_bytes(tutorial.norm_layer(norm))
    return {**found, "Keras": saved_bytes(keras_layer(norm))}


def measure(seconds):
    """Check and time every model, and count what the layers keep."""
    models, calls = steps()
    check(models)
    ms = measuring.medians_ms(calls, seconds)
    rows = []
    for norm in NORMS:
        added = {name: ms[f"{norm}, {name}"] - ms["none"] for name in ("Keras", "normwise")}
        rows.append(
            {
                "norm": norm,
                "step_ms": {name: ms[f"{norm}, {name}"] for name in added},
                "added_ms": added,
                "ours_over_keras": added["normwise"] / added["Keras"],
                "saved_bytes": memory(norm),
            }
        )
    return {
        "versions": measuring.versions(),
        "jit_compile": bool(models["none"].jit_compile),
        "step_ms_without_norm": ms["none"],
        "rows": rows,
    }


def table_of(result):
    """The steps and the bytes as one table."""
    how = {"jax": "jax.jit", "tensorflow": "tf.function", "torch": "eager"}[BACKEND]
    if BACKEND == "tensorflow":
        how += f", jit_compile={result['jit_compile']}"
    x_bytes = 4 * math.prod(NORM_INPUT)
    knows_memory = BACKEND != "tensorflow"
    table = Table(
        title=f"training step on {BACKEND} ({how}), "
        f"{result['step_ms_without_norm']:.2f} ms without a norm",
        caption=f"kept for the backward pass: in units of the input's {x_bytes:,} bytes"
        if knows_memory
        else "what is kept for the backward pass: TensorFlow does not say",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("norm")
    headings = ["Keras\nms", "normwise\nms", "Keras\nadds", "normwise\nadds", "ours /\nKeras's"]
    if knows_memory:
        headings += ["normwise\nkeeps", "composite\nkeeps", "Keras\nkeeps"]
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        numbers = *row["step_ms"].values(), *row["added_ms"].values(), row["ours_over_keras"]
        if knows_memory:
            numbers += tuple(kept / x_bytes for kept in row["saved_bytes"].values())
        table.add_row(row["norm"], *(f"{number:.2f}" for number in numbers))
    return table


def main():
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here")
    parser.add_argument("--seconds", type=float, default=30.0, help="time budget of the steps")
    arguments = parser.parse_args()
    result = measure(arguments.seconds)
    measuring.console(100).print(table_of(result))
    measuring.write(result, arguments.json)


if __name__ == "__main__":
    main()
