"""HDF5 files that repeat themselves, claim more than they have, or end the library that reads them.

Every maker takes a folder and a random generator, and gives a path, a kind, and what to do with it.
"""

import functools
import io
import struct
import zlib

import h5py
import numpy as np
import old_models

from mutations import archives
from mutations.greedy_models import DENSE, WEIGHTS, about

CONFIG = old_models.sequential(old_models.input_layer("input", 4), DENSE)
# The numbers of HDF5's filters, and their options.
FILTERS = {
    **{"deflate": (1, (9,)), "shuffle": (2, (4,)), "fletcher": (3, ()), "szip": (4, (4, 8))},
    **{"nbit": (5, ()), "scale": (6, (2, 0)), "lzf": (32000, ())},
}
KERNEL = "model_weights/dense/dense/kernel:0"


def whole(folder):
    return old_models.write_h5(folder / "greedy.h5", CONFIG, WEIGHTS)


def named(folder, names, each, libver="latest", dtype=None):
    """A file of a model whose layers have these names, with what `each` makes of their group."""
    path = folder / "greedy.h5"
    with h5py.File(path, "w", libver=libver) as file:
        file.attrs["keras_version"] = "2.14.0"
        file.attrs["model_config"] = old_models.json.dumps(CONFIG)
        group = file.create_group("model_weights")
        each(group)
        group.attrs.create("layer_names", names, dtype=dtype)
    return path


def names_that_repeat(folder, rng):
    many = rng.choice([10, 1000, 100_000, 400_000])
    kind = rng.choice(["layers", "weights", "parts", "paths"])

    def fill(group):
        inner = group.create_group("a")
        inner.attrs["weight_names"] = np.array([], "S1")
        if kind == "weights":
            inner["k"] = np.zeros(2, "f4")
            inner.attrs["weight_names"] = np.array([b"k"] * many)
        if kind == "parts":
            for i in range(min(many, 3000)):
                group.attrs[f"layer_names{i}"] = np.array([b"a"])

    names = np.array([b"a"] * (many if kind == "layers" else 1))
    if kind == "paths":
        names = np.array([b"/" * (i % 50) + b"a" + b"/." * (i // 50) for i in range(1000)])
    path = named(folder, names, fill)
    if kind == "parts":
        with h5py.File(path, "r+") as file:
            del file["model_weights"].attrs["layer_names"]
    return path, f"{kind} {many} times", rng.choice(["load", "weights"])


def same_text(folder, many, length):
    """A file whose layers' names are as many addresses of one text in its heap."""
    text = b"a" * length
    names = np.array([text, *[b"b"] * (many - 1)], object)
    path = named(folder, names, lambda group: None, None, h5py.string_dtype("ascii"))
    data = bytearray(path.read_bytes())
    # A text is its length, the address of a heap, and its number there.
    first = data.find(struct.pack("<I", length))
    while first >= 0 and data[first + 16 : first + 20] != struct.pack("<I", 1):
        first = data.find(struct.pack("<I", length), first + 1)
    if first >= 0:
        data[first : first + 16 * many] = data[first : first + 16] * many
    path.write_bytes(data)
    return path


def texts_at_one_place(folder, rng):
    """Texts of any length are addresses in a heap, which may all be the same."""
    many, length = about(rng, 4, 11.9), about(rng, 4, 22)
    path = same_text(folder, many, length)
    return path, f"{many} times {length} bytes", rng.choice(["load", "weights"])


def inflating(size, times):
    """So many zeros, deflated again and again."""
    raw = _deflated(size)
    for _ in range(times - 1):
        raw = zlib.compress(raw, 9)
    return raw


@functools.cache
def _deflated(size):
    packer = zlib.compressobj(9)
    raw = b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20))
    return raw + packer.compress(bytes(size & 0xFFFFF)) + packer.flush()


def packed_kernel(path, name, shape, chunk, filters, raw, mask=0):
    """Give a file an array of one chunk of these bytes; a filter is a number and its options."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk(chunk)
    for number, options in filters:
        properties.set_filter(number, h5py.h5z.FLAG_OPTIONAL, options)
    space = h5py.h5s.create_simple(shape, (h5py.h5s.UNLIMITED,) * len(shape))
    with h5py.File(path, "r+") as file:
        del file[name]
        array = h5py.h5d.create(file.id, name.encode(), h5py.h5t.NATIVE_FLOAT, space, properties)
        # HDF5 has so many bytes for the length of a packed chunk, by that of the chunk itself.
        most = (1 << 16) - 1 if chunk[1] < 64 else len(raw)
        array.write_direct_chunk((0, 0), raw[:most], mask)


def stacked_filters(folder, rng):
    """A true kernel whose one chunk passes several filters, the last of which makes gigabytes."""
    path = whole(folder)
    stack = rng.choices(["deflate", "shuffle", "fletcher", "lzf", "szip", "scale", "nbit"], k=3)
    stack = rng.choice([stack, stack[:1], ["deflate"], ["deflate"] * 3, ["shuffle", "deflate"]])
    chunk = (4, rng.choice([2, 1 << 14]))
    size = rng.choice([16 * chunk[1], 16 * chunk[1], 4096, 1 << 20, 50 << 20, 500 << 20])
    raw = inflating(size, max(1, stack.count("deflate")))
    filters = [FILTERS[each] for each in stack]
    packed_kernel(path, KERNEL, (4, 2), chunk, filters, raw, rng.choice([0, 0, 1, 7]))
    return path, f"{'+'.join(stack)} of {size}", "load"


def chunks_of_claimed_size(folder, rng):
    """Chunks larger than the array, or that all lie at one place."""
    path = whole(folder)
    kind = rng.choice(["large", "shared", "shared", "sparse"])
    with h5py.File(path, "r+") as file:
        del file[KERNEL]
        compression = rng.choice([None, "gzip"])
        if kind == "large":
            options = {"maxshape": (None, None), "chunks": (about(rng, 2, 20), about(rng, 1, 10))}
            file.create_dataset(KERNEL, (4, 2), "f4", compression=compression, **options)
        elif kind == "sparse":
            shape = (about(rng, 10, 40), about(rng, 1, 10))
            array = file.create_dataset(KERNEL, shape, "f4", chunks=(8, 1), compression=compression)
            array[0, 0] = 1
        else:
            rows, many = about(rng, 4, 24), rng.choice([10, 500, 3000])
            array = file.create_dataset(
                KERNEL, (many, rows), "f4", chunks=(1, rows), compression="gzip"
            )
            raw = zlib.compress(bytes(4 * rows), 9)
            array.id.write_direct_chunk((0, 0), raw)
            for i in range(1, many):
                array.id.write_direct_chunk((i, 0), b"x")
            infos = [array.id.get_chunk_info(i) for i in range(many)]
            places = {info.chunk_offset[0]: (info.byte_offset, info.size) for info in infos}
    if kind == "shared":
        data = path.read_bytes()
        for i in range(1, many):
            # As a B-tree has it: the size of a chunk, its filters, its place, and its address.
            key = struct.pack("<IIQQQ", places[i][1], 0, i, 0, 0)
            ours = struct.pack("<IIQQQ", places[0][1], 0, i, 0, 0)
            data = data.replace(
                key + struct.pack("<Q", places[i][0]), ours + struct.pack("<Q", places[0][0])
            )
        path.write_bytes(data)
    return path, f"{kind} chunks", rng.choice(["load", "weights"])


def linked(layers):
    """A `.weights.h5` with its groups in the layout of newer libraries, as bytes."""
    stored = io.BytesIO()
    with h5py.File(stored, "w", libver="latest") as file:
        for i in range(layers):
            held = file.create_group(f"_layer_checkpoint_dependencies/dense_{i}/vars")
            held["0"], held["1"] = np.ones((4, 2), "f4"), np.ones(2, "f4")
    return bytearray(stored.getvalue())


def changed_link_tables(folder, rng):
    data = linked(rng.choice([1, 2, 12, 30]))
    begin = max(0, data.find(rng.choice([b"FHDB", b"FRHP", b"BTHD", b"BTLF", b"OHDR", b"dense_"])))
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = min(begin + rng.randrange(200), len(data) - 1)
        data[at] = rng.choice([0, 0, 1, 0xFF, rng.randrange(256)])
    if rng.random() < 0.5:
        path = folder / "greedy.weights.h5"
        path.write_bytes(data)
        return path, "link table", "weights"
    path = old_models.write_keras(folder / "greedy.keras", CONFIG, WEIGHTS)
    with archives.zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    path.write_bytes(archives.zipped({**members, "model.weights.h5": bytes(data)}))
    return path, "link table in a .keras", "load"


def hard_links(folder, rng):
    """Groups that hold each other several times, or themselves."""
    depth, times = rng.choice([2, 20, 30, 60]), rng.choice([1, 2, 3])
    kind = rng.choice(["diamond", "cycle", "arrays", "deep", "wide"])
    path = folder / "greedy.weights.h5"
    with h5py.File(path, "w", libver=rng.choice(["earliest", "latest"])) as file:
        layers = file.create_group("_layer_checkpoint_dependencies")
        held = layers.create_group("dense/vars")
        held["0"], held["1"] = np.ones((4, 2), "f4"), np.ones(2, "f4")
        below = held
        if kind == "wide":
            for i in range(depth * 100):
                layers[f"dense_{i}"] = layers["dense"] if times > 1 else held
        for i in range(depth if kind == "diamond" else 0):
            group = file.create_group(f"g{i}")
            for j in range(times):
                group[f"d{j}"] = below
            below = group
        if kind == "cycle":
            held["again"] = rng.choice([file, layers, held])
        if kind == "arrays":
            for i in range(depth * 100):
                held[f"{i + 2}"] = held["0"]
        if kind == "deep":
            file.create_group("/".join(["d" * rng.choice([1, 1000])] * depth * 20))
    return path, f"{kind} {depth}", "weights"


def names_of_digits(folder, rng):
    """A name that a search for the number at its end tries at every digit."""
    length = rng.choice([100, 5000, 30_000, 60_000])
    name = rng.choice(["1" * length + "x", "_" * length, "a" * length, "1" * length])
    path = folder / "greedy.weights.h5"
    with h5py.File(path, "w", libver="latest") as file:
        for i in range(rng.choice([1, 2, 20])):
            held = file.create_group(f"_layer_checkpoint_dependencies/{name}{i}x/vars")
            held["0"], held["1"] = np.ones((4, 2), "f4"), np.ones(2, "f4")
    return path, f"a name of {length}", "weights"


def claims_of_attributes(folder, rng):
    """Attributes of types and sizes that no text has, or whose claimed extents were changed."""
    path = whole(folder)
    name = rng.choice(["keras_version", "model_config", "layer_names", "weight_names"])
    many = rng.choice([1, 5, 5000])
    kinds = ["S1", "S60000", "O", "i8", "f2", "c8", "V8", h5py.ref_dtype, h5py.vlen_dtype("f4")]
    kinds += [np.dtype(("f4", (2,))), np.dtype([("a", "f4")]), h5py.enum_dtype({"A": 1}, "i4")]
    with h5py.File(path, "r+") as file:
        holder = {"layer_names": file["model_weights"], "weight_names": file["model_weights/dense"]}
        attributes = holder.get(name, file).attrs
        dtype = rng.choice(kinds)
        dtype = h5py.string_dtype() if dtype == "O" else dtype
        del attributes[name]
        try:
            attributes.create(name, None, shape=(many,), dtype=dtype)
        except (OSError, TypeError, ValueError, RuntimeError):  # too large for an attribute
            attributes.create(name, None, shape=(1,), dtype="S7")
    data = bytearray(path.read_bytes())
    at = data.find(name.encode() + b"\0")
    if at > 0 and rng.random() < 0.7:
        # The type and the extents follow the name, in fields of eight bytes.
        place = at + rng.randrange(len(name) // 8 * 8 + 8, len(name) // 8 * 8 + 48)
        size = rng.choice([1, 4, 8])
        data[place : place + size] = rng.choice([b"\xff" * size, bytes(size), rng.randbytes(size)])
        path.write_bytes(data)
    return path, f"{name} of {dtype}", rng.choice(["load", "weights"])


def changed_structures(folder, rng):
    """Bytes changed near the marks of HDF5's own tables."""
    path = folder / "greedy.h5"
    with h5py.File(path, "w", libver=rng.choice(["latest", *["earliest"] * 3])) as file:
        file.attrs["keras_version"] = "2.14.0"
        file.attrs["model_config"] = old_models.json.dumps(CONFIG)
        group = file.create_group("model_weights/dense")
        file["model_weights"].attrs["layer_names"] = np.array([b"dense"])
        group.attrs["weight_names"] = np.array([b"kernel:0", b"bias:0"])
        packed = {"chunks": True, "shuffle": True, "fletcher32": True, "compression": "gzip"}
        options = rng.choice([{}, packed, {"chunks": (1, 1)}])
        group.create_dataset("kernel:0", data=np.ones((4, 2), "f4"), **options)
        group["bias:0"] = np.ones(2, "f4")
        for i in range(rng.choice([0, 20])):
            group.attrs[f"a{i}"] = i
    data = bytearray(path.read_bytes())
    marks = [b"\x89HDF", b"OHDR", b"TREE", b"SNOD", b"HEAP", b"GCOL", b"FRHP", b"FADB", b"FAHD"]
    begins = [at for mark in marks if (at := data.find(mark)) >= 0]
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.choice(begins) + rng.randrange(96)
        data[min(at, len(data) - 1)] = rng.choice([0, 0xFF, 1, rng.randrange(256)])
    path.write_bytes(data)
    return path, "structures", rng.choice(["load", "weights", "convert"])


KINDS = (
    *(names_that_repeat, texts_at_one_place, stacked_filters, chunks_of_claimed_size),
    *(changed_link_tables, changed_link_tables, hard_links, names_of_digits),
    *(claims_of_attributes, changed_structures),
)
