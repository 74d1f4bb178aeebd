"""What the loaders refuse, in which words: each says what is wrong and what to do."""

import io
import json
import zipfile

import h5py
import keras
import numpy as np
import old_models
import pytest
from frameworks import to_numpy

import normwise
from normwise import migrate

DENSE = old_models.layer("Dense", "dense", units=2)
WEIGHTS = {"dense": {"kernel": np.ones((4, 2), "float32"), "bias": np.zeros(2, "float32")}}


def config_of(*layers):
    return old_models.sequential(old_models.input_layer("input", 4), *layers)


def refused(path, match, **options):
    with pytest.raises(ValueError, match=match) as caught:
        migrate.load_model(path, **options)
    text = str(caught.value)
    assert text.startswith(f"{path} cannot be loaded: ")
    assert "\n" not in text


@pytest.fixture(params=["h5", "keras"])
def write(request, tmp_path):
    """Write a model of a config, in either format, and return its path."""

    def write(config, weights=WEIGHTS):
        path = tmp_path / f"old.{request.param}"
        return getattr(old_models, f"write_{request.param}")(path, config, weights)

    return write


def test_a_path_with_nothing_is_an_oserror(tmp_path):
    for load in (migrate.load_model, lambda path: migrate.load_weights(keras.Sequential(), path)):
        with pytest.raises(FileNotFoundError, match=r"none\.h5"):
            load(tmp_path / "none.h5")


def test_all_unknown_classes_are_named_at_once(write):
    layers = [
        old_models.layer("Mine", "a"),
        old_models.layer("Custom>Yours", "b"),
        old_models.layer("Addons>Maxout", "c"),
        old_models.layer("Dense", "d", units=2, activation="my_function"),
        old_models.layer(
            "Dense", "e", units=2, kernel_initializer={"class_name": "Init", "config": {}}
        ),
    ]
    names = r"Mine, Custom>Yours, Addons>Maxout, my_function, Init: of neither Keras 3 nor normwise"
    remedy = r"custom_objects=\{'Mine': \.\.\., 'Yours': \.\.\., 'Maxout'"
    refused(write(config_of(*layers)), f"{names}; pass {remedy}")


@pytest.mark.parametrize("name", ["TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer"])
def test_programs_of_other_frameworks_are_no_layers_of_keras_2(write, name):
    refused(write(config_of(old_models.layer(name, "a", filepath="/"))), name)


@pytest.mark.parametrize(
    "function",
    [
        ["4wEAAAA=", None, None],
        {"class_name": "__lambda__", "config": {"code": "4wEAAAA="}},
        {"class_name": "function", "config": "system", "module": "os", "registered_name": "system"},
    ],
)
def test_code_is_refused(write, function):
    layer = old_models.layer("Lambda", "code", function=function, function_type="lambda")
    refused(write(config_of(layer)), "(code is a Lambda, whose code is in the file|of neither)")


def test_a_function_of_the_users_own_is_no_code(write):
    layer = old_models.layer("Lambda", "own", function="twice", function_type="function")
    path = write(config_of(layer, DENSE))
    refused(path, "twice: of neither")
    model = migrate.load_model(path, custom_objects={"twice": lambda x: 2.0 * x})
    np.testing.assert_array_equal(to_numpy(model(np.ones((1, 4)))), [[8.0, 8.0]])


def test_code_beside_a_function_of_the_users_own_is_refused(write):
    code = {"class_name": "__lambda__", "config": {"code": "4wEAAAA=", "defaults": None}}
    layer = old_models.layer(
        "Lambda", "own", function="twice", function_type="function", output_shape=code
    )
    path = write(config_of(layer, DENSE))
    refused(path, "lambda", custom_objects={"twice": lambda x: 2.0 * x})


def test_code_in_a_layer_of_the_users_own_is_refused(write):
    class Own(keras.layers.Wrapper):
        pass

    code = old_models.layer("Lambda", "code", function=["4wEAAAA=", None, None])
    path = write(config_of(old_models.layer("Own", "own", layer=code), DENSE))
    refused(path, "holds a Lambda, whose code is in the file", custom_objects={"Own": Own})


def test_no_module_of_the_file_is_imported(write, tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    layer = {**old_models.layer("Own", "own"), "module": "hostile"}
    refused(write(config_of(layer)), "Own: of neither")


def test_a_class_of_another_module_is_not_keras_own(tmp_path):
    path = old_models.write_keras(tmp_path / "old.keras", config_of(DENSE), WEIGHTS)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    config["config"]["layers"][1] |= {"module": "mine.layers", "registered_name": "Dense"}
    members["config.json"] = json.dumps(config)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    refused(path, "Dense: of neither Keras 3 nor normwise")


def test_a_vocabulary_is_not_read_from_another_file(write, tmp_path):
    (tmp_path / "secret.txt").write_text("word")
    layer = old_models.layer("StringLookup", "words", vocabulary=str(tmp_path / "secret.txt"))
    refused(write(config_of(layer)), "words reads its vocabulary from the file .*safe_mode=False")


@pytest.mark.parametrize(
    ("class_name", "config", "option"),
    [
        ("LSTM", {"units": 2, "time_major": True}, "time_major=True"),
        ("DepthwiseConv2D", {"kernel_size": 3, "groups": 2}, "groups=2"),
    ],
)
def test_options_that_keras_3_has_not_are_refused(write, class_name, config, option):
    layer = old_models.layer(class_name, "a", **config)
    refused(
        write(config_of(layer)), f"the layer a has the option {option} of Keras 2's {class_name}"
    )


def test_hard_sigmoid_is_another_function_now(write):
    path = write(config_of({**DENSE, "config": {**DENSE["config"], "activation": "hard_sigmoid"}}))
    refused(path, r"clip\(0\.2 \* x \+ 0\.5, 0, 1\).*custom_objects=\{'hard_sigmoid'")

    def hard_sigmoid(x):
        return keras.ops.clip(0.2 * x + 0.5, 0.0, 1.0)

    model = migrate.load_model(path, custom_objects={"hard_sigmoid": hard_sigmoid})
    y = to_numpy(model(np.full((1, 4), 0.25, "float32")))
    np.testing.assert_allclose(y, [[0.7, 0.7]], rtol=1e-6)


def test_ragged_inputs_are_refused(write):
    config = config_of(DENSE)
    config["config"]["layers"][0]["config"]["ragged"] = True
    refused(write(config), "the input input is ragged.*pad the data")


def test_functions_of_tensorflow_without_an_equal_are_named(write):
    call = {**old_models.layer("TFOpLambda", "fft", function="signal.fft"), "name": "fft"}
    config = old_models.functional([(old_models.input_layer("x", 4), [])], ["x"], ["fft"])
    config["config"]["layers"].append({**call, "inbound_nodes": [["x", 0, 0, {}]]})
    refused(write(config, {}), r"the model calls tf\.signal\.fft")


def test_a_model_that_waits_for_itself_is_refused(write):
    layers = [
        (old_models.input_layer("x", 4), []),
        (old_models.layer("ReLU", "a"), ["b"]),
        (old_models.layer("ReLU", "b"), ["a"]),
    ]
    refused(write(old_models.functional(layers, ["x"], ["b"]), {}), "waits for call 0 of '[ab]'")


@pytest.mark.parametrize("units", [10**6, 10**9, 10**15])
def test_weights_that_the_config_claims_are_compared_before_they_are_made(write, units):
    layer = old_models.layer("Dense", "dense", units=units)
    wanted = rf"kernel has the shape \(4, {units}\), and the file's has \(4, 2\)"
    refused(write(config_of(layer)), wanted)


def test_nothing_is_left_of_a_model_that_was_refused(write):
    layer = old_models.layer("Dense", "dense", units=10**12)
    refused(write(config_of(layer)), "has the shape")
    # What is not yet initialized would be here.
    with keras.StatelessScope():
        pass


@pytest.mark.parametrize(
    ("version", "match"),
    [
        ("3.4.1", r"saved by Keras 3\.4\.1: use keras\.saving\.load_model"),
        ("1.2.2", r"saved by Keras 1\.2\.2; only files of Keras 2"),
        ("99.0", "only files of Keras 2"),
        ("two", "names no version of Keras that wrote it, but 'two'"),
    ],
)
def test_other_versions_are_named(write, version, match, monkeypatch):
    monkeypatch.setattr(old_models, "VERSION", version)
    refused(write(config_of(DENSE)), match)


def test_a_config_of_a_hundred_levels_is_refused(write):
    deep = {"a": 1}
    for _ in range(200):
        deep = {"a": deep}
    layer = old_models.layer("Dense", "dense", units=2, kernel_initializer=deep)
    refused(write(config_of(layer)), "more than 100 levels deep")


def test_weights_alone_are_no_model(tmp_path):
    path = tmp_path / "weights.h5"
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"] = "2.14.0"
    refused(path, "holds weights and no model; build the model, and use load_weights")


# HDF5


@pytest.fixture
def h5(tmp_path):
    """An .h5 model, to be changed."""
    return old_models.write_h5(tmp_path / "old.h5", config_of(DENSE), WEIGHTS)


KERNEL = "model_weights/dense/dense/kernel:0"


def replaced(path, make):
    with h5py.File(path, "r+") as file:
        del file[KERNEL]
        make(file)
    return path


def test_links_are_not_followed(h5, tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["kernel"] = np.ones((4, 2), "float32")
    for link in (h5py.ExternalLink(str(tmp_path / "other.h5"), "kernel"), h5py.SoftLink("/x")):
        with h5py.File(h5, "r+") as file:
            del file[KERNEL]
            file[KERNEL] = link
        refused(h5, "is a link to elsewhere")


def test_arrays_in_other_files_are_not_read(h5, tmp_path):
    (tmp_path / "raw").write_bytes(bytes(32))

    def make(file):
        file.create_dataset(KERNEL, (4, 2), "f4", external=[(str(tmp_path / "raw"), 0, 32)])

    refused(replaced(h5, make), "lies in another file, which is not read")


def test_virtual_arrays_are_not_read(h5, tmp_path):
    layout = h5py.VirtualLayout((4, 2), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", (4, 2))
    refused(
        replaced(h5, lambda file: file.create_virtual_dataset(KERNEL, layout)),
        "lies in another file, which is not read",
    )


def test_arrays_without_bytes_are_refused(h5):
    def make(file):
        file.create_dataset(KERNEL, (4, 10**11), "f4")

    refused(replaced(h5, make), r"claims 1600000000000 bytes by its shape .* and has 0")


def test_compressed_bombs_are_refused(h5):
    def make(file):
        file.create_dataset(KERNEL, (4, 10**10), "f4", chunks=(4, 1 << 16), compression="gzip")

    refused(replaced(h5, make), "more than [0-9,]+ bytes of arrays, .* the most for a file of")


def test_compressed_weights_load(h5):
    def make(file):
        file.create_dataset(KERNEL, data=np.full((4, 2), 3.0, "f4"), compression="gzip")

    model = migrate.load_model(replaced(h5, make))
    np.testing.assert_array_equal(to_numpy(model.weights[0]), np.full((4, 2), 3.0))


def test_texts_are_no_weights(h5):
    def make(file):
        file[KERNEL] = np.full((4, 2), b"text")

    refused(replaced(h5, make), "of the dtype .S4, which no weight has")


def test_a_group_in_itself_is_refused(tmp_path):
    path = tmp_path / "old.weights.h5"
    with h5py.File(path, "w") as file:
        layers = file.create_group("_layer_checkpoint_dependencies")
        layers["again"] = layers
    with pytest.raises(ValueError, match="groups"):
        migrate.load_weights(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), path)


def test_names_in_parts_are_joined(h5):
    with h5py.File(h5, "r+") as file:
        group = file["model_weights"]
        names = group.attrs["layer_names"]
        del group.attrs["layer_names"]
        group.attrs["layer_names0"], group.attrs["layer_names1"] = names[:1], names[1:]
    assert len(migrate.load_model(h5).weights) == 2


# .keras


@pytest.fixture
def members(tmp_path):
    """The members of a .keras file, to be changed."""
    path = old_models.write_keras(tmp_path / "whole.keras", config_of(DENSE), WEIGHTS)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "C:\\evil", "..\\evil"])
def test_members_that_lead_out_are_refused(members, tmp_path, name):
    path = zipped(tmp_path / "old.keras", {**members, name: b"x"})
    refused(path, "which leads out of it")


def test_members_that_lack_are_named(members, tmp_path):
    del members["config.json"]
    refused(zipped(tmp_path / "old.keras", members), "the archive lacks config.json")


def test_zip_bombs_are_refused(members, tmp_path):
    members["model.weights.h5"] = bytes(100 << 20)
    path = zipped(tmp_path / "old.keras", members, compression=zipfile.ZIP_DEFLATED)
    refused(
        path,
        "inflates to too much: it asks for more than .* bytes of arrays, .* without compression",
    )


def test_damaged_weights_in_an_archive_are_refused(members, tmp_path):
    with h5py.File(io.BytesIO(members["model.weights.h5"]), "r") as file:
        assert "_layer_checkpoint_dependencies" in file
    for content in (b"", b"text", members["model.weights.h5"][:300]):
        members["model.weights.h5"] = content
        refused(zipped(tmp_path / "old.keras", members), "empty|HDF5|OSError")


# SavedModels and checkpoints


def test_folders_without_a_keras_model_are_named(tmp_path):
    refused(tmp_path, "the folder lacks keras_metadata.pb")
    (tmp_path / "saved_model.pb").touch()
    refused(tmp_path, "TensorFlow 2.5 to 2.15 writes for a Keras model; load it there")


# Compiling


@pytest.mark.parametrize(
    "training", [None, {"optimizer_config": {"class_name": "Lion2"}, "loss": "mse"}]
)
def test_what_cannot_be_compiled_is_left_out_with_a_warning(h5, training):
    with h5py.File(h5, "r+") as file:
        if training:
            file.attrs["training_config"] = json.dumps(training)
    match = "does not say how" if training is None else "does not know the optimizer that"
    with pytest.warns(UserWarning, match=match):
        model = migrate.load_model(h5, compile=True)
    assert model.compiled == (training is not None)


def test_stored_groups_of_instance_norm_are_its_channels_no_more(write):
    layer = old_models.layer("Addons>InstanceNormalization", "norm", groups=4, axis=-1)
    weights = {"norm": {"gamma": np.ones(4, "float32"), "beta": np.zeros(4, "float32")}}
    model = migrate.load_model(write(config_of(layer), weights))
    assert type(model.layers[0]) is normwise.layers.InstanceNormalization
