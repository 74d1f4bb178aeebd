"""Mutations of zip archives, as `.keras` files are."""

import functools
import io
import warnings
import zipfile
import zlib
from pathlib import Path

from mutations import configs, hdf5, raw

MIB = 1 << 20
BOMB_MIB = 1536


def mutate(path: Path, rng) -> str:
    """Change an archive or what is in it, and name the change."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change = rng.choice(ZIPS)
    if change is change_config:
        members["config.json"], kind = configs.mutate(members["config.json"], rng)
        path.write_bytes(zipped(members))
        return kind
    if change is change_weights:
        inner = path.with_name("inner.h5")
        inner.write_bytes(members["model.weights.h5"])
        kind = rng.choice([raw.mutate, hdf5.mutate, hdf5.mutate])(inner, rng)
        members["model.weights.h5"] = inner.read_bytes()
        inner.unlink()
        path.write_bytes(zipped(members))
        return f"weights {kind}"
    path.write_bytes(change(members, rng))
    return change.__name__


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def change_config(members, rng):
    """Change what config.json says."""


def change_weights(members, rng):
    """Change the HDF5 file in the archive."""


def drop_member(members, rng):
    dropped = rng.choice(sorted(members))
    return zipped({name: members[name] for name in members if name != dropped})


def rename_member(members, rng):
    renamed = rng.choice(sorted(members))
    prefix = rng.choice(["../", "../../../", "/", "a/", "C:\\", "..\\"])
    return zipped({prefix * (n == renamed) + n: content for n, content in members.items()})


def add_members(members, rng):
    """Members that no model has, at places where none may be written."""
    names = ["../ran", "../../../ran", "/normwise-ran", "assets/../../ran", "assets/a/b", "~"]
    return zipped({**members, **dict.fromkeys(names, b"ran")})


def add_many_members(members, rng):
    return zipped({**{f"assets/{i}": b"" for i in range(20_000)}, **members})


def repeat_member(members, rng):
    file = io.BytesIO(zipped(members))
    name = rng.choice(sorted(members))
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr(name, rng.choice([b"", b"{}", members[name], members[name][:100]]))
    return file.getvalue()


def add_link(members, rng):
    file = io.BytesIO()
    linked = rng.choice(sorted(members))
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.create_system = 3
            info.external_attr = (0o120777 if name == linked else 0o100644) << 16
            archive.writestr(info, b"/etc/hostname" if name == linked else content)
    return file.getvalue()


def deflate_bomb(members, rng):
    return bomb(members, rng.choice(["config.json", "model.weights.h5", "metadata.json", "a/x"]))


def bomb(members, name):
    """An archive one of whose members inflates to more than a gigabyte."""
    stream, checksum = _deflated(b" " if name.endswith(".json") else b"\0")
    size = BOMB_MIB * MIB
    return _with_header(members, name, stream, CRC=checksum, compress_type=8, file_size=size)


def lie_in_header(members, rng):
    name = rng.choice(sorted(members))
    field, value = rng.choice(
        [
            *(("file_size", size) for size in (0, 1, 2**31, 2**32 - 2, 2**40)),
            *(("compress_size", size) for size in (0, 1, 2**31, 2**40)),
            *(("header_offset", at) for at in (1, 100, 2**31, 2**40)),
            *(("compress_type", method) for method in (1, 8, 12, 14, 93, 99)),
            *(("flag_bits", bits) for bits in (1, 8, 0x41, 0x800)),
            ("CRC", 0),
        ]
    )
    return _with_header(members, name, members[name], **{field: value})


def _with_header(members, name, content, **fields):
    """An archive whose table of contents says what it likes of one member."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for other in members:
            if other != name:
                archive.writestr(other, members[other])
        archive.writestr(info := zipfile.ZipInfo(name), content)
        for field, value in fields.items():
            setattr(info, field, value)
    return file.getvalue()


@functools.cache
def _deflated(byte: bytes) -> tuple[bytes, int]:
    """A deflated stream of as many MiB of one byte, and its checksum."""
    block, checksum = byte * MIB, 0
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    for _ in range(BOMB_MIB):
        checksum = zlib.crc32(block, checksum)
    # A full flush forgets what came before, so that the same bytes inflate to the same block again.
    return first * BOMB_MIB + packer.flush(), checksum


ZIPS = (
    *(change_config,) * 8,
    *(change_weights,) * 8,
    *(drop_member, rename_member, add_members, add_many_members, repeat_member, add_link),
    *(deflate_bomb, lie_in_header, lie_in_header),
)
