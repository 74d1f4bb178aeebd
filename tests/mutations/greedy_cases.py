"""One file of each kind that asks for more than it has, and the words in which it is refused."""

import io
import os
import zipfile

import h5py
import numpy as np
import old_models

from mutations import archives, greedy_hdf5, greedy_models, tables
from mutations.hostile import changed_keras, h5

ESCAPES = "\x1b]0;t\x07\x1b[2J"


def saved_model(index, data=b""):
    """A maker of a SavedModel of this checkpoint."""
    return lambda folder: tables.saved_model(
        folder / "hostile", tables.metadata(greedy_hdf5.CONFIG), index, data
    )


def diamond():
    """Objects that hold each other twice, 60 deep, in which there is nothing: 2^60 paths to it."""
    nodes = [({"layer_with_weights-0": 1}, None), ({"kernel": 2, "cell": 3}, None), ({}, b"k")]
    nodes += [({"a": i + 1, "b": i + 1}, None) for i in range(3, 63)] + [({}, None)]
    return saved_model(*tables.checkpoint(nodes))


def block_again():
    content = tables.block([(0, b"a", b"")] * 20_000)
    return saved_model(tables.table([content], [0] * 20_000))


def keys_that_repeat():
    return saved_model(tables.table([tables.block([(i, b"a", b"") for i in range(60_000)])]))


def cut_into(extent, *functions):
    """A maker of a model that calls functions on an input of an extent."""
    calls = [
        greedy_models.function(f"f{i}", name, **options)
        for i, (name, options) in enumerate(functions)
    ]
    start = old_models.input_layer("x", extent)
    end = [[calls[-1]["name"], 0, 0]]
    return lambda folder: h5(folder, greedy_models.graph([start], calls, end), {})


def one_layer(shape, *args, weights=None, batch=None, **options):
    """A maker of a model of one layer."""
    start = old_models.input_layer("x", *shape)
    start["config"]["batch_input_shape"][0] = batch
    config = old_models.sequential(start, old_models.layer(*args, **options))
    return lambda folder: h5(folder, config, {args[1]: weights or {}})


def tower(height):
    return lambda folder: h5(folder, greedy_models.tower(height, 2), {})


def cells_in_cells(deep):
    """Each of which asks the next one for its size twice."""
    cell = old_models.layer("SimpleRNNCell", "cell", units=2)
    for i in range(deep):
        cell = old_models.layer("StackedRNNCells", f"cells{i}", cells=[cell])
    return one_layer((4, 4), "RNN", "r", cell=cell)


def layer_again(folder):
    path = folder / "hostile.h5"
    names = np.array([b"a"] * 200_000)

    def fill(group):
        group.create_group("a").attrs["weight_names"] = np.array([], "S1")

    greedy_hdf5.named(folder, names, fill).rename(path)
    return path


def bomb_in_chunk(times):
    """A maker of a file with a true kernel, whose one chunk deflates a gigabyte of zeros."""

    def make(folder):
        path, raw = h5(folder), greedy_hdf5.inflating(1 << 30, times)
        name = "model_weights/dense/dense/kernel:0"
        filters = [greedy_hdf5.FILTERS["deflate"]] * times
        greedy_hdf5.packed_kernel(path, name, (4, 3), (4, 1 << 14), filters, raw)
        return path

    return make


def text_again(folder):
    """Four thousand texts of a megabyte, which are all the same one in the file."""
    return greedy_hdf5.same_text(folder, 4000, 1 << 20).rename(folder / "hostile.h5")


def link_table(folder):
    """One byte of a table of links, after which HDF5 1.14 frees what it never filled."""
    stored = greedy_hdf5.linked(12)
    stored[stored.find(b"dense_", stored.find(b"FHDB"))] = 0
    return changed_keras(
        lambda members: archives.zipped({**members, "model.weights.h5": bytes(stored)})
    )(folder)


def hard_links(folder):
    """Groups that hold each other twice, 60 deep."""
    stored = io.BytesIO()
    with h5py.File(stored, "w") as file:
        below = file.create_group("_layer_checkpoint_dependencies/dense")
        for i in range(60):
            group = file.create_group(f"g{i}")
            group["a"] = group["b"] = below
            below = group
    return changed_keras(
        lambda members: archives.zipped({**members, "model.weights.h5": stored.getvalue()})
    )(folder)


def digits(folder):
    """A name that a search for the number at its end would try at each of its digits."""
    stored = io.BytesIO()
    with h5py.File(stored, "w", libver="latest") as file:
        held = file.create_group(f"_layer_checkpoint_dependencies/{'1' * 60_000}x/vars")
        held["0"] = np.ones(3, "float32")
    return changed_keras(
        lambda members: archives.zipped({**members, "model.weights.h5": stored.getvalue()})
    )(folder)


def packed(method):
    def change(members):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return file.getvalue()

    return changed_keras(change)


def encrypted(members):
    content = bytearray(archives.zipped(members))
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.find(mark) + flags] |= 1
    return bytes(content)


def irregular(name, make):
    """A maker of a SavedModel in which `make` puts something else in the place of a file."""

    def change(folder):
        path = saved_model(*tables.checkpoint([*tables.ROOT_NODES, *tables.LEAVES]))(folder)
        (path / name).rename(folder / "moved")
        make(path / name)
        return path

    return change


def gru(steps, **options):
    shapes = {"kernel": (2, 12), "recurrent_kernel": (4, 12), "bias": (2, 12)}
    weights = {key: np.ones(shape, "float32") for key, shape in shapes.items()}
    return one_layer((steps, 2), "GRU", "r", units=4, weights=weights, **options)


def growing(count):
    repeated = old_models.layer("RepeatVector", "repeated", n=count)
    return old_models.sequential(repeated, old_models.layer("GlobalMaxPooling1D", "pool"))


def attention(steps):
    call = [["x", 0, 0, {}], ["x", 0, 0, {}]]
    data = old_models.layer("AdditiveAttention", "a", use_scale=False)
    return _attention(steps, data, call, {})


def attention_heads(steps):
    options = {"num_heads": 1, "key_dim": 1, "use_bias": False}
    weights = {each: np.ones((2, 1, 1), "float32") for each in ("query", "key", "value")}
    weights["output"] = np.ones((1, 1, 2), "float32")
    data = old_models.layer("MultiHeadAttention", "a", **options)
    return _attention(steps, data, [["x", 0, 0, {"value": ["x", 0, 0]}]], {"a": weights})


def _attention(steps, data, call, weights):
    start = old_models.input_layer("x", steps, 2)
    config = greedy_models.graph([start], [greedy_models.calling(data, call)], [["a", 0, 0]])
    return lambda folder: h5(folder, config, weights)


HOSTILE = {
    "a diamond of empty objects": (diamond(), ["the file holds nothing for", "bias"]),
    "a block named again and again": (block_again(), ["bytes of text"]),
    "keys that each repeat the last": (keys_that_repeat(), ["bytes of text"]),
    "a million tensors unstacked": (cut_into(10**6, ("unstack", {"axis": 1})), ["tensors"]),
    "a million tensors split": (
        cut_into(10**6, ("split", {"axis": 1, "num_or_size_splits": 10**6})),
        ["tensors"],
    ),
    "a count below zero": (
        cut_into(10**6, ("unstack", {"num": -(10**9)}), ("unstack", {"axis": 1})),
        ["-1000000000 tensors"],
    ),
    "three thousand dimensions": (cut_into(4, ("tile", {"multiples": [1] * 3000})), ["dimensions"]),
    "models that call models": (tower(20), ["calls"]),
    "cells in cells": (cells_in_cells(24), ["deep"]),
    "a layer named 200,000 times": (layer_again, ["a name twice"]),
    "a filter upon a filter": (bomb_in_chunk(3), ["filters", "once each"]),
    "a chunk that inflates to gigabytes": (bomb_in_chunk(1), ["damaged"]),
    "a text of a megabyte, again and again": (text_again, ["cannot be loaded"]),
    "a table of links": (link_table, ["damaged"]),
    "hard links": (hard_links, ["twice"]),
    "a name of digits": (digits, ["layers with weights of the class"]),
    "bzip2": (packed(zipfile.ZIP_BZIP2), ["by the method 12", "without compression"]),
    "LZMA": (packed(zipfile.ZIP_LZMA), ["by the method 14", "without compression"]),
    "an encrypted member": (changed_keras(encrypted), ["encrypted"]),
    "a FIFO": (irregular("variables/variables.index", os.mkfifo), ["no regular file"]),
    "a device": (
        irregular("keras_metadata.pb", lambda path: path.symlink_to("/dev/zero")),
        ["keras_metadata.pb is a link, which is not followed"],
    ),
    "a folder that is a link": (
        irregular("variables", lambda path: path.symlink_to("../moved")),
        ["variables is a link, which is not followed"],
    ),
    "a class with escape sequences": (
        one_layer((4,), f"Nope{ESCAPES}", "dense"),
        [r"Nope\x1b]0;t\x07\x1b[2J: of neither Keras 3 nor normwise"],
    ),
    "a layer with escape sequences": (
        one_layer(
            (4,), "Dense", f"n{ESCAPES}", units=2, weights={"a": np.ones(3), "b": np.ones(2)}
        ),
        [r"n\x1b]0;t\x07\x1b[2J"],
    ),
    "a state for each of 2^28 series": (gru(3, stateful=True, batch=2**28), ["bytes of weights"]),
}

# What loads, and would cost too much to be tried on random input.
GREEDY_INPUTS = {
    "a long series": (gru(10**6), "steps"),
    "a huge input": (one_layer((2**20, 2**20), "ReLU", "r"), "elements"),
    "an input made large": (one_layer((4,), "RepeatVector", "r", n=2**40), "elements"),
    "attention to thousands": (attention(7628), "elements"),
    "attention by heads": (attention_heads(8000), "elements"),
    "a model that grows inside another": (
        one_layer((3, 2), "TimeDistributed", "r", layer=growing(2**27)),
        "elements",
    ),
    "an image resized by a matrix": (
        one_layer((15_000, 1, 1), "UpSampling2D", "r", size=[2, 1], interpolation="bilinear"),
        "elements",
    ),
    "categories for each of many": (
        one_layer((3000,), "CategoryEncoding", "r", num_tokens=10**5, output_mode="multi_hot"),
        "elements",
    ),
    "a layer for each of many steps": (
        one_layer((8000, 2), "TimeDistributed", "r", layer=old_models.layer("ReLU", "inner")),
        "steps",
    ),
    "a huge window": (
        one_layer((317_610, 4), "MaxPooling1D", "r", pool_size=34_725, strides=1, padding="same"),
        "operations",
    ),
}
# What converts: the table of a conversion takes apart what no file of Keras 2 has, and the steps of
# a series that is unrolled are not, to compare.
HARMLESS = {
    "an unrolled series": gru(300, unroll=True),
    "no cells": one_layer((4,), "ReLU", "r", cells=None),
    "no layers": one_layer((4,), "ReLU", "r", layers=None),
}
