"""HDF5 files of Keras 2: their texts, and what arrays they hold and where.

A file may lie about itself. So before an array is read, what it claims to be is compared with the
bytes that are there for it, no name in a file leads out of it, and no object of it counts twice.
"""

import math
from pathlib import PurePosixPath
from typing import Any

import h5py
import numpy as np

from normwise.migrate.models.reading.budget import Budget

SIGNATURE = b"\x89HDF\r\n\x1a\n"
FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}


class Reader:
    """Reads one file.

    Args:
        begins_at: where the HDF5 file begins in that on disk; None if that has it compressed.
        budget: of the file on disk.

    Attributes:
        contents: the bytes of the arrays that are not on the disk as they are in memory.
    """

    def __init__(self, begins_at: int | None, budget: Budget):
        self.contents: list[bytes] = []
        self._begins_at = begins_at
        self._budget = budget
        self._visited: set[int] = set()

    def groups(self, file: h5py.Group) -> list:
        """The layers of a legacy `.h5`, in order: pairs of a name and pairs of name and array."""
        names = self._names(file, "layer_names")
        if "top_level_model_weights" in file:
            names.append("top_level_model_weights")
        groups = []
        for name in names:
            group = self.member(file, name, h5py.Group)
            self._visit(group)
            arrays = [
                (each, self._array(self.member(group, each, h5py.Dataset)))
                for each in self._names(group, "weight_names")
            ]
            groups.append((name, arrays))
        return groups

    def tree(self, group: h5py.Group) -> list:
        """The objects of a `.weights.h5`, less the state of the optimizer, the root first.

        Each is a pair: its arrays by name, and the numbers of the objects inside it by name.
        """
        nodes = []
        self._add_node(group, nodes)
        return nodes

    def _add_node(self, group: h5py.Group, nodes: list) -> int:
        self._visit(group)
        arrays, children = {}, {}
        number = len(nodes)
        nodes.append((arrays, children))
        for name in group:
            if number == 0 and name in ("optimizer", "metrics"):
                continue
            member = self.member(group, name)
            if isinstance(member, h5py.Dataset):
                arrays[name] = self._array(member)
            elif name == "vars":
                self._visit(member)
                arrays |= {
                    each: self._array(held)
                    for each in member
                    if isinstance(held := self.member(member, each), h5py.Dataset)
                }
            else:
                children[name] = self._add_node(member, nodes)
        return number

    def member(self, group: h5py.Group, path: str, kind: type = h5py.HLObject):
        """What lies at a path in a group, over hard links only: others lead to other files."""
        for name in PurePosixPath(path).parts:
            link = group.get(name, getlink=True) if isinstance(group, h5py.Group) else None
            if link is None or name in ("/", ".."):
                raise ValueError(f"the file lacks {path!r}, which it names")
            if not isinstance(link, h5py.HardLink):
                raise ValueError(
                    f"{path!r} is a link to elsewhere in the file, which is not followed"
                )
            group = group[name]
        if not isinstance(group, kind):
            raise ValueError(f"{path!r} in the file is no {kind.__name__.lower()}")
        return group

    def _names(self, group: h5py.Group, attribute: str) -> list[str]:
        """A list of names, which Keras cuts in parts where it is too long for one attribute."""
        if attribute in group.attrs:
            parts = [group.attrs[attribute]]
        else:
            parts = []
            while f"{attribute}{len(parts)}" in group.attrs:
                parts.append(group.attrs[f"{attribute}{len(parts)}"])
            if not parts:
                raise ValueError(f"the group {group.name!r} of the file lacks its {attribute}")
        names = [_decoded(name) for part in parts for name in np.atleast_1d(part).ravel()]
        self._budget.spend("bytes of text", sum(map(len, names)))
        if len(set(names)) < len(names):
            raise ValueError(f"the group {group.name!r} of the file has a name twice")
        return names

    def _visit(self, member: h5py.HLObject) -> None:
        """Count an object: one that is in itself, or on many paths, would never end."""
        self._budget.spend("objects")
        address = h5py.h5o.get_info(member.id).addr
        if address in self._visited:
            raise ValueError(f"the file has {member.name!r} twice, as one of its groups in itself")
        self._visited.add(address)

    def _array(self, dataset: h5py.Dataset) -> dict[str, Any]:
        """Where an array is, or which content, if the file holds what it claims to be."""
        self._visit(dataset)
        name, dtype = dataset.name, dataset.dtype
        if dtype.kind not in "fiub":
            raise ValueError(f"the array {name!r} is of the dtype {dtype}, which no weight has")
        if dataset.is_virtual or dataset.external:
            raise ValueError(f"the array {name!r} lies in another file, which is not read")
        if dataset.shape is None:
            raise ValueError(f"the array {name!r} is empty")
        properties = dataset.id.get_create_plist()
        filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
        if len(set(filters)) < len(filters) or not set(filters) <= FILTERS:
            raise ValueError(
                f"the array {name!r} is packed by the filters {filters} of HDF5, of which only "
                "deflate, shuffle and a checksum are read, once each; save it without compression"
            )
        claimed = math.prod(dataset.shape) * dtype.itemsize
        stored = dataset.id.get_storage_size()
        if stored < claimed and not filters:
            raise ValueError(
                f"the array {name!r} claims {claimed} bytes by its shape {dataset.shape}, and has "
                f"{stored}"
            )
        array = {"dtype": dtype.str, "shape": dataset.shape}
        at = dataset.id.get_offset()
        is_plain = dtype.kind != "b" and dataset.id.get_type() == h5py.h5t.py_create(dtype)
        if at is not None and is_plain and self._begins_at is not None:
            return {**array, "at": self._begins_at + at}
        chunk = math.prod(dataset.chunks or ()) * dtype.itemsize
        self._budget.spend("bytes of arrays", max(claimed, chunk))
        self.contents.append(np.asarray(dataset[()]).tobytes())
        return {**array, "content": len(self.contents) - 1}


def text(group: h5py.Group, attribute: str) -> str | None:
    """An attribute that is a text; None where there is none of this name."""
    return _decoded(group.attrs[attribute]) if attribute in group.attrs else None


def _decoded(name) -> str:
    if isinstance(name, bytes):
        return name.decode()
    if isinstance(name, str):
        return name
    raise ValueError(f"the file has {name!r:.80} where a text belongs")
