"""The first of two stages: a file becomes plain data, in a process of its own, and that a Saved.

HDF5 ends a process at some damaged files, and never returns from others; decompression takes what
memory it is given. So another process reads, with limits in proportion to the file, and what it
answers is data: JSON, and the bytes of arrays that are not in the file as they are in memory; where
the others are, which are read here.

Where no Python can be started (a program that is frozen or embeds Python, a system without
processes) the file is read in place, and then only the budget of `reading` limits what it costs.
"""

import collections
import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from normwise.migrate.models.reading import child, formats
from normwise.migrate.models.reading.budget import LIMITS, Budget
from normwise.migrate.models.stored import Group, Node, Saved

# Of a processor, after Python has started; most files take a tenth of a second.
PROCESSOR_S, BYTES_PER_PROCESSOR_S = 3, 10_000_000
# By the clock, where the disk is slow or far away, with the start.
CLOCK_S, BYTES_PER_CLOCK_S = 60, 3_000_000
MEMORY_BYTES = 512 << 20
MAX_PLAIN_BYTES = 96 << 20


def read_model(path: Path) -> Saved:
    """What a file or a folder of a whole model holds."""
    return _saved(path, "read_model")


def read_weights(path: Path) -> Saved:
    """What a file of weights, or a checkpoint of this prefix, holds."""
    return _saved(path, "read_weights")


def damaged(kind: str, text: str) -> ValueError:
    """The error for whatever a library raises at a file."""
    return ValueError(f"it is damaged, or not as Keras 2 writes it: {kind} ({text:.300})")


def _saved(path: Path, function: str) -> Saved:
    before = _state(path)
    file_bytes = sum(size for size, _ in before)
    answer = _ask(path, function, file_bytes)
    plain, contents = getattr(formats, function)(path) if answer is None else answer
    holder = formats.parts(path)[-1]
    with holder.open("rb") if holder.exists() else io.BytesIO() as file:
        arrays = _Arrays(file, contents, Budget(file_bytes))
        if "groups" in plain:
            weights = [
                Group(name, [(each, arrays.array(described)) for each, described in held])
                for name, held in plain["groups"]
            ]
        else:
            weights = _root(plain["tree"], arrays)
    if _state(path) != before:
        raise ValueError("it changed while it was read; load it again")
    config, training, version = map(plain.get, ("config", "training", "version"))
    return Saved(weights, config, training, version, file_bytes)


def _state(path: Path) -> list[tuple[int, int]]:
    """The size of each file of a path, and when it changed."""
    states = (each.stat() for each in formats.parts(path) if each.exists())
    return [(each.st_size, each.st_mtime_ns) for each in states]


def _ask(path: Path, function: str, file_bytes: int) -> tuple[dict, list[bytearray]] | None:
    """What a process of its own reads; None where none can be started."""
    # A program that embeds Python is no Python to start, and would start itself.
    if "python" not in Path(sys.executable or "").name.lower() or hasattr(sys, "frozen"):
        return None
    processor_s = PROCESSOR_S + file_bytes // BYTES_PER_PROCESSOR_S
    task = {
        "search": [each for each in sys.path if each],
        "function": function,
        "path": str(path.resolve()),
        "processor_s": processor_s,
        "memory_bytes": MEMORY_BYTES + int((LIMITS["bytes of arrays"][1] + 4) * file_bytes),
    }
    options = ["-I", "-S", *(["-B"] if sys.dont_write_bytecode else [])]
    try:
        process = subprocess.Popen(
            [sys.executable, *options, child.__file__, json.dumps(task)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # No filter of HDF5 comes from another place, and no threads are needed.
            env={**os.environ, "HDF5_PLUGIN_PRELOAD": "::", "OPENBLAS_NUM_THREADS": "1"},
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except OSError:
        return None
    clock_s = CLOCK_S + file_bytes / BYTES_PER_CLOCK_S
    with process, _killed_after(clock_s, process):
        if process.stdout.read(len(child.READY)) != child.READY:
            return None
        try:
            plain, contents = _answer(process.stdout, file_bytes)
        except EOFError:
            raise ValueError(_end(process.wait(), processor_s, clock_s)) from None
    if "error" in plain:
        kind, text = plain["error"]
        raise ValueError(text) if kind == "ValueError" else damaged(kind, text)
    return plain, contents


@contextlib.contextmanager
def _killed_after(clock_s: float, process: subprocess.Popen) -> Iterator[None]:
    """End a process at the end of the block, or after some time by the clock."""
    watch = threading.Timer(clock_s, process.kill)
    watch.start()
    try:
        yield
    finally:
        watch.cancel()
        process.kill()


def _answer(pipe: BinaryIO, file_bytes: int) -> tuple[dict, list[bytearray]]:
    length = int.from_bytes(_exactly(pipe, 8), "little")
    if length > MAX_PLAIN_BYTES + file_bytes:
        raise ValueError(f"it makes {length:,} bytes of names, which no file of its size does")
    plain = json.loads(_exactly(pipe, length))
    Budget(file_bytes).spend("bytes of arrays", sum(plain.get("sizes", ())))
    return plain, [_exactly(pipe, size) for size in plain.get("sizes", ())]


def _exactly(file: BinaryIO, size: int) -> bytearray:
    content = bytearray(size)
    if file.readinto(content) < size:
        raise EOFError("it ended while it was read")
    return content


def _end(status: int, processor_s: float, clock_s: float) -> str:
    """Why a process ended that has not answered."""
    name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    if name == "SIGXCPU":
        return f"reading it takes more than {processor_s:.0f} s, so it is damaged"
    if name == "SIGKILL":
        return f"reading it takes more than {clock_s:.0f} s, or more memory than there is"
    return f"it is damaged: HDF5 ends the process that reads it ({name})"


class _Arrays:
    """The arrays of a file: of its own bytes, or contents that came apart from it."""

    def __init__(self, file: BinaryIO, contents: list, budget: Budget):
        self._file, self._contents, self._budget = file, contents, budget

    def array(self, described: dict[str, Any]) -> np.ndarray:
        """An array of the plain data, in memory of its own."""
        name = described["dtype"]
        dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
        shape = tuple(described["shape"])
        if "content" in described:
            raw = self._contents[described["content"]]
        else:
            self._budget.spend("bytes of weights", math.prod(shape) * dtype.itemsize)
            self._file.seek(described["at"])
            raw = _exactly(self._file, math.prod(shape) * dtype.itemsize)
        # PyTorch takes no numbers in the other order of bytes.
        return np.frombuffer(raw, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _root(tree: list, arrays: _Arrays) -> Node:
    nodes = [
        Node({name: arrays.array(each) for name, each in described.items()})
        for described, _ in tree
    ]
    owners = collections.defaultdict(list)
    for node, (_, children) in zip(nodes, tree, strict=True):
        node.children = {name: nodes[number] for name, number in children.items()}
        for each in node.children.values():
            owners[id(each)].append(node)
    filled = [node for node in nodes if node.variables]
    while filled:
        node = filled.pop()
        if node.is_empty:
            node.is_empty = False
            filled += owners[id(node)]
    return nodes[0]
