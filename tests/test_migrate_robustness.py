"""Files that are damaged or hostile: loaded or refused in words, at little cost, without a trace.

`make fuzz` tries 2,000 mutations; every run of the tests tries the first of them.
"""

import base64
import json
import marshal
import os
import random
import shutil
import sys
import zipfile
import zlib
from pathlib import Path

import h5py
import keras
import numpy as np
import old_models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import archives, configs, mutate

if sys.platform != "linux":
    pytest.skip("the limits of a process are Linux's", allow_module_level=True)

from sandbox import Sandbox

FIXTURES = Path(__file__).parents[2] / "shared" / "tfa_models"
BY_BACKEND = {"jax": 500, "tensorflow": 150, "torch": 150}
COUNT = int(os.environ.get("NORMWISE_MUTATIONS") or BY_BACKEND[keras.config.backend()])
PROCESSOR_LIMIT_S = 5.0
MEMORY_LIMIT_MIB = 1024

CONFIG = old_models.small()
WEIGHTS = {
    "conv": {"kernel": np.ones((3, 3, 4, 4), "float32"), "bias": np.zeros(4, "float32")},
    "norm": {"gamma": np.ones(4, "float32"), "beta": np.zeros(4, "float32")},
    "dense": {"kernel": np.ones((4, 3), "float32"), "bias": np.zeros(3, "float32")},
}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    with Sandbox(tmp_path_factory.mktemp("sandbox")) as sandbox:
        yield sandbox


@pytest.fixture
def folder(sandbox):
    """A folder for one file, deep in one that is watched."""
    made = sandbox.folder / "deep" / "input"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Files with nothing wrong, each with the model that its weights are for, if it is no model."""
    made = tmp_path_factory.mktemp("whole")
    files = {
        old_models.write_h5(made / "small.h5", CONFIG, WEIGHTS): None,
        old_models.write_keras(made / "small.keras", CONFIG, WEIGHTS): None,
    }
    for path in sorted(FIXTURES.glob("*.*")):
        if path.name.endswith(".weights.h5"):
            files[path] = path.with_name(path.name.replace(".weights", ""))
        elif path.suffix in (".h5", ".keras", ".savedmodel"):
            files[path] = None
    return files


def fault(outcome, path):
    """What is wrong with how a load ended, or None."""
    if outcome.died:
        return f"the process ended: {outcome.died}"
    if outcome.written:
        return f"files changed: {outcome.written}"
    if outcome.error not in ("", "ValueError", "OSError"):
        return f"raised {outcome.error}: {outcome.text}\n{outcome.traceback}"
    if outcome.error and path.name not in outcome.text:
        return f"does not name the file: {outcome.text}\n{outcome.traceback}"
    if "\n" in outcome.text:
        return f"is no line: {outcome.text}"
    if outcome.processor_s > PROCESSOR_LIMIT_S:
        return f"took {outcome.processor_s:.1f} s"
    if outcome.memory_mib > MEMORY_LIMIT_MIB:
        return f"took {outcome.memory_mib:.0f} MiB"
    return None


def test_whole_files_load(sandbox, whole, folder):
    for path, model in whole.items():
        outcome = sandbox.load(path, model)
        assert not outcome.error, (path, outcome.text)
        assert fault(outcome, path) is None


def test_mutated_files_are_loaded_or_refused(sandbox, whole, folder):
    faults, loaded = [], 0
    for index in range(COUNT):
        rng = random.Random(f"mutation {index}")
        path = rng.choice(list(whole))
        shutil.rmtree(folder)
        folder.mkdir()
        mutated, kind = mutate(path, folder, rng)
        outcome = sandbox.load(mutated, whole[path])
        loaded += not outcome.error and not outcome.died
        if found := fault(outcome, mutated):
            faults.append(f"{index}, {path.name}, {kind}: {found}")
    assert not faults, f"{len(faults)} of {COUNT}:\n" + "\n".join(faults)
    # Mutations that never load, or never fail, try nothing.
    assert 0.05 * COUNT < loaded < 0.8 * COUNT


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
    "a type that is none": (unknown_type, ["model_config", "no text and no number"]),
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


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(sandbox, folder, name):
    make, texts = HOSTILE[name]
    path = make(folder)
    outcome = sandbox.load(path)
    assert fault(outcome, path) is None
    assert outcome.error
    assert all(text in outcome.text for text in texts), outcome.text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=5,
)


@settings(max_examples=30 if COUNT < 2000 else 500)
@given(place=st.integers(0, 1000), value=json_values)
def test_a_config_may_say_anything_anywhere(sandbox, tmp_path_factory, place, value):
    config = json.loads(json.dumps(CONFIG))
    places = list(configs.places(config))
    holder, key, _ = places[place % len(places)]
    holder[key] = value
    path = sandbox.folder / "deep" / "config.h5"
    old_models.write_h5(path, config, WEIGHTS, layers=list(WEIGHTS))
    assert fault(sandbox.load(path), path) is None
