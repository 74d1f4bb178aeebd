"""Mutations of HDF5 files that stay HDF5 files."""

import functools
import string
import zlib
from pathlib import Path

import h5py
import numpy as np

from mutations import configs, raw

MIB = 1 << 20


def mutate(path: Path, rng) -> str:
    """Change a file as HDF5 sees it, so that it stays one; its bytes where it is none."""
    change = rng.choice(HDF5)
    try:
        with h5py.File(path, "r+") as file:
            kind = change(file, rng)
    except (OSError, LookupError, ValueError, TypeError, RuntimeError):
        return raw.mutate(path, rng)
    return kind or change.__name__


def _groups(file):
    found = [file]
    file.visititems(lambda _, each: found.append(each) if isinstance(each, h5py.Group) else None)
    return found


def _datasets(file):
    found = []
    file.visititems(lambda _, each: found.append(each) if isinstance(each, h5py.Dataset) else None)
    return found


def _replace(dataset, **options):
    file, name = dataset.file, dataset.name
    del file[name]
    return file.create_dataset(name, **options)


def change_model_config(file, rng):
    text = file.attrs["model_config"]
    text, kind = configs.mutate(text if isinstance(text, bytes) else text.encode(), rng)
    # As Keras writes it: a text of any length, which bytes that are none cannot be.
    try:
        file.attrs["model_config"] = text.decode()
    except UnicodeDecodeError:
        file.attrs["model_config"] = np.bytes_(text[:60000])
    return kind


def change_attribute(file, rng):
    holder = rng.choice([g for g in _groups(file) if len(g.attrs)])
    name = rng.choice(sorted(holder.attrs))
    holder.attrs[name] = rng.choice(
        [
            *(b"", b"\xff\xfe", "9.99.9", 3, -1.5, np.nan, "x" * 60000),
            *(np.zeros((2, 2)), np.array([b"../a", b"/b", b""]), np.array([], "S1")),
            *(h5py.Empty("f4"), np.array([b"kernel:0"] * 5000), np.array([1, 2])),
        ]
    )


def remove_attribute(file, rng):
    holder = rng.choice([g for g in _groups(file) if len(g.attrs)])
    del holder.attrs[rng.choice(sorted(holder.attrs))]


def change_names(file, rng):
    holder = rng.choice(
        [g for g in _groups(file) if {"weight_names", "layer_names"} & set(g.attrs)]
    )
    for name in {"weight_names", "layer_names"} & set(holder.attrs):
        names = list(holder.attrs[name]) or [b"none"]
        change = rng.choice(["reverse", "drop", "repeat", "rename"])
        if change == "reverse":
            names.reverse()
        elif change == "drop":
            names.pop()
        elif change == "repeat":
            names += names
        else:
            names[0] = rng.choice([b"/", b"..", b".", b"a/b/c", b"\xff", b"x" * 1000])
        holder.attrs[name] = names


def remove_entry(file, rng):
    entry = rng.choice(_groups(file)[1:] + _datasets(file))
    del file[entry.name]


def empty_group(file, rng):
    group = rng.choice(_groups(file))
    for name in list(group):
        del group[name]


def group_for_dataset(file, rng):
    name = rng.choice(_datasets(file)).name
    del file[name]
    file.create_group(name)


def dataset_for_group(file, rng):
    name = rng.choice(_groups(file)[1:]).name
    del file[name]
    file[name] = np.ones(3, "float32")


def huge_shape(file, rng):
    dataset = rng.choice(_datasets(file))
    shape = rng.choice([(2**20, 2**20), (2**40,), (2**62,), (1,) * 32, (2**15,) * 4])
    chunks = tuple(min(extent, 2 ** (12 // len(shape))) for extent in shape)
    _replace(dataset, shape=shape, chunks=chunks, dtype=rng.choice(["f4", "f8", "S1000"]))


def other_shape(file, rng):
    dataset = rng.choice(_datasets(file))
    shape = list(dataset.shape)
    change = rng.choice(["scalar", "empty", "longer", "transposed", "rank"])
    if change == "longer" and shape:
        shape[rng.randrange(len(shape))] += 1
    elif change == "empty" and shape:
        shape[rng.randrange(len(shape))] = 0
    shape = {"scalar": [], "transposed": shape[::-1], "rank": [1, *shape]}.get(change, shape)
    _replace(dataset, data=np.ones(shape, "float32"))


def other_dtype(file, rng):
    dataset = rng.choice(_datasets(file))
    shape = dataset.shape
    dtype = rng.choice(
        [
            *("f2", "f8", "i1", "u8", "c8", "S3", "?", ">f4"),
            *(
                h5py.string_dtype(),
                h5py.ref_dtype,
                h5py.vlen_dtype("f4"),
                h5py.opaque_dtype("M8[s]"),
            ),
            *(np.dtype([("a", "f4"), ("b", "S2")]), np.dtype(("f4", (3,)))),
            h5py.enum_dtype({"A": 0, "B": 1}),
        ]
    )
    _replace(dataset, shape=shape, dtype=dtype)


def special_values(file, rng):
    dataset = rng.choice(_datasets(file))
    dataset[...] = rng.choice([np.nan, np.inf, -1e38, 1e-45])


def compressed_bomb(file, rng):
    """A weight of the right kind but gigabytes long, in a few kilobytes of file."""
    dataset = rng.choice(_datasets(file))
    rows = 16 * MIB
    bomb = _replace(dataset, shape=(24 * rows,), chunks=(rows,), dtype="f4", compression="gzip")
    for block in range(24):
        bomb.id.write_direct_chunk((block * rows,), _deflated_chunk())


@functools.cache
def _deflated_chunk() -> bytes:
    return zlib.compress(bytes(64 * MIB))


def add_link_out(file, rng):
    """A link to another file, as anybody's may be."""
    entry = rng.choice(_groups(file)[1:] + _datasets(file)).name
    del file[entry]
    target = rng.choice(["/etc/hostname", "../../missing.h5", file.filename, "/dev/zero", "\0"])
    file[entry] = h5py.ExternalLink(target, rng.choice(["/", entry, "missing"]))


def external_storage(file, rng):
    dataset = rng.choice(_datasets(file))
    source = rng.choice(["/etc/hostname", "/dev/zero", "missing"])
    _replace(dataset, shape=dataset.shape, dtype="f4", external=[(source, 0, h5py.h5f.UNLIMITED)])


def virtual_dataset(file, rng):
    dataset = rng.choice([d for d in _datasets(file) if d.shape])
    layout = h5py.VirtualLayout(dataset.shape, "f4")
    layout[...] = h5py.VirtualSource(
        rng.choice(["/etc/hostname", "missing.h5", "."]), dataset.name, dataset.shape
    )
    name = dataset.name
    del file[name]
    file.create_virtual_dataset(name, layout)


def link_cycle(file, rng):
    entry = rng.choice(_groups(file)[1:] + _datasets(file))
    name, parent = entry.name, entry.parent
    del file[name]
    if rng.random() < 0.5:
        file[name] = h5py.SoftLink(name)
    else:
        # A hard link to the group that holds it: every path through it is endless.
        file[name] = parent


def many_groups(file, rng):
    for i in range(2000):
        file.create_group(f"model_weights/g{i}")


def deep_groups(file, rng):
    file.create_group("/".join(string.ascii_letters * 10))


HDF5 = (
    *(change_model_config,) * 14,
    *(change_attribute, change_attribute, remove_attribute, change_names, change_names),
    *(remove_entry, empty_group, group_for_dataset, dataset_for_group, huge_shape, huge_shape),
    *(other_shape, other_shape, other_dtype, other_dtype, special_values, compressed_bomb),
    *(add_link_out, external_storage, virtual_dataset, link_cycle, link_cycle),
    *(many_groups, deep_groups),
)
