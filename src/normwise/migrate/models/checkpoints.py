"""TensorFlow's checkpoints, read without TensorFlow: a sorted table of tensors, and their owners.

`PREFIX.index` is a table of blocks whose keys share their beginnings; its values say where in
`PREFIX.data-00000-of-00001` each tensor lies. One of the tensors is the graph of the objects that
were saved, which tells whose variable a tensor was.

Reference: tensorflow/core/util/tensor_bundle and tensorflow/core/lib/io/table_format.txt
"""

import math
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from normwise.migrate.models import protobuf
from normwise.migrate.models.stored import Node

OBJECT_GRAPH = b"_CHECKPOINTABLE_OBJECT_GRAPH"
MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
FOOTER_BYTES = 48
TRAILER_BYTES = 5  # how a block is compressed, and its checksum
MAX_INDEX_BYTES = 64 << 20
MAX_DEPTH = 64

# TensorFlow's numbers of the dtypes that a weight may have.
DTYPES = {
    1: np.dtype("float32"),
    2: np.dtype("float64"),
    3: np.dtype("int32"),
    4: np.dtype("uint8"),
    5: np.dtype("int16"),
    6: np.dtype("int8"),
    9: np.dtype("int64"),
    10: np.dtype("bool"),
    14: np.dtype(ml_dtypes.bfloat16),
    17: np.dtype("uint16"),
    19: np.dtype("float16"),
    22: np.dtype("uint32"),
    23: np.dtype("uint64"),
}
STRING = 7


def exists(prefix: Path) -> bool:
    """Whether there is a checkpoint of this prefix."""
    return prefix.with_name(f"{prefix.name}.index").is_file()


def read(prefix: Path) -> Node:
    """The tree of the objects that a checkpoint holds."""
    index = prefix.with_name(f"{prefix.name}.index")
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise ValueError(f"{index.name} is larger than the {MAX_INDEX_BYTES >> 20} MiB allowed")
    entries = dict(_table(index.read_bytes()))
    shards = _Shards(prefix, entries.get(b"", b""))
    if OBJECT_GRAPH not in entries:
        raise ValueError(
            f"{index.name} holds no graph of objects, so it was saved by TensorFlow 1; load it "
            "there, and save the weights as .h5"
        )
    graph = _object_graph(shards.string(entries[OBJECT_GRAPH]))
    return _Tree(graph, entries, shards).node(0, depth=0)


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Every key and value of a sorted table."""
    if data[-len(MAGIC) :] != MAGIC:
        raise ValueError("the index of the checkpoint is no table, or it is cut short")
    footer = data[-FOOTER_BYTES:]
    at = protobuf.varint(footer, protobuf.varint(footer, 0)[1])[1]
    for _, handle in _block(data, footer[at:]):
        yield from _block(data, handle)


def _block(data: bytes, handle: bytes) -> Iterator[tuple[bytes, bytes]]:
    start, at = protobuf.varint(handle, 0)
    size, _ = protobuf.varint(handle, at)
    if start + size + TRAILER_BYTES > len(data) or size < 4:
        raise ValueError("the index of the checkpoint is cut short")
    if data[start + size] != 0:
        raise ValueError("the index of the checkpoint is compressed, which TensorFlow never does")
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
        yield key, block[at + added : at + added + length]
        at += added + length


class _Shards:
    """The files that hold the tensors."""

    def __init__(self, prefix: Path, header: bytes):
        described = protobuf.collect(header)
        count = _last(described, 1, 1)
        if _last(described, 2, 0) != 0:
            raise ValueError("the checkpoint's numbers are big-endian; save it on another machine")
        if count != 1:
            # As hundreds of machines write it together, which no file of a layer's user is.
            raise ValueError(f"the checkpoint is of {count} files; save the weights as .h5")
        path = prefix.with_name(f"{prefix.name}.data-00000-of-00001")
        self._data = np.memmap(path, mode="r") if path.stat().st_size else np.empty(0, "uint8")

    def tensor(self, entry: bytes) -> np.ndarray | None:
        """The tensor of an entry; None where it is of no dtype of weights."""
        described = protobuf.collect(entry)
        dtype = DTYPES.get(_last(described, 1, 0))
        if dtype is None:
            return None
        shape = tuple(_extents(_last(described, 2, b"")))
        raw = self._bytes(described)
        if math.prod(shape) * dtype.itemsize != len(raw):
            raise ValueError(f"a tensor of shape {shape} has {len(raw)} bytes in the checkpoint")
        return raw.view(dtype).reshape(shape)

    def string(self, entry: bytes) -> bytes:
        """The single string of an entry: its length, a checksum of that, and itself."""
        described = protobuf.collect(entry)
        if _last(described, 1, 0) != STRING:
            raise ValueError("the graph of objects in the checkpoint is no string")
        raw = self._bytes(described).tobytes()
        length, at = protobuf.varint(raw, 0)
        if at + 4 + length != len(raw):
            raise ValueError("the graph of objects in the checkpoint is cut short")
        return raw[at + 4 :]

    def _bytes(self, described) -> np.ndarray:
        start, size = _last(described, 4, 0), _last(described, 5, 0)
        if start + size > len(self._data):
            raise ValueError(
                f"the checkpoint's data ends after {len(self._data)} bytes, "
                f"before the {start + size} that its index names"
            )
        return self._data[start : start + size]


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


class _Tree:
    """The graph as a tree from its root: an object of two owners is under both."""

    # What Keras, for its own ends, hangs under every layer of a SavedModel, or a model has beside
    # its layers.
    BESIDE = ("keras_api", "optimizer", "save_counter", "signatures", "variables", "metrics")

    def __init__(self, graph, entries, shards):
        self._graph, self._entries, self._shards = graph, entries, shards
        self._made = {}

    def node(self, index: int, depth: int) -> Node:
        """The tree below one object."""
        if index in self._made:
            return self._made[index]
        if depth > MAX_DEPTH:
            raise ValueError(f"objects of the checkpoint lie more than {MAX_DEPTH} deep")
        if not index < len(self._graph):
            raise ValueError(f"the checkpoint names an object {index} that it does not have")
        # Before its children, so that an object that holds itself ends there.
        node = self._made[index] = Node()
        for name, child in self._graph[index][0].items():
            if name in self.BESIDE:
                continue
            key = self._graph[child][1] if child < len(self._graph) else None
            if key is None:
                node.children[name] = self.node(child, depth + 1)
            elif (array := self._array(key)) is not None:
                node.variables[name] = array
        return node

    def _array(self, key: bytes) -> np.ndarray | None:
        if key not in self._entries:
            raise ValueError(f"the checkpoint lacks the value {key.decode(errors='replace')}")
        return self._shards.tensor(self._entries[key])
