"""Files of Keras 2, read into memory: no code of theirs runs, and nothing touches the disk.

A file may lie about itself. So before an array is read, what it claims to be is compared with the
bytes that are there for it, and no name in a file leads out of the file.
"""

import io
import json
import math
import re
import zipfile
from pathlib import Path, PurePosixPath

import h5py
import numpy as np

from normwise.migrate.models import checkpoints, heaps, protobuf
from normwise.migrate.models.stored import Group, Node, Saved

MAX_CONFIG_BYTES = 16 << 20
ATTRIBUTE_TYPES = (h5py.h5t.TypeStringID, h5py.h5t.TypeIntegerID, h5py.h5t.TypeFloatID)
MAX_ATTRIBUTE_BYTES = 1 << 26
# Compressed weights: float32 values that were trained shrink by a tenth, zeros by a thousand.
MAX_EXPANSION = 20
MIN_EXPANDED_BYTES = 1 << 20
MAX_GROUPS_DEEP = 32
METADATA = "keras_metadata.pb"
ZIP_MEMBERS = ("metadata.json", "config.json", "model.weights.h5")


def read_model(path: Path) -> Saved:
    """What a file or a folder of a whole model holds."""
    if path.is_dir():
        return _read_saved_model(path)
    beginning = _beginning(path)
    if beginning.startswith(b"PK"):
        return _read_keras(path)
    if beginning == heaps.SIGNATURE:
        heaps.check_file(path)
        with h5py.File(path, "r") as file:
            return _read_h5(file, path.stat().st_size)
    raise ValueError(
        "this is no model: neither HDF5 (.h5) nor a zip archive (.keras), nor the folder of a "
        "SavedModel"
    )


def read_weights(path: Path) -> list[Group] | Node:
    """What a file of weights, or a checkpoint of this prefix, holds."""
    if checkpoints.exists(path):
        return checkpoints.read(path)
    if _beginning(path) != heaps.SIGNATURE:
        raise ValueError(
            "these are no weights: neither HDF5 (.h5) nor the prefix of a TensorFlow checkpoint, "
            "which is its path without .index; a whole model is for load_model"
        )
    heaps.check_file(path)
    with h5py.File(path, "r") as file:
        limit = path.stat().st_size
        if "layer_names" in file.attrs or "layer_names0" in file.attrs:
            return _groups(file, limit)
        if "model_weights" in file:
            return _groups(_member(file, "model_weights", h5py.Group), limit)
        return _tree(file, _Budget(limit))


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(8)


def parse_json(text: str | bytes) -> dict:
    """A JSON object, of bounded size."""
    if len(text) > MAX_CONFIG_BYTES:
        raise ValueError(f"the config is larger than the {MAX_CONFIG_BYTES >> 20} MiB allowed")
    parsed = json.loads(text, object_hook=_without_tuples)
    if not isinstance(parsed, dict):
        raise ValueError(f"the config is a {type(parsed).__name__}; expected a JSON object")
    return parsed


def _without_tuples(parsed: dict):
    """A tuple or a shape, which Keras 2 writes as an object of its own in some files, as a list."""
    is_tuple = parsed.get("class_name") in ("__tuple__", "TensorShape")
    return parsed["items"] if is_tuple and isinstance(parsed.get("items"), list) else parsed


def check_version(version) -> str:
    """The version of Keras that wrote a file, if it is one whose files are known here."""
    if not isinstance(version, str) or not re.fullmatch(r"\d+(\.\d+)+\S*", version):
        raise ValueError(f"the file names no version of Keras that wrote it, but {version!r}")
    if version.startswith("3."):
        raise ValueError(f"it was saved by Keras {version}: use keras.saving.load_model")
    if not version.startswith("2."):
        raise ValueError(f"it was saved by Keras {version}; only files of Keras 2 are known here")
    return version


# .h5


def _read_h5(file: h5py.File, limit: int) -> Saved:
    version = check_version(_text(file, "keras_version"))
    if "model_config" not in file.attrs:
        raise ValueError(
            "the file holds weights and no model; build the model, and use load_weights"
        )
    training = _text(file, "training_config")
    return Saved(
        config=parse_json(_text(file, "model_config")),
        training=parse_json(training) if training else None,
        version=version,
        weights=_groups(_member(file, "model_weights", h5py.Group), limit),
    )


def _groups(file: h5py.Group, limit: int) -> list[Group]:
    """The layers' arrays, in the order of the layers."""
    budget = _Budget(limit)
    names = _names(file, "layer_names")
    if "top_level_model_weights" in file:
        names.append("top_level_model_weights")
    groups = []
    for name in names:
        group = _member(file, name, h5py.Group)
        arrays = [
            (each, budget.read(_member(group, each, h5py.Dataset)))
            for each in _names(group, "weight_names")
        ]
        groups.append(Group(name, arrays))
    return groups


def _names(group: h5py.Group, attribute: str) -> list[str]:
    """A list of names, which Keras cuts in parts where it is too long for one attribute."""
    if attribute in group.attrs:
        parts = [_attribute(group, attribute)]
    else:
        parts = []
        while f"{attribute}{len(parts)}" in group.attrs:
            parts.append(_attribute(group, f"{attribute}{len(parts)}"))
        if not parts:
            raise ValueError(f"the group {group.name} of the file lacks its {attribute}")
    return [_decoded(name) for part in parts for name in np.atleast_1d(part).ravel()]


def _text(group: h5py.Group, attribute: str) -> str | None:
    return _decoded(_attribute(group, attribute)) if attribute in group.attrs else None


def _decoded(name) -> str:
    if isinstance(name, bytes):
        return name.decode()
    if isinstance(name, str):
        return name
    raise ValueError(f"the file has {name!r} where a text belongs")


def _attribute(group: h5py.Group, name: str):
    stored = group.attrs.get_id(name)
    # Reading a type of variable length that is neither sequence nor text ends the process in HDF5
    # 1.14.6, so only the types that Keras writes are read.
    if not isinstance(stored.get_type(), ATTRIBUTE_TYPES):
        raise ValueError(f"the attribute {name} of the file is no text and no number")
    if math.prod(stored.shape) * stored.dtype.itemsize > MAX_ATTRIBUTE_BYTES:
        raise ValueError(f"the attribute {name} of the file is of an impossible size")
    return group.attrs[name]


def _member(group: h5py.Group, path: str, kind: type = h5py.HLObject):
    """What lies at a path in a group, over hard links only: others lead to other files."""
    for name in PurePosixPath(path).parts:
        link = group.get(name, getlink=True) if isinstance(group, h5py.Group) else None
        if link is None or name in ("/", ".."):
            raise ValueError(f"the file lacks {path!r}, which it names")
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{path!r} is a link to elsewhere in the file, which is not followed")
        group = group[name]
    if not isinstance(group, kind):
        raise ValueError(f"{path!r} in the file is no {kind.__name__.lower()}")
    return group


def _tree(group: h5py.Group, budget: "_Budget", depth: int = 0) -> Node:
    """The tree of objects in a `.weights.h5` of Keras 2, less the state of the optimizer."""
    if depth > MAX_GROUPS_DEEP:
        raise ValueError(f"its groups lie more than {MAX_GROUPS_DEEP} deep")
    node = Node()
    for name in group:
        if depth == 0 and name in ("optimizer", "metrics"):
            continue
        budget.visit()
        member = _member(group, name)
        if isinstance(member, h5py.Dataset):
            node.variables[name] = budget.read(member)
        elif name == "vars":
            node.variables |= _tree(member, budget, depth + 1).variables
        else:
            node.children[name] = _tree(member, budget, depth + 1)
    return node


class _Budget:
    """How many bytes of arrays, and how many groups, a file of a size can honestly hold."""

    GROUP_BYTES = 32  # no group or array takes less of a file

    def __init__(self, file_bytes: int):
        self._bytes_left = max(MAX_EXPANSION * file_bytes, MIN_EXPANDED_BYTES)
        self._groups_left = file_bytes // self.GROUP_BYTES

    def visit(self) -> None:
        """Count a group or an array: one that lies in itself would never end."""
        self._groups_left -= 1
        if self._groups_left < 0:
            raise ValueError("the file has more groups than it has room for, as one in itself")

    def read(self, dataset: h5py.Dataset) -> np.ndarray:
        """An array, if the file holds what it claims to be."""
        self.visit()
        name, dtype = dataset.name, dataset.dtype
        if dtype.kind not in "fiub":
            raise ValueError(f"the array {name} is of the dtype {dtype}, which no weight has")
        if dataset.is_virtual or dataset.external:
            raise ValueError(f"the array {name} lies in another file, which is not read")
        claimed = math.prod(dataset.shape or (0,)) * dtype.itemsize
        stored = dataset.id.get_storage_size()
        compressed = dataset.id.get_create_plist().get_nfilters() > 0
        if stored < claimed and not compressed:
            raise ValueError(
                f"the array {name} claims {claimed} bytes by its shape {dataset.shape}, and has "
                f"{stored}"
            )
        self._bytes_left -= claimed
        if self._bytes_left < 0:
            raise ValueError(
                f"the array {name} of shape {dataset.shape} makes more than {MAX_EXPANSION} times "
                "the size of the file; if it is yours, save it without compression"
            )
        if dataset.shape is None:
            raise ValueError(f"the array {name} is empty")
        return dataset[()]


# .keras


def _read_keras(path: Path) -> Saved:
    limit = max(MAX_EXPANSION * path.stat().st_size, MIN_EXPANDED_BYTES)
    with zipfile.ZipFile(path) as archive:
        members = _members(archive)
        metadata, config = (
            parse_json(_inflate(archive, members[name], min(limit, MAX_CONFIG_BYTES)))
            for name in ZIP_MEMBERS[:2]
        )
        version = check_version(metadata.get("keras_version"))
        weights = _inflate(archive, members["model.weights.h5"], limit)
    heaps.check(weights)
    with h5py.File(io.BytesIO(weights), "r") as file:
        tree = _tree(file, _Budget(len(weights)))
    return Saved(config, config.get("compile_config"), version, tree)


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members of an archive by name, if none leads out of it and none is there twice."""
    members = {}
    for info in archive.infolist():
        name = info.filename
        parts = re.split(r"[/\\]", name)
        if ".." in parts or parts[0] == "" or ":" in parts[0]:
            raise ValueError(f"the archive has a member {name!r}, which leads out of it")
        if name in members:
            raise ValueError(f"the archive has two members {name!r}")
        members[name] = info
    if absent := [name for name in ZIP_MEMBERS if name not in members]:
        raise ValueError(f"the archive lacks {' and '.join(absent)}")
    return members


def _inflate(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> bytes:
    """The bytes of a member, at most `limit` of them whatever it claims."""
    with archive.open(info) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(
            f"the member {info.filename} inflates to more than {limit} bytes; if the file is "
            "yours, zip it without compression"
        )
    return content


# SavedModel


def _read_saved_model(path: Path) -> Saved:
    metadata = path / METADATA
    if not metadata.is_file():
        is_other = (path / "saved_model.pb").is_file()
        raise ValueError(
            f"the folder lacks {METADATA}{' (it is a SavedModel without it)' if is_other else ''}, "
            "which TensorFlow 2.5 to 2.15 writes for a Keras model; load it there, and save it as "
            ".h5"
        )
    if metadata.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{METADATA} is larger than the {MAX_CONFIG_BYTES >> 20} MiB allowed")
    root = _root(metadata.read_bytes())
    if not isinstance(root.get("config"), dict):
        raise ValueError(
            f"it holds a {root.get('class_name')} without a config, as a model of its own class "
            "is; make it from its source, and read the weights alone by load_weights, from "
            "variables/variables"
        )
    prefix = path / "variables" / "variables"
    if not checkpoints.exists(prefix):
        raise ValueError("the folder lacks variables/variables.index, the weights")
    return Saved(
        config={"class_name": root.get("class_name"), "config": root.get("config")},
        training=root.get("training_config"),
        version=check_version(root.get("keras_version")),
        weights=checkpoints.read(prefix),
    )


def _root(data: bytes) -> dict:
    """The metadata of the model itself: of the object whose path is `root`."""
    for saved in protobuf.collect(data).get(1, []):
        described = protobuf.collect(saved)
        if described.get(3, [b""])[-1] == b"root":
            return parse_json(described.get(5, [b""])[-1])
    raise ValueError(f"{METADATA} describes no model")
