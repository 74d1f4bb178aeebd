"""The process that reads old models: what it imports, how it may end, and doing without it."""

import io
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import old_models
import pytest
from frameworks import to_numpy

from normwise import migrate
from normwise.migrate.models import reader
from normwise.migrate.models.reading import budget, child, formats

DENSE = old_models.layer("Dense", "dense", units=2)
CONFIG = old_models.sequential(old_models.input_layer("input", 4), DENSE)
WEIGHTS = {
    "dense": {"kernel": np.arange(8, dtype="float32").reshape(4, 2), "bias": np.ones(2, "float32")}
}
# Each writes a whole model.
WRITERS = {
    "h5": lambda path: old_models.write_h5(path, CONFIG, WEIGHTS),
    "keras": lambda path: old_models.write_keras(path, CONFIG, WEIGHTS),
}


@pytest.fixture(params=WRITERS)
def path(request, tmp_path):
    return WRITERS[request.param](tmp_path / f"old.{request.param}")


@pytest.fixture
def h5(tmp_path):
    return WRITERS["h5"](tmp_path / "old.h5")


def is_loaded(path):
    model = migrate.load_model(path)
    return np.array_equal(to_numpy(model.weights[0]), WEIGHTS["dense"]["kernel"])


def instead_of_the_child(monkeypatch, program):
    """Start another program where the reading one would be."""
    command = [sys.executable, "-c", f"import sys, os, time, signal\n{program}"]
    start = subprocess.Popen
    monkeypatch.setattr(reader.subprocess, "Popen", lambda _, **options: start(command, **options))


READY = f"sys.stdout.buffer.write({child.READY!r}); sys.stdout.flush()\n"


def test_the_child_imports_no_framework_and_no_keras(path):
    traced = subprocess.run(
        [sys.executable, "-I", "-X", "importtime", child.__file__, task(path)],
        capture_output=True,
        check=True,
    )
    assert traced.stdout.startswith(child.READY)
    imported = {line.rpartition(b"|")[2].strip().decode() for line in traced.stderr.splitlines()}
    assert "h5py" in imported
    assert not {each.partition(".")[0] for each in imported} & {
        *("keras", "jax", "tensorflow", "torch", "ml_dtypes", "libcst", "typer")
    }


def task(path):
    return reader.json.dumps(
        {
            "search": [each for each in sys.path if each],
            "function": "read_model",
            "path": str(path),
            "processor_s": 10,
            "memory_bytes": 1 << 30,
        }
    )


@pytest.mark.parametrize(
    ("program", "text"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"damaged: HDF5 ends the process .* \(SIGSEGV\)"),
        ("os.abort()", r"HDF5 ends the process that reads it \(SIGABRT\)"),
        ("sys.exit(3)", r"HDF5 ends the process that reads it \(exit status 3\)"),
        ("sys.stdout.buffer.write(b'12345678{}')", "makes [0-9,]+ bytes of names"),
        ("sys.stdout.buffer.write((99).to_bytes(8, 'little') + b'{}')", "exit status 0"),
        ("sys.stdout.buffer.write((2).to_bytes(8, 'little') + b'[]')", "damaged"),
        (
            "sys.stdout.buffer.write((17).to_bytes(8, 'little') + b'{\"sizes\":[99999999]}'[:17])",
            "damaged",
        ),
    ],
)
def test_whatever_the_child_does_is_an_error(monkeypatch, h5, program, text):
    instead_of_the_child(monkeypatch, READY + program)
    with pytest.raises(ValueError, match=text) as refused:
        migrate.load_model(h5)
    assert str(refused.value).startswith(f"{h5} cannot be loaded: ")


def test_a_child_that_never_answers_is_ended(monkeypatch, h5):
    instead_of_the_child(monkeypatch, READY + "time.sleep(600)")
    monkeypatch.setattr(reader, "CLOCK_S", 1)
    with pytest.raises(ValueError, match="reading it takes more than 1 s"):
        migrate.load_model(h5)


@pytest.mark.skipif(sys.platform != "linux", reason="the limits of a process are Linux's")
@pytest.mark.parametrize(
    ("work", "text"),
    [
        ("while True: pass", "takes more than 1 s"),
        ("bytearray(4 << 30)", "MemoryError"),
        ("open('written', 'wb', 0).write(b'x')", r"OSError \(\[Errno 27\]"),
    ],
)
def test_the_child_has_limits(monkeypatch, tmp_path, h5, work, text):
    """Of its own code, with work in the place of the reading."""
    copied = tmp_path / "normwise" / "migrate" / "models" / "reading"
    copied.mkdir(parents=True)
    for each in Path(child.__file__).parent.glob("*.py"):
        content = each.read_text()
        if each.name == "formats.py":
            content += f"\n\ndef read_model(path):\n    {work}\n"
        (copied / each.name).write_text(content)
    monkeypatch.setattr(reader.child, "__file__", str(copied / "child.py"))
    monkeypatch.setattr(reader, "PROCESSOR_S", 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=text):
        migrate.load_model(h5)


def no_python(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/usr/bin/blender")


def frozen(monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)


def no_processes(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no processes here")

    monkeypatch.setattr(reader.subprocess, "Popen", refuse)


def no_modules(monkeypatch):
    instead_of_the_child(monkeypatch, "raise ImportError")


@pytest.mark.parametrize("lacks", [no_python, frozen, no_processes, no_modules])
def test_where_no_child_can_be_started_it_reads_in_place(monkeypatch, path, lacks):
    lacks(monkeypatch)
    assert is_loaded(path)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be loaded"):
        migrate.load_model(path)


def test_the_current_folder_lends_no_modules(monkeypatch, tmp_path, h5):
    (tmp_path / "h5py.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert is_loaded(h5)


class Cut(keras.layers.Layer):
    """Cuts the file that it is read from."""

    def __init__(self, path=None, **options):
        super().__init__(**options)
        os.truncate(path, 4096)

    def call(self, inputs):
        return inputs


def test_a_file_that_is_cut_after_it_was_read_is_a_model_all_the_same(tmp_path):
    path = tmp_path / "old.h5"
    large = {"kernel": np.ones((4, 2000), "float32"), "bias": np.ones(2000, "float32")}
    cut = old_models.layer("Cut", "cut", path=str(path))
    wide = old_models.layer("Dense", "dense", units=2000)
    config = old_models.sequential(old_models.input_layer("input", 4), wide, cut)
    old_models.write_h5(path, config, {"dense": large})
    model = migrate.load_model(path, custom_objects={"Cut": Cut})
    np.testing.assert_array_equal(to_numpy(model.weights[0]), large["kernel"])


def test_a_file_that_changes_while_it_is_read_is_refused(monkeypatch, h5):
    ask = reader._ask

    def ask_and_change(path, *arguments):
        answer = ask(path, *arguments)
        os.utime(path, (1, 1))
        return answer

    monkeypatch.setattr(reader, "_ask", ask_and_change)
    with pytest.raises(ValueError, match="it changed while it was read; load it again"):
        migrate.load_model(h5)


def changed(path, change):
    with h5py.File(path, "r+") as file:
        change(file)
    return path


KERNEL = "model_weights/dense/dense/kernel:0"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": ">f4"},
        {"dtype": "f8"},
        {"dtype": "i1"},
        {"chunks": (2, 2)},
        {"compression": "gzip", "shuffle": True, "fletcher32": True},
    ],
)
def test_arrays_come_whole_however_they_lie(h5, options):
    """Mapped from the file, or as contents of their own."""

    def change(file):
        del file[KERNEL]
        file.create_dataset(KERNEL, data=WEIGHTS["dense"]["kernel"], **options)

    assert is_loaded(changed(h5, change))


def packed(folder, method):
    """An archive whose members are packed by a method."""
    path = WRITERS["keras"](folder / "old.keras")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archives_come_whole_however_they_are_packed(tmp_path, method):
    path = packed(tmp_path, method)
    assert is_loaded(path)
    # A byte of a weight: only the checksum of the archive tells.
    content = bytearray(path.read_bytes())
    at = content.find(WEIGHTS["dense"]["kernel"].tobytes())
    if method == zipfile.ZIP_STORED:
        content[at + 5] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match="Bad CRC-32"):
            migrate.load_model(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_packings_are_refused(tmp_path, method):
    path = packed(tmp_path, method)
    with pytest.raises(ValueError, match=f"packed by the method {method}, .* without compression"):
        migrate.load_model(path)


def test_filters_that_stack_are_refused(h5):
    def change(file):
        del file[KERNEL]
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((4, 2))
        for _ in range(2):
            properties.set_deflate(9)
        space = h5py.h5s.create_simple((4, 2))
        parent = file["model_weights/dense/dense"].id
        h5py.h5d.create(parent, b"kernel:0", h5py.h5t.NATIVE_FLOAT, space, properties)

    with pytest.raises(ValueError, match=r"packed by the filters \[1, 1\] .* once each"):
        migrate.load_model(changed(h5, change))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs")
def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "old.h5")
    with pytest.raises(ValueError, match=r"old\.h5 is no regular file, so it is not read"):
        migrate.load_model(tmp_path / "old.h5")
    folder = tmp_path / "old.savedmodel"
    (folder / "variables").mkdir(parents=True)
    os.mkfifo(folder / formats.METADATA)
    with pytest.raises(ValueError, match=r"keras_metadata\.pb is no regular file"):
        migrate.load_model(folder)


def test_a_link_in_a_folder_is_not_followed(tmp_path):
    folder = tmp_path / "old.savedmodel"
    (folder / "variables").mkdir(parents=True)
    (folder / formats.METADATA).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"its keras_metadata.pb is a link, .* cp -rL"):
        migrate.load_model(folder)


def test_an_error_has_no_control_characters(tmp_path):
    layer = {**DENSE, "class_name": "Nope\x1b[2J\x07\u202e"}
    config = old_models.sequential(old_models.input_layer("input", 4), layer)
    path = old_models.write_h5(tmp_path / "old.h5", config, WEIGHTS)
    with pytest.raises(ValueError, match=r"Nope\\x1b\[2J\\x07\\u202e: of neither") as refused:
        migrate.load_model(path)
    assert str(refused.value).isprintable()


# The budget.


def test_a_budget_grows_with_the_file():
    least, each = budget.LIMITS["bytes of arrays"]
    spent = budget.Budget(1_000_000)
    spent.spend("bytes of arrays", least + int(each * 1_000_000))
    with pytest.raises(ValueError, match=r"more than [0-9,]+ bytes of arrays, .* of 1,000,000 byt"):
        spent.spend("bytes of arrays")


def nested(depth):
    """Models that each call the one inside them twice."""
    x = old_models.input_layer("x", 4)
    model = old_models.functional([(x, []), (old_models.layer("ReLU", "a"), ["x"])], ["x"], ["a"])
    for level in range(depth):
        inner = {**model, "config": {**model["config"], "name": f"m{level}"}}
        outer = old_models.functional([(x, []), (inner, ["x"])], ["x"], [f"m{level}"])
        calls = outer["config"]["layers"][1]["inbound_nodes"]
        calls.append([[f"m{level}", 1, 0, {}]])
        calls[0] = [["x", 0, 0, {}]]
        for number, call in enumerate(calls):
            call[0][1] = number
        outer["config"]["output_layers"] = [[f"m{level}", 2, 0]]
        model = outer
    return model


def test_models_that_call_models_are_counted(tmp_path):
    path = old_models.write_h5(tmp_path / "few.h5", nested(3), {})
    assert len(migrate.load_model(path).layers) == 2
    path = old_models.write_h5(tmp_path / "many.h5", nested(20), {})
    assert path.stat().st_size < 20_000
    with pytest.raises(ValueError, match=r"it asks for more than [0-9,]+ calls"):
        migrate.load_model(path)


def test_cells_in_cells_end_somewhere(tmp_path):
    cell = old_models.layer("SimpleRNNCell", "cell", units=2)
    for level in range(24):
        cell = old_models.layer("StackedRNNCells", f"cells{level}", cells=[cell])
    config = model_on(4, 4, layers=[old_models.layer("RNN", "rnn", cell=cell)])
    path = old_models.write_h5(tmp_path / "old.h5", config, {})
    with pytest.raises(ValueError, match="its layers hold each other more than 8 deep"):
        migrate.load_model(path)


def model_on(*shape, layers):
    return old_models.sequential(old_models.input_layer("x", *shape), *layers)


def calling(function, extent, **options):
    node = old_models.layer("TFOpLambda", "u", function=function)
    config = old_models.functional([(old_models.input_layer("x", extent), [])], ["x"], ["u"])
    config["config"]["layers"].append(
        {**node, "name": "u", "inbound_nodes": [["x", 0, 0, options]]}
    )
    return config


@pytest.mark.parametrize(
    ("function", "options"),
    [("unstack", {"axis": 1}), ("split", {"num_or_size_splits": 10**6, "axis": 1})],
)
def test_tensors_of_a_declared_extent_are_counted(tmp_path, function, options):
    path = old_models.write_h5(tmp_path / "old.h5", calling(function, 10**6, **options), {})
    with pytest.raises(ValueError, match=r"it asks for more than [0-9,]+ tensors"):
        migrate.load_model(path)


@pytest.mark.parametrize(
    "config",
    [
        calling("reshape", 1, shape=[1] * 40),
        model_on(*[1] * 40, layers=[old_models.layer("ReLU", "a")]),
        model_on(1, layers=[old_models.layer("Reshape", "a", target_shape=[1] * 40)]),
    ],
)
def test_dimensions_end_somewhere(tmp_path, config):
    path = old_models.write_h5(tmp_path / "old.h5", config, {})
    with pytest.raises(ValueError, match=r"a tensor of 4[01] dimensions; at most 32 are built"):
        migrate.load_model(path)


def test_functions_of_numbers_alone_are_not_called(tmp_path):
    config = calling("one_hot", 4, depth=10**12)
    config["config"]["layers"][1]["inbound_nodes"] = [["_CONSTANT_VALUE", -1, 3, {"depth": 10**12}]]
    path = old_models.write_h5(tmp_path / "old.h5", config, {})
    with pytest.raises(ValueError, match="on numbers alone"):
        migrate.load_model(path)


def attending(steps):
    layers = [
        (old_models.input_layer("x", steps, 2), []),
        (old_models.layer("AdditiveAttention", "a", use_scale=False), ["x", "x"]),
    ]
    config = old_models.functional(layers, ["x"], ["a"])
    config["config"]["layers"][1]["inbound_nodes"] = [[["x", 0, 0, {}], ["x", 0, 0, {}]]]
    return config


LSTM = {
    "lstm_cell/kernel": np.ones((1, 8), "float32"),
    "lstm_cell/recurrent_kernel": np.ones((2, 8), "float32"),
    "lstm_cell/bias": np.ones(8, "float32"),
}


@pytest.mark.parametrize(
    ("config", "weights", "text"),
    [
        (model_on(10**9, layers=[old_models.layer("ReLU", "a")]), {}, "elements"),
        (model_on(4, layers=[old_models.layer("RepeatVector", "a", n=10**9)]), {}, "elements"),
        (
            model_on(None, 1, layers=[old_models.layer("UpSampling1D", "a", size=10**9)]),
            {},
            "elements",
        ),
        (
            model_on(10**6, 1, layers=[old_models.layer("LSTM", "a", units=2)]),
            {"a": LSTM},
            "steps",
        ),
        (
            model_on(
                10**5,
                4,
                layers=[
                    old_models.layer(
                        "MaxPooling1D", "a", pool_size=30_000, strides=1, padding="same"
                    )
                ],
            ),
            {},
            "operations",
        ),
        (attending(10**5), {}, "elements"),
    ],
)
def test_convert_draws_no_input_that_the_file_has_no_room_for(tmp_path, config, weights, text):
    path = old_models.write_h5(tmp_path / "old.h5", config, weights)
    with pytest.raises(ValueError, match=f"asks for more than [0-9,]+ {text}"):
        migrate.convert(path, tmp_path / "new.keras")
    assert [each.name for each in tmp_path.iterdir()] == ["old.h5"]


def test_steps_that_are_unrolled_are_no_calls(tmp_path):
    layer = old_models.layer("LSTM", "a", units=2, unroll=True)
    path = old_models.write_h5(tmp_path / "old.h5", model_on(10**6, 1, layers=[layer]), {"a": LSTM})
    model = migrate.load_model(path)
    assert model.layers[0].unroll
    assert model.layers[0].get_config()["unroll"]


def test_a_small_model_of_a_large_image_converts(tmp_path):
    layers = [old_models.input_layer("image", 512, 512, 3)]
    weights = {}
    for number in range(6):
        channels = 16 if number else 3
        name = f"conv{number}"
        layers.append(
            old_models.layer("Conv2D", name, filters=16, kernel_size=[3, 3], padding="same")
        )
        kernel = np.full((3, 3, channels, 16), 0.01, "float32")
        weights[name] = {"kernel": kernel, "bias": np.zeros(16, "float32")}
    path = old_models.write_h5(tmp_path / "old.h5", old_models.sequential(*layers), weights)
    assert migrate.convert(path, tmp_path / "new.keras").tolerance > 0


def test_steps_that_are_unrolled_are_scanned_to_be_compared(tmp_path):
    layer = old_models.layer("LSTM", "a", units=2, unroll=True)
    path = old_models.write_h5(tmp_path / "old.h5", model_on(1000, 1, layers=[layer]), {"a": LSTM})
    migrate.convert(path, tmp_path / "new.keras")
    with zipfile.ZipFile(tmp_path / "new.keras") as archive:
        assert b'"unroll": true' in archive.read("config.json")


def test_a_million_empty_objects_are_refused(h5):
    def change(file):
        file.attrs["model_config"] = '{"config": [' + "{}," * 2_000_000 + "{}]}"

    with pytest.raises(ValueError, match="more than the 1,048,576 values allowed"):
        migrate.load_model(changed(h5, change))


def test_an_object_on_two_paths_counts_once(tmp_path):
    path = tmp_path / "old.weights.h5"
    with h5py.File(path, "w") as file:
        inner = file.create_group("_layer_checkpoint_dependencies/dense")
        for level in range(40):
            inner[f"a{level}"] = inner[f"b{level}"] = inner = inner.create_group(f"c{level}")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=r"the file has '.*' twice"):
        migrate.load_weights(model, path)


def test_a_header_of_an_archive_may_say_more_than_its_table(tmp_path):
    """The extra field of a member may differ between the two: zipfile goes by the local one."""
    path = WRITERS["keras"](tmp_path / "old.keras")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.extra = struct.pack("<HH", 0x7777, 9) + b"123456789"
            archive.writestr(info, content)
    path.write_bytes(stored.getvalue())
    assert is_loaded(path)


def test_states_of_a_claimed_batch_are_counted(tmp_path):
    def write(batch):
        inputs = {**old_models.input_layer("x", 3, 1)}
        inputs["config"]["batch_input_shape"] = [batch, 3, 1]
        layer = old_models.layer("LSTM", "a", units=2, stateful=True)
        return old_models.write_h5(
            tmp_path / "old.h5", old_models.sequential(inputs, layer), {"a": LSTM}
        )

    assert migrate.load_model(write(8)).layers[0].stateful
    with pytest.raises(ValueError, match=r"asks for more than [0-9,]+ bytes of weights"):
        migrate.load_model(write(1 << 28))
