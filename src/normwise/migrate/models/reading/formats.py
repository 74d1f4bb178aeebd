"""What a file or a folder of Keras 2 holds, as plain data.

Plain is what JSON can say: `config`, `training` (what the model was compiled with), `version` of
Keras, and either `groups` or `tree`, as hdf5.Reader gives them. An array in them is its `dtype` and
`shape`, with the byte that it begins `at` in the last of the file's `parts`, or with the number of
its `content` in a list beside the plain data.
"""

import io
import json
import re
import zipfile
from pathlib import Path

import h5py

from normwise.migrate.models.reading import checkpoints, hdf5, protobuf
from normwise.migrate.models.reading.budget import Budget

MAX_VALUES = 1 << 20  # in a config, each of which takes up to a hundred bytes of memory
MAX_DEPTH = 100
METADATA = "keras_metadata.pb"
ZIP_MEMBERS = ("metadata.json", "config.json", "model.weights.h5")
READ_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
PART_BYTES = 1 << 20
LOCAL_HEADER_BYTES = 30  # of a member of a zip archive, and then its name and its extra field

Contents = list[bytes]


def parts(path: Path) -> list[Path]:
    """The files that are read for a path, that with the arrays last."""
    files = [path]
    if path.is_dir():
        variables = path / "variables"
        files = [path / METADATA, *checkpoints.parts(variables / "variables")]
        if linked := [each.name for each in (variables, *files) if each.is_symlink()]:
            raise ValueError(
                f"its {linked[0]} is a link, which is not followed; copy the folder with what its "
                "links lead to, as by cp -rL"
            )
    elif checkpoints.exists(path):
        files = checkpoints.parts(path)
    for each in files:
        # A FIFO or a device would be read without end.
        if each.exists() and not each.is_file():
            raise ValueError(f"{each.name} is no regular file, so it is not read")
    return files


def file_bytes(path: Path) -> int:
    """The size of the files of a path together."""
    return sum(each.stat().st_size for each in parts(path) if each.exists())


def read_model(path: Path) -> tuple[dict, Contents]:
    """A file or a folder of a whole model."""
    budget = Budget(file_bytes(path))
    if path.is_dir():
        return _read_saved_model(path, budget), []
    with path.open("rb") as file:
        beginning = file.read(len(hdf5.SIGNATURE))
        if beginning.startswith(b"PK"):
            return _read_keras(file, budget)
        if beginning == hdf5.SIGNATURE:
            return _read_h5(file, budget)
    raise ValueError(
        "this is no model: neither HDF5 (.h5) nor a zip archive (.keras), nor the folder of a "
        "SavedModel"
    )


def read_weights(path: Path) -> tuple[dict, Contents]:
    """A file of weights, or a checkpoint of this prefix."""
    budget = Budget(file_bytes(path))
    if checkpoints.exists(path):
        return {"tree": checkpoints.read(path, budget)}, []
    with path.open("rb") as file:
        if file.read(len(hdf5.SIGNATURE)) != hdf5.SIGNATURE:
            raise ValueError(
                "these are no weights: neither HDF5 (.h5) nor the prefix of a TensorFlow "
                "checkpoint, which is its path without .index; a whole model is for load_model"
            )
        with h5py.File(file, "r") as opened:
            reader = hdf5.Reader(0, budget)
            if "layer_names" in opened.attrs or "layer_names0" in opened.attrs:
                plain = {"groups": reader.groups(opened)}
            elif "model_weights" in opened:
                weights = reader.member(opened, "model_weights", h5py.Group)
                plain = {"groups": reader.groups(weights)}
            else:
                plain = {"tree": reader.tree(opened)}
            return plain, reader.contents


def parse_json(text: str | bytes) -> dict:
    """A JSON object, of bounded size."""
    text = text.encode() if isinstance(text, str) else text
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"the config has more than the {MAX_VALUES:,} values allowed")
    parsed = json.loads(text, object_hook=_without_tuples)
    if not isinstance(parsed, dict):
        raise ValueError(f"the config is a {type(parsed).__name__}; expected a JSON object")
    level = [parsed]
    for _ in range(MAX_DEPTH):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for values in inner for each in values if isinstance(each, dict | list)]
    if level:
        raise ValueError(f"the config is more than {MAX_DEPTH} levels deep")
    return parsed


def _without_tuples(parsed: dict):
    """A tuple or a shape, which Keras 2 writes as an object of its own in some files, as a list."""
    is_tuple = parsed.get("class_name") in ("__tuple__", "TensorShape")
    return parsed["items"] if is_tuple and isinstance(parsed.get("items"), list) else parsed


def check_version(version) -> str:
    """The version of Keras that wrote a file, if it is one whose files are known here."""
    if not isinstance(version, str) or not re.fullmatch(r"\d+(\.\d+)+\S*", version[:40]):
        raise ValueError(f"the file names no version of Keras that wrote it, but {version!r:.80}")
    if version.startswith("3."):
        raise ValueError(f"it was saved by Keras {version:.40}: use keras.saving.load_model")
    if not version.startswith("2."):
        raise ValueError(
            f"it was saved by Keras {version:.40}; only files of Keras 2 are known here"
        )
    return version


# .h5


def _read_h5(file: io.BufferedIOBase, budget: Budget) -> tuple[dict, Contents]:
    with h5py.File(file, "r") as opened:
        version = check_version(hdf5.text(opened, "keras_version"))
        config = hdf5.text(opened, "model_config")
        if config is None:
            raise ValueError(
                "the file holds weights and no model; build the model, and use load_weights"
            )
        training = hdf5.text(opened, "training_config")
        reader = hdf5.Reader(0, budget)
        plain = {
            "config": parse_json(config),
            "training": parse_json(training) if training else None,
            "version": version,
            "groups": reader.groups(reader.member(opened, "model_weights", h5py.Group)),
        }
        return plain, reader.contents


# .keras


def _read_keras(file: io.BufferedIOBase, budget: Budget) -> tuple[dict, Contents]:
    with zipfile.ZipFile(file) as archive:
        metadata, config, weights = _members(archive)
        version = check_version(
            parse_json(_inflated(archive, metadata, budget)).get("keras_version")
        )
        parsed = parse_json(_inflated(archive, config, budget))
        begins_at = _begins_at(archive, weights, file)
        stored = (
            io.BytesIO(_inflated(archive, weights, budget))
            if begins_at is None
            else _Part(file, begins_at, weights.file_size)
        )
        with h5py.File(stored, "r") as opened:
            reader = hdf5.Reader(begins_at, budget)
            plain = {
                "config": parsed,
                "training": parsed.get("compile_config"),
                "version": version,
                "tree": reader.tree(opened),
            }
            return plain, reader.contents


def _members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The members that a model is in, if no member leads out of it and none is there twice."""
    members = {}
    for info in archive.infolist():
        name = info.filename
        steps = re.split(r"[/\\]", name)
        if ".." in steps or steps[0] == "" or ":" in steps[0]:
            raise ValueError(f"the archive has a member {name!r}, which leads out of it")
        if name in members:
            raise ValueError(f"the archive has two members {name!r}")
        # bzip2 and LZMA know no bound of what they take of memory, and Keras writes neither.
        if name in ZIP_MEMBERS and info.compress_type not in READ_METHODS:
            raise ValueError(
                f"the member {name} is packed by the method {info.compress_type}, and only deflate "
                "is read; zip the file anew without compression"
            )
        members[name] = info
    if absent := [name for name in ZIP_MEMBERS if name not in members]:
        raise ValueError(f"the archive lacks {' and '.join(absent)}")
    return [members[name] for name in ZIP_MEMBERS]


def _inflated(archive: zipfile.ZipFile, info: zipfile.ZipInfo, budget: Budget) -> bytes:
    """The bytes of a member, whose checksum zipfile compares."""
    try:
        budget.spend("bytes of arrays", info.file_size)
    except ValueError as error:
        raise ValueError(f"the member {info.filename} inflates to too much: {error}") from None
    with archive.open(info) as member:
        content = member.read(info.file_size)
    if len(content) < info.file_size:
        raise ValueError(f"the member {info.filename} is cut short")
    return content


def _begins_at(archive, info: zipfile.ZipInfo, file: io.BufferedIOBase) -> int | None:
    """Where the bytes of a member begin in the file; None where they are compressed."""
    if info.compress_type != zipfile.ZIP_STORED:
        return None
    with archive.open(info) as member:
        while member.read(PART_BYTES):
            pass  # zipfile compares the checksum
    file.seek(info.header_offset)
    header = file.read(LOCAL_HEADER_BYTES)
    name_bytes, extra_bytes = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return info.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes


class _Part(io.RawIOBase):
    """A part of a file, as the file that it was before it came into an archive."""

    def __init__(self, file: io.BufferedIOBase, begins_at: int, size: int):
        super().__init__()
        self._file, self._begins_at, self._size = file, begins_at, size
        self._at = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Where to read on."""
        self._at = (0, self._at, self._size)[whence] + offset
        return self._at

    def readinto(self, buffer) -> int:
        """Read into a buffer, at most to the end of the part."""
        self._file.seek(self._begins_at + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._size - self._at)])
        self._at += count
        return count


# SavedModel


def _read_saved_model(path: Path, budget: Budget) -> dict:
    metadata = path / METADATA
    if not metadata.is_file():
        is_other = (path / "saved_model.pb").is_file()
        raise ValueError(
            f"the folder lacks {METADATA}{' (it is a SavedModel without it)' if is_other else ''}, "
            "which TensorFlow 2.5 to 2.15 writes for a Keras model; load it there, and save it as "
            ".h5"
        )
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
    return {
        "config": {"class_name": root.get("class_name"), "config": root.get("config")},
        "training": root.get("training_config"),
        "version": check_version(root.get("keras_version")),
        "tree": checkpoints.read(prefix, budget),
    }


def _root(data: bytes) -> dict:
    """The metadata of the model itself: of the object whose path is `root`."""
    for saved in protobuf.collect(data).get(1, []):
        described = protobuf.collect(saved)
        if described.get(3, [b""])[-1] == b"root":
            return parse_json(described.get(5, [b""])[-1])
    raise ValueError(f"{METADATA} describes no model")
