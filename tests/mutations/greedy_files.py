"""SavedModels, archives, names and paths that repeat, lie, or are not what a reader takes them for.

Every maker takes a folder and a random generator, and gives a path, a kind, and what to do with it.
"""

import io
import json
import os
import zipfile

import h5py
import numpy as np
import old_models
from old_models import input_layer, layer, sequential

from mutations import archives, raw, tables
from mutations.greedy_hdf5 import CONFIG
from mutations.greedy_models import WEIGHTS, about
from mutations.tables import LEAVES, ROOT_NODES, TENSORS

ESCAPES = (
    "\x1b]0;t\x07",
    "\x1b[2J",
    "\x07",
    "\x9b2J",
    "\u202e",
    "\n",
    "\r",
    "\t",
    "\x7f",
    "\u2028",
)
ESCAPES += ("\0", "\u200b", "\ufeff", "\U000e0041", "\ud800", "\xa0")


def _saved(folder, rng, index, data, kind):
    """A SavedModel, or its checkpoint alone."""
    path = tables.saved_model(folder / "greedy", tables.metadata(CONFIG), index, data)
    if rng.random() < 0.6:
        return path, kind, "load"
    return path / "variables" / "variables", kind, "weights"


def shared_objects(folder, rng):
    """Graphs of objects that hold each other several times, or in a circle."""
    depth, kind = rng.choice([3, 60, 2000, 20_000]), rng.choice(["diamond", "random", "circle"])
    names = rng.choice(["ab", "abc", "abcdefgh"])
    nodes = [*ROOT_NODES, *LEAVES]
    first, last = 4, 4 + depth
    nodes[0] = ({**nodes[0][0], rng.choice(["layer-0", "layers", "a"]): first}, None)
    nodes[1] = ({**nodes[1][0], "kernel_regularizer": first, "cell": first, "layer": first}, None)
    for i in range(first, last):
        if kind == "random":
            children = {name: rng.randrange(last + 1) for name in names}
        elif kind == "circle":
            children = dict.fromkeys(names, i + 1 if i + 1 < last else first)
        else:
            children = dict.fromkeys(names, i + 1)
        nodes.append((children, None))
    nodes.append(({}, None) if rng.random() < 0.5 else ({"kernel": 2}, None))
    return _saved(folder, rng, *tables.checkpoint(nodes), f"{kind} of {depth}")


def tables_that_repeat(folder, rng):
    """Indexes that name a block again and again, and keys that each repeat the last one."""
    many = rng.choice([10, 1000, 20_000, 60_000])
    kind = rng.choice(["blocks", "keys", "values", "self"])
    if kind == "blocks":
        content = tables.block([(0, b"%d" % i, b"") for i in range(many)])
        index = tables.table([content], [0] * many)
    elif kind == "keys":
        index = tables.table([tables.block([(i, b"a", b"") for i in range(many)])])
    elif kind == "values":
        value = bytes(about(rng, 0, 14))
        index = tables.table([tables.block([(0, b"", value)] * min(many, 1000))] * 3, [0, 1, 2] * 9)
    else:
        index = tables.table([tables.block([(0, b"", b"\0\x10")] * many)], [0] * 3)
    return _saved(folder, rng, index, b"", f"{kind} {many}")


def tensors_that_lie(folder, rng):
    shape = rng.choice([(4, 2), (2**40, 2), (0,) * 9, (1,) * 20_000, (2**64 - 1, 8), (2**63,)])
    at, size = (rng.choice([0, 1, 32, 2**31, 2**63, 2**64 - 1]) for _ in range(2))
    said = {"k": tables.entry(rng.choice([1, 2, 7, 14, 99]), shape, at, rng.choice([size, 32]))}
    if rng.random() < 0.3:
        said["b"] = said["k"]
    many = rng.choice([1, 1, 3000])
    nodes = [*ROOT_NODES, *LEAVES]
    nodes[1] = ({**nodes[1][0], **{f"k{i}": 2 for i in range(many)}}, None)
    tensors = {**TENSORS, b"k": np.ones((4, 2), rng.choice(["f4", "f8", "i8"]))}
    if rng.random() < 0.3:
        tensors[b"k"], said = np.ones(rng.choice([(4, 2, 1), (2, 4), ()]), "f4"), {}
    return _saved(folder, rng, *tables.checkpoint(nodes, tensors, **said), f"{shape[:3]} at {at}")


def messages_of_many_fields(folder, rng):
    """Protocol buffers of a million fields of two bytes, or with lengths that are not there."""
    many = rng.choice([1000, 100_000, 500_000, 1_000_000])
    fields = (
        rng.choice([b"\x0a\0", b"\x08\x01", b"\x12\0", b"\x0d\0\0\0\0", b"\x0a\x02\x0a\0"]) * many
    )
    fields += rng.choice([b"", b"\x0a\xff\xff\xff\xff\x0f", b"\x0b", b"\xff" * 20])
    described = tables.metadata(CONFIG)
    if rng.random() < 0.4:
        index, data = tables.checkpoint([*ROOT_NODES, *LEAVES])
        path = tables.saved_model(folder / "greedy", fields + described, index, data)
        return path, f"metadata of {many}", "load"
    graph = tables.object_graph([*ROOT_NODES, *LEAVES]) + fields
    if rng.random() < 0.3:
        graph = tables.message((1, fields)) + graph
    return _saved(folder, rng, *tables.checkpoint((), graph=graph), f"graph of {many}")


def packed_members(folder, rng):
    """Members by other methods, encrypted ones, and ones that lie about their sizes."""
    path = old_models.write_keras(folder / "greedy.keras", CONFIG, WEIGHTS)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    chosen = rng.choice(sorted(members))
    kind = rng.choice(["method", "bomb", "lie", "lie", "bytes", "long", "twice", "both"])
    if kind in ("method", "bomb"):
        file, method = io.BytesIO(), rng.choice([zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 8])
        with zipfile.ZipFile(file, "w", method) as archive:
            for name, content in members.items():
                bomb = bytes(rng.choice([1, 30, 200]) << 20) if kind == "bomb" else content
                archive.writestr(name, bomb if name == chosen else content)
        content = file.getvalue()
    elif kind == "long":
        content = archives.zipped({"a" * 60_000: b"", **members, "b" * 60_000: b"x"})
    elif kind == "both":
        # A table of contents that is only one in the comment of another.
        content = archives.zipped(members)
        content += archives.zipped({**members, chosen: b"{}"})
    elif kind == "twice":
        content = archives.repeat_member(members, rng)
    else:
        content = archives.lie_in_header(members, rng)
    content = bytearray(content)
    if kind == "bytes":
        # What lies in the headers before the data, which the table of contents contradicts.
        at = content.find(b"PK\x03\x04") if rng.random() < 0.5 else content.rfind(b"PK\x01\x02")
        for _ in range(rng.choice([1, 3])):
            content[at + rng.randrange(4, 46)] = rng.choice([0, 0xFF, 1, 0x80])
    path.write_bytes(content)
    return path, f"{kind} {chosen}", rng.choice(["load", "load", "convert"])


def _escaped(rng):
    return "n" + "".join(rng.choices(ESCAPES, k=rng.choice([1, 3]))) + "n"


def names_of_config(rng, text):
    """A config with a name in a place where an error, or what is written, may repeat it."""
    data = rng.choice(
        [
            layer(text, "dense"),
            layer(f"Addons>{text}", "dense"),
            layer("Dense", text, units=2),
            layer("Dense", text, units=3),
            layer("Dense", "dense", units=2, **{text: 3}),
            layer("Dense", "dense", units=2, activation=text),
            layer("Dense", "dense", units=2, activation={"class_name": text, "config": {}}),
            layer("Dense", "dense", units=2, kernel_initializer=text),
            layer("Dense", "dense", units=2, kernel_initializer={"class_name": text, "config": {}}),
            layer("Dense", "dense", units=text),
            {**layer("Dense", "dense", units=2), "module": text},
            {**layer("Dense", "dense", units=2), "registered_name": text},
            layer("TFOpLambda", "dense", function=text),
            layer("Lambda", text, function=[text, None, None]),
            layer("StringLookup", "dense", vocabulary=text),
            layer("Permute", "dense", dims=[text]),
            layer("TimeDistributed", "dense", layer=layer(text, text)),
            layer("RNN", "dense", cell=layer("LSTMCell", text, units=text)),
            layer("Reshape", text, target_shape=[3, 5]),
            layer("Dot", text, axes=1),
        ]
    )
    data["config"]["dtype"] = rng.choice(["float32", "float32", text])
    config = sequential(input_layer("input", 4), data)
    if rng.random() < 0.5:
        nodes = [["input", 0, 0, {rng.choice([text, "x"]): rng.choice([text, 3])}]]
        config = old_models.functional([(input_layer("input", 4), [])], ["input"], [])
        config["config"]["layers"].append({**data, "name": text, "inbound_nodes": [nodes]})
        ends = [[text, 0, 0], [text, 1, 0], ["other" + text, 0, 0], ["input", 0, 0]]
        config["config"]["output_layers"] = [rng.choice(ends)]
    config["config"]["name"] = rng.choice(["model", text])
    config["class_name"] = rng.choice([config["class_name"]] * 5 + [text])
    return config


def _valid(text):
    return text.encode(errors="replace").decode()


def _graph_of(folder, rng, text):
    """A SavedModel whose objects, keys or version have a name."""
    text = _valid(text)
    nodes = [({"layer_with_weights-0": 1, text: 1}, None), ({text: 2, "bias": 3}, None)]
    nodes += [({}, rng.choice([b"k", text.encode()])), ({}, b"b")]
    index, data = tables.checkpoint(nodes, **rng.choice([{}, {text: b"\xff"}]))
    described = tables.metadata(CONFIG, rng.choice(["2.14.0", text]))
    return tables.saved_model(folder / "greedy", described, index, data)


def _archive_of(folder, rng, text, config):
    """An archive whose config, members or version have a name."""
    path = old_models.write_keras(folder / "greedy.keras", CONFIG, {})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    if config is not CONFIG:
        members["config.json"] = json.dumps(config).encode()
    else:
        members[rng.choice(["../", "", "a/"]) + _valid(text)[:15_000]] = b""
    if rng.random() < 0.3:
        members["metadata.json"] = json.dumps({"keras_version": f"2.1{text}"}).encode()
    path.write_bytes(archives.zipped(members))
    return path


def _name_groups(file, rng, text):
    name = _valid(text)[:15_000].encode().replace(b"\0", b"").strip(b"/") or b"n"
    group = file["model_weights"]
    holder, key = rng.choice([(group, "layer_names"), (group["dense"], "weight_names")])
    holder.attrs[key] = np.array([name] * rng.choice([1, 2]))
    if rng.random() < 0.5:
        inner = group.require_group(name)
        inner.attrs["weight_names"] = np.array([name])
        name = b"n" if b"/" in name else name
        arrays = [np.ones(3, "f4"), np.array([name]), np.ones((4, 2), "i8")]
        inner[name] = rng.choice([*arrays, h5py.SoftLink("/missing")])


def _name_attributes(file, rng, text):
    longer = [f"2.{text}", f"2.14.0{text}", f"3.{text}", "2." + "1.1" * 20]
    version = rng.choice([text, *longer])
    file.attrs["keras_version"] = np.bytes_(version[:15_000].encode(errors="replace"))
    if rng.random() < 0.5:
        model = rng.choice([json.dumps(text), f"{{{text}"])
        file.attrs["model_config"] = np.bytes_(model[:30_000].encode(errors="replace"))


def _named_file(folder, rng, text):
    """A file with a text in one of its names."""
    place = rng.choice(["config"] * 4 + ["attributes", "groups", "member", "graph"])
    config = names_of_config(rng, text) if place == "config" else CONFIG
    if place == "graph":
        return _graph_of(folder, rng, text)
    if place == "member" or (place == "config" and rng.random() < 0.3):
        return _archive_of(folder, rng, text, config)
    path = old_models.write_h5(folder / "greedy.h5", config, WEIGHTS, layers=["dense"])
    with h5py.File(path, "r+") as file:
        if place == "groups":
            _name_groups(file, rng, text)
        if place == "attributes":
            _name_attributes(file, rng, text)
    return path


def names_with_escapes(folder, rng):
    """Names that a terminal would obey."""
    text = _escaped(rng)
    path = _named_file(folder, rng, text)
    return path, f"a name {text!r}", rng.choice(["load", "load", "convert"])


def long_names(folder, rng):
    """Names without end, and ones that a regular expression tries in every way."""
    text = rng.choice(["a", "1", "_", "1.", "aA", "/", ">", "é", "'", "a,", "1_"])
    text = text * rng.choice([1000, 20_000, 60_000]) + rng.choice(["", "x", "!"])
    path = _named_file(folder, rng, text) if rng.random() < 0.8 else None
    if path is None:
        equation = text.replace("!", "") + ",ab->" + text
        data = layer("EinsumDense", "dense", equation=equation, output_shape=[2])
        path = old_models.write_h5(folder / "greedy.h5", sequential(input_layer("x", 4), data), {})
    return path, f"a name of {len(text)}", rng.choice(["load", "load", "convert"])


def no_regular_files(folder, rng):
    """FIFOs, devices and links, as paths and in a SavedModel, and paths with nothing."""
    action = rng.choice(["load", "weights", "convert"])
    kinds = ["fifo", "device", "link", "loop", "missing", "long", "inside", "empty", "folder"]
    kind = rng.choice([*kinds, "inside", "inside", "unreadable", "escapes", "deep"])
    path = folder / "greedy.h5"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to(rng.choice(["/dev/zero", "/dev/urandom", "/dev/full", "/dev/stdin"]))
    elif kind == "link":
        other = old_models.write_h5(folder / "other.h5", CONFIG, WEIGHTS)
        path.symlink_to(rng.choice([other, folder, folder / "missing"]))
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "long":
        path = folder / ("a" * rng.choice([250, 256, 1500]) + ".h5")
    elif kind == "escapes":
        path = folder / f"{_escaped(rng).replace(chr(0), '')}.h5".encode(errors="replace").decode()
        if rng.random() < 0.6:
            path.write_bytes(rng.choice([b"", b"PK", b"\x89HDF\r\n\x1a\n"]))
    elif kind == "empty":
        path.write_bytes(rng.choice([b"", b"P", b"PK", b"\x89HDF\r\n\x1a\n"]))
    elif kind == "folder":
        path.mkdir()
    elif kind == "unreadable":
        old_models.write_h5(path, CONFIG, WEIGHTS).chmod(0)
    elif kind == "deep":
        path = old_models.write_h5(path, CONFIG, WEIGHTS) / "inner.h5"
    elif kind == "inside":
        return (*_irregular_inside(folder, rng), action)
    return path, kind, action


def _irregular_inside(folder, rng):
    """A SavedModel in which one file or folder is something else."""
    index, data = tables.checkpoint([*ROOT_NODES, *LEAVES])
    path = tables.saved_model(folder / "greedy", tables.metadata(CONFIG), index, data)
    names = ["keras_metadata.pb", "variables/variables.index"]
    name = rng.choice([*names, "variables/variables.data-00000-of-00001", "variables"])
    chosen, moved = path / name, folder / "moved"
    chosen.rename(moved)
    kind = rng.choice(["fifo", "link", "device", "loop", "missing", "folder", "cut"])
    if kind == "fifo":
        os.mkfifo(chosen)
    elif kind == "folder":
        chosen.mkdir()
    elif kind == "cut" and moved.is_file():
        chosen.write_bytes(raw.truncate(moved.read_bytes(), rng))
    elif kind != "missing":
        chosen.symlink_to({"link": moved, "loop": chosen}.get(kind, "/dev/zero"))
    return path, f"{kind} for {name}"


KINDS = (
    *(shared_objects, tables_that_repeat, tensors_that_lie, messages_of_many_fields),
    *(packed_members, names_with_escapes, names_with_escapes, names_with_escapes, long_names),
    *(no_regular_files, no_regular_files),
)
