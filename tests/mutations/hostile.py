"""Model files each with one thing wrong, and the words in which they are refused."""

import base64
import marshal
import zipfile
import zlib

import h5py
import numpy as np
import old_models

from mutations import archives

CONFIG = old_models.small()
WEIGHTS = {
    "conv": {"kernel": np.ones((3, 3, 4, 4), "float32"), "bias": np.zeros(4, "float32")},
    "norm": {"gamma": np.ones(4, "float32"), "beta": np.zeros(4, "float32")},
    "dense": {"kernel": np.ones((4, 3), "float32"), "bias": np.zeros(3, "float32")},
}


def h5(folder, config=CONFIG, weights=WEIGHTS):
    return old_models.write_h5(folder / "hostile.h5", config, weights)


def changed_h5(change):
    """A maker of a file that was whole before `change(file)`."""

    def make(folder):
        with h5py.File(h5(folder), "r+") as file:
            change(file)
        return folder / "hostile.h5"

    return make


def changed_keras(change):
    """A maker of an archive of the members that `change(members)` returns."""

    def make(folder):
        path = old_models.write_keras(folder / "hostile.keras", CONFIG, WEIGHTS)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        path.write_bytes(change(members))
        return path

    return make


def with_layer(*changed, weights=WEIGHTS):
    """A maker of a file whose model ends in other layers."""
    layers = CONFIG["config"]["layers"][:-1]
    return lambda folder: h5(folder, old_models.sequential(*layers, *changed), weights)


def wide_dense(units):
    return old_models.layer("Dense", "dense", units=units, activation="linear", use_bias=False)


def replace_kernel(file, **options):
    name = "model_weights/dense/dense/kernel:0"
    del file[name]
    return file.create_dataset(name, **options)


def compressed_zeros(folder):
    """A model whose config and weights agree on 3 GiB, in a few kilobytes."""
    path = with_layer(wide_dense(3 << 26), weights=WEIGHTS)(folder)
    with h5py.File(path, "r+") as file:
        file["model_weights/dense"].attrs["weight_names"] = np.array(["dense/kernel:0"], "S")
        options = {"chunks": (4, 1 << 20), "dtype": "f4", "compression": "gzip"}
        kernel = replace_kernel(file, shape=(4, 3 << 26), **options)
        chunk = zlib.compress(bytes(16 << 20))
        for column in range(0, 3 << 26, 1 << 20):
            kernel.id.write_direct_chunk((0, column), chunk)
    return path


def unwritten_zeros(folder):
    path = with_layer(wide_dense(1 << 40), weights=WEIGHTS)(folder)
    with h5py.File(path, "r+") as file:
        file["model_weights/dense"].attrs["weight_names"] = np.array(["dense/kernel:0"], "S")
        replace_kernel(file, shape=(4, 1 << 40), chunks=(4, 1024), dtype="f4")
    return path


def link_to_other_file(folder):
    other = old_models.write_h5(folder / "secret.h5", CONFIG, WEIGHTS)
    path = h5(folder)
    with h5py.File(path, "r+") as file:
        name = "model_weights/dense/dense/kernel:0"
        del file[name]
        file[name] = h5py.ExternalLink(str(other), name)
    return path


def bytes_of_other_file(folder):
    (folder / "secret").write_bytes(bytes(48))
    path = h5(folder)
    with h5py.File(path, "r+") as file:
        replace_kernel(file, shape=(4, 3), dtype="f4", external=[(str(folder / "secret"), 0, 48)])
    return path


def endless_heap(folder):
    """HDF5 1.14 walks a heap object by object, and never leaves an empty one of index 0."""
    path = h5(folder)
    content = bytearray(path.read_bytes())
    heap = content.index(b"GCOL")
    content[heap + 16 : heap + 32] = bytes(16)
    path.write_bytes(content)
    return path


def unknown_type(folder):
    """A text of a kind that HDF5 does not know: 1.14 calls what it has for it, which is nothing."""
    path = h5(folder)
    content = bytearray(path.read_bytes())
    # The attribute's name, padded to 8 bytes, and then its type: of variable length, a text.
    at = content.index(b"model_config\0\0\0\0\x19\x01") + 17
    content[at] = 3
    path.write_bytes(content)
    return path


def python_code():
    """As Keras 2 writes a Lambda layer: a function's bytes, which this one would run on."""

    def run(x, touch=None):
        __import__("os").mkdir("ran")
        return x

    return base64.b64encode(marshal.dumps(run.__code__)).decode()


def lambda_layer():
    return old_models.layer(
        "Lambda", "dense", function=[python_code(), None, None], function_type="lambda"
    )


def lambda_activation():
    code = {"class_name": "__lambda__", "config": {"value": [python_code(), None, None]}}
    return old_models.layer("Dense", "dense", units=3, activation=code)


def imported_function():
    function = {"class_name": "function", "module": "os", "config": "mkdir"}
    return old_models.layer("Dense", "dense", units=3, activation=function)


HOSTILE = {
    "a member outside": (
        changed_keras(lambda members: archives.zipped({**members, "../ran": b""})),
        ["'../ran'", "leads out"],
    ),
    "an absolute member": (
        changed_keras(lambda members: archives.zipped({**members, "/ran": b""})),
        ["'/ran'", "leads out"],
    ),
    "a zip bomb": (
        changed_keras(lambda members: archives.bomb(members, "model.weights.h5")),
        ["model.weights.h5 inflates to too much"],
    ),
    "a bomb for a config": (
        changed_keras(lambda members: archives.bomb(members, "config.json")),
        ["config.json inflates to too much"],
    ),
    "compressed zeros": (compressed_zeros, ["bytes of arrays", "save it without compression"]),
    "zeros that are not there": (unwritten_zeros, ["claims", "by its shape"]),
    "a config of terabytes": (with_layer(wide_dense(1 << 40)), ["dense"]),
    "a link to another file": (link_to_other_file, ["link", "not followed"]),
    "the bytes of another file": (bytes_of_other_file, ["lies in another file"]),
    "an endless heap": (endless_heap, ["damaged"]),
    "a type that is none": (unknown_type, ["damaged"]),
    "a Lambda layer": (with_layer(lambda_layer()), ["Lambda"]),
    "a lambda for an activation": (with_layer(lambda_activation()), ["__lambda__"]),
    "a function of os": (with_layer(imported_function()), ["os"]),
    "a later version": (
        changed_h5(lambda file: file.attrs.__setitem__("keras_version", "4.0.0")),
        ["4.0.0", "Keras 2"],
    ),
    "a config without end": (
        changed_h5(lambda file: file.attrs.__setitem__("model_config", '{"config":' * 10**5)),
        ["it is damaged, or not as Keras 2 writes it: RecursionError"],
    ),
}
