"""SavedModels and checkpoints whose parts say what they like."""

import json
from pathlib import Path

import numpy as np

MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
DTYPES = {"float32": 1, "float64": 2, "int64": 9}
ROOT_NODES = (({"layer_with_weights-0": 1}, None), ({"kernel": 2, "bias": 3}, None))
LEAVES = (({}, b"k"), ({}, b"b"))
TENSORS = {b"k": np.ones((4, 2), "float32"), b"b": np.zeros(2, "float32")}


def varint(number: int) -> bytes:
    """A number as protocol buffers write it, seven bits to a byte."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def message(*fields) -> bytes:
    """A protocol buffer of pairs of a field's number and its value, an int or bytes."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def block(entries) -> bytes:
    """One block of a table, of triples: how much of the last key it has, what more, and a value."""
    body = b"".join(
        varint(shared) + varint(len(added)) + varint(len(value)) + added + value
        for shared, added, value in entries
    )
    return body + bytes(4) + (1).to_bytes(4, "little")


def table(blocks, named=None) -> bytes:
    """A table of blocks; `named` tells which block each entry of its index names."""
    data, handles = b"", []
    for each in blocks:
        handles.append(varint(len(data)) + varint(len(each)))
        data += each + bytes(5)
    index = block([(0, b"", handles[i]) for i in (range(len(blocks)) if named is None else named)])
    handle = varint(len(data)) + varint(len(index))
    footer = varint(0) * 2 + handle
    return data + index + bytes(5) + footer.ljust(40, b"\0") + MAGIC


def object_graph(nodes) -> bytes:
    """A graph of pairs: the numbers of an object's children by name, and its key or None."""
    out = bytearray()
    for children, key in nodes:
        fields = [(1, message((1, i), (2, name.encode()))) for name, i in children.items()]
        if key is not None:
            fields.append((2, message((1, b"VARIABLE_VALUE"), (3, key))))
        out += message((1, message(*fields)))
    return bytes(out)


def entry(dtype: int, shape, at: int, size: int) -> bytes:
    """What an index says of one tensor."""
    extents = b"".join(message((2, message((1, extent)))) for extent in shape)
    return message((1, dtype), (2, extents), (4, at), (5, size))


def checkpoint(nodes, tensors=TENSORS, graph=None, **said) -> tuple[bytes, bytes]:
    """The index and the data of a checkpoint; `said` are entries of the index as they are."""
    data, entries = b"", {b"": message((1, 1))}
    for key, array in tensors.items():
        entries[key] = entry(DTYPES[array.dtype.name], array.shape, len(data), array.nbytes)
        data += array.tobytes()
    graph = object_graph(nodes) if graph is None else graph
    raw = varint(len(graph)) + bytes(4) + graph
    entries[b"_CHECKPOINTABLE_OBJECT_GRAPH"] = message((1, 7), (4, len(data)), (5, len(raw)))
    entries |= {key.encode(): value for key, value in said.items()}
    return table([block([(0, key, entries[key]) for key in sorted(entries)])]), data + raw


def metadata(config, version="2.14.0", **more) -> bytes:
    """keras_metadata.pb of a model."""
    root = {"class_name": config["class_name"], "config": config["config"], **more}
    text = json.dumps({**root, "keras_version": version}).encode()
    return message((1, message((2, 0), (3, b"root"), (4, b"_tf_keras_sequential"), (5, text))))


def saved_model(folder: Path, described: bytes, index: bytes, data: bytes = b"") -> Path:
    """Write the folder of a SavedModel."""
    (folder / "variables").mkdir(parents=True)
    (folder / "keras_metadata.pb").write_bytes(described)
    (folder / "saved_model.pb").write_bytes(b"")
    (folder / "variables" / "variables.index").write_bytes(index)
    (folder / "variables" / "variables.data-00000-of-00001").write_bytes(data)
    return folder
