"""TensorFlow's checkpoints, read without TensorFlow: a sorted table of tensors, and their owners.

`PREFIX.index` is a table of blocks whose keys share their beginnings; its values say where in
`PREFIX.data-00000-of-00001` each tensor lies. One of the tensors is the graph of the objects that
were saved, which tells whose variable a tensor was.

Reference: tensorflow/core/util/tensor_bundle and tensorflow/core/lib/io/table_format.txt
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from normwise.migrate.models.reading import protobuf
from normwise.migrate.models.reading.budget import Budget

OBJECT_GRAPH = b"_CHECKPOINTABLE_OBJECT_GRAPH"
MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
FOOTER_BYTES = 48
TRAILER_BYTES = 5  # how a block is compressed, and its checksum

# TensorFlow's numbers of the dtypes that a weight may have.
DTYPES = {
    **{1: "float32", 2: "float64", 3: "int32", 4: "uint8", 5: "int16", 6: "int8", 9: "int64"},
    **{10: "bool", 14: "bfloat16", 17: "uint16", 19: "float16", 22: "uint32", 23: "uint64"},
}
ITEM_BYTES = {
    name: 2 if name == "bfloat16" else np.dtype(name).itemsize for name in DTYPES.values()
}
STRING = 7
# What Keras, for its own ends, hangs under every layer of a SavedModel, or a model has beside its
# layers.
BESIDE = ("keras_api", "optimizer", "save_counter", "signatures", "variables", "metrics")


def parts(prefix: Path) -> list[Path]:
    """The files of a checkpoint: its index, and its tensors."""
    return [prefix.with_name(prefix.name + end) for end in (".index", ".data-00000-of-00001")]


def exists(prefix: Path) -> bool:
    """Whether there is a checkpoint of this prefix."""
    return parts(prefix)[0].is_file()


def read(prefix: Path, budget: Budget) -> list:
    """The objects that a checkpoint holds, the root first.

    Each is a pair: its arrays by name, and the numbers of the objects inside it by name.
    """
    index, tensors = parts(prefix)
    entries = dict(_table(index.read_bytes(), budget))
    if OBJECT_GRAPH not in entries:
        raise ValueError(
            f"{index.name} holds no graph of objects, so it was saved by TensorFlow 1; load it "
            "there, and save the weights as .h5"
        )
    shard = _Shard(tensors, entries.get(b"", b""))
    return _tree(_object_graph(shard.string(entries[OBJECT_GRAPH])), entries, shard)


def _table(data: bytes, budget: Budget) -> Iterator[tuple[bytes, bytes]]:
    """Every key and value of a sorted table."""
    if data[-len(MAGIC) :] != MAGIC:
        raise ValueError("the index of the checkpoint is no table, or it is cut short")
    footer = data[-FOOTER_BYTES:]
    at = protobuf.varint(footer, protobuf.varint(footer, 0)[1])[1]
    for _, handle in _block(data, footer[at:], budget):
        yield from _block(data, handle, budget)


def _block(data: bytes, handle: bytes, budget: Budget) -> Iterator[tuple[bytes, bytes]]:
    start, at = protobuf.varint(handle, 0)
    size, _ = protobuf.varint(handle, at)
    if start + size + TRAILER_BYTES > len(data) or size < 4:
        raise ValueError("the index of the checkpoint is cut short")
    if data[start + size] != 0:
        raise ValueError("the index of the checkpoint is compressed, which TensorFlow never does")
    budget.spend("bytes of text", size)
    block = data[start : start + size]
    restarts = int.from_bytes(block[-4:], "little")
    end = size - 4 * (restarts + 1)
    key, at = b"", 0
    while at < end:
        shared, at = protobuf.varint(block, at)
        added, at = protobuf.varint(block, at)
        length, at = protobuf.varint(block, at)
        if shared > len(key) or at + added + length > end:
            raise ValueError("the index of the checkpoint is damaged")
        key = key[:shared] + block[at : at + added]
        budget.spend("bytes of text", len(key))
        yield key, block[at + added : at + added + length]
        at += added + length


class _Shard:
    """The file that holds the tensors."""

    def __init__(self, path: Path, header: bytes):
        described = protobuf.collect(header)
        count = _last(described, 1, 1)
        if _last(described, 2, 0) != 0:
            raise ValueError("the checkpoint's numbers are big-endian; save it on another machine")
        if count != 1:
            # As hundreds of machines write it together, which no file of a layer's user is.
            raise ValueError(f"the checkpoint is of {count} files; save the weights as .h5")
        if not path.is_file():
            raise ValueError(f"the checkpoint lacks {path.name}, which has the tensors")
        self._path = path
        self._size = path.stat().st_size

    def tensor(self, entry: bytes) -> dict[str, Any] | None:
        """The tensor of an entry; None where it is of no dtype of weights."""
        described = protobuf.collect(entry)
        dtype = DTYPES.get(_last(described, 1, 0))
        if dtype is None:
            return None
        shape = tuple(_extents(_last(described, 2, b"")))
        start, size = self._place(described)
        if math.prod(shape) * ITEM_BYTES[dtype] != size:
            raise ValueError(f"a tensor of shape {shape} has {size} bytes in the checkpoint")
        return {"dtype": dtype, "shape": shape, "at": start}

    def string(self, entry: bytes) -> bytes:
        """The single string of an entry: its length, a checksum of that, and itself."""
        described = protobuf.collect(entry)
        if _last(described, 1, 0) != STRING:
            raise ValueError("the graph of objects in the checkpoint is no string")
        start, size = self._place(described)
        with self._path.open("rb") as file:
            file.seek(start)
            raw = file.read(size)
        length, at = protobuf.varint(raw, 0)
        if at + 4 + length != len(raw):
            raise ValueError("the graph of objects in the checkpoint is cut short")
        return raw[at + 4 :]

    def _place(self, described) -> tuple[int, int]:
        start, size = _last(described, 4, 0), _last(described, 5, 0)
        if start + size > self._size:
            raise ValueError(
                f"the checkpoint's data ends after {self._size} bytes, "
                f"before the {start + size} that its index names"
            )
        return start, size


def _extents(shape: bytes) -> Iterator[int]:
    for dimension in protobuf.collect(shape).get(2, []):
        yield _last(protobuf.collect(dimension), 1, 0)


def _last(described, number, default):
    return described.get(number, [default])[-1]


def _object_graph(data: bytes) -> list[tuple[dict[str, int], bytes | None]]:
    """Of every object, its children by name, and the key of its value if it is a variable."""
    graph = []
    for saved in protobuf.collect(data).get(1, []):
        described = protobuf.collect(saved)
        children = {}
        for reference in described.get(1, []):
            child = protobuf.collect(reference)
            children[_last(child, 2, b"").decode()] = _last(child, 1, 0)
        key = None
        for attribute in described.get(2, []):
            value = protobuf.collect(attribute)
            if _last(value, 1, b"") == b"VARIABLE_VALUE":
                key = _last(value, 3, b"")
        graph.append((children, key))
    return graph


def _tree(graph, entries, shard) -> list:
    """What can be reached from the root: an object of two owners is there once."""
    numbers, reached, nodes = {0: 0}, [0], []
    for index in reached:  # which grows
        arrays, children = {}, {}
        for name, child in graph[index][0].items():
            if name in BESIDE:
                continue
            if not child < len(graph):
                raise ValueError(f"the checkpoint names an object {child} that it does not have")
            key = graph[child][1]
            if key is None:
                if child not in numbers:
                    numbers[child] = len(reached)
                    reached.append(child)
                children[name] = numbers[child]
            elif key not in entries:
                raise ValueError(f"the checkpoint lacks the value {key.decode(errors='replace')!r}")
            elif (array := shard.tensor(entries[key])) is not None:
                arrays[name] = array
        nodes.append((arrays, children))
    return nodes
