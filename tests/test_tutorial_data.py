import gzip
import io
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normwise.tutorial import data as tutorial_data
from normwise.tutorial.data import load

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"

COUNT, HEIGHT, WIDTH = 7, 5, 4
IMAGES = np.arange(COUNT * HEIGHT * WIDTH, dtype=np.uint8).reshape(COUNT, HEIGHT, WIDTH)
LABELS = np.arange(COUNT, dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def npz_with_header(header: str, body: bytes = b"") -> bytes:
    """An archive whose images claim, in NumPy's own header, whatever `header` says."""
    text = header.encode() + b"\n"
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body
    file = io.BytesIO(npz(y_test=LABELS))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("x_test.npy", member)
    return file.getvalue()


def write_idx(
    folder, images=IMAGES, labels=LABELS, prefix="t10k", infix="-idx", gzipped=False
) -> Path:
    folder.mkdir(exist_ok=True)
    for array, kind in ((images, "images"), (labels, "labels")):
        content = array if isinstance(array, bytes) else idx(array)
        rank = 3 if kind == "images" else 1
        name = f"{prefix}-{kind}{infix}{rank}-ubyte" + (".gz" if gzipped else "")
        (folder / name).write_bytes(gzip.compress(content) if gzipped else content)
    return folder


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def refused(name, *texts, split="test"):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the texts are what is compared
        load(str(name), split)
    assert "\n" not in str(caught.value)
    for text in texts:
        assert text in str(caught.value)


def assert_holds(loaded, images=IMAGES, labels=LABELS):
    assert loaded.training.images.dtype == np.float32
    np.testing.assert_array_equal(loaded.training.images, images.astype("float32") / 255)
    assert loaded.training.labels.dtype == np.int32
    np.testing.assert_array_equal(loaded.training.labels, labels)


def test_digits_are_the_default():
    loaded = load()
    assert loaded.summary() == {
        "name": "digits",
        "source": "scikit-learn's load_digits",
        "split": "test",
        "training_images": 1797,
        "evaluation_images": 1797,
        "image_shape": [8, 8],
        "class_count": 10,
    }
    assert loaded.training is loaded.evaluation
    assert loaded.training.images.min() == 0
    assert loaded.training.images.max() == 1


def test_digits_have_no_train_split():
    refused("digits", "digits has no train split", "--split test", split="train")


def test_split_is_checked():
    refused("digits", "split='both' is no split", "test or train", split="both")


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("infix", ["-idx", ".idx"])
def test_idx_folder_round_trip(tmp_path, gzipped, infix):
    folder = write_idx(tmp_path / "mnist", infix=infix, gzipped=gzipped)
    loaded = load(str(folder))
    assert_holds(loaded)
    assert loaded.name == "mnist"
    assert loaded.image_shape == (HEIGHT, WIDTH)


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_idx_file_finds_its_partner(tmp_path, kind):
    folder = write_idx(tmp_path, gzipped=True)
    write_idx(folder, IMAGES[::-1], LABELS[::-1], prefix="train")
    assert_holds(load(str(next(folder.glob(f"t10k-{kind}*")))))
    train = next(folder.glob(f"train-{kind}*"))
    assert_holds(load(str(train), "train"), IMAGES[::-1], LABELS[::-1])
    refused(train, "has no test split", "--split train")


def test_gzip_is_told_by_content_not_by_name(tmp_path):
    folder = write_idx(tmp_path, gzipped=True)
    for path in folder.iterdir():
        path.rename(path.with_suffix(""))
    assert_holds(load(str(folder)))


def test_train_split_is_evaluated_on_the_test_split(tmp_path):
    folder = write_idx(write_idx(tmp_path), IMAGES[:3], LABELS[:3], prefix="train")
    loaded = load(str(folder), "train")
    assert_holds(loaded, IMAGES[:3], LABELS[:3])
    np.testing.assert_array_equal(loaded.evaluation.labels, LABELS)


def test_train_split_alone_is_evaluated_on_itself(tmp_path):
    folder = write_idx(tmp_path, prefix="train")
    loaded = load(str(folder), "train")
    assert loaded.training is not None
    assert loaded.evaluation is loaded.training
    refused(folder, "has no test split", "--split train")


def test_splits_of_different_sizes_are_refused(tmp_path):
    folder = write_idx(write_idx(tmp_path), IMAGES[:, :4], LABELS, prefix="train")
    refused(folder, "(4, 4)", "(5, 4)", "one size", split="train")


def test_two_data_sets_in_one_folder_are_refused_but_not_their_files(tmp_path):
    write_idx(tmp_path, prefix="emnist-digits-test")
    folder = write_idx(tmp_path, IMAGES[::-1], prefix="emnist-letters-test")
    refused(folder, "2 data sets", "'emnist-digits-', 'emnist-letters-'", "pass one of the files")
    assert_holds(load(str(folder / "emnist-digits-test-images-idx3-ubyte")))


def test_hidden_files_are_not_data(tmp_path):
    folder = write_idx(tmp_path)
    (folder / "._t10k-images-idx3-ubyte").write_bytes(b"junk")
    assert_holds(load(str(folder)))


@pytest.mark.parametrize(("kind", "header_bytes"), [("images", 16), ("labels", 8)])
@pytest.mark.parametrize("gzipped", [False, True])
def test_every_truncation_is_refused(tmp_path, kind, header_bytes, gzipped):
    whole = idx(IMAGES if kind == "images" else LABELS)
    places = {0, 1, 3, 4, header_bytes - 1, header_bytes, len(whole) // 2, len(whole) - 1}
    for end in sorted(places - {len(whole)}):
        folder = write_idx(tmp_path, **{kind: whole[:end]}, gzipped=gzipped)
        said = "inside the header" if end < header_bytes else f"and holds {end - header_bytes}"
        refused(folder, f"t10k-{kind}", said, "get the file again")


def test_a_truncated_gzip_stream_is_refused(tmp_path):
    folder = write_idx(tmp_path, gzipped=True)
    path = folder / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for end in (2, 5, 10, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:end])
        refused(folder, path.name, "get the file again")


@pytest.mark.parametrize("place", ["header", "stream", "checksum"])
def test_a_damaged_gzip_stream_is_refused(tmp_path, place):
    folder = write_idx(tmp_path, gzipped=True)
    path = folder / "t10k-images-idx3-ubyte.gz"
    damaged = bytearray(path.read_bytes())
    # The first byte of the deflated stream names the kind of its first block; 7 is none.
    damaged[{"header": 2, "stream": 10, "checksum": -8}[place]] = 7
    path.write_bytes(damaged)
    refused(folder, path.name, "cannot be read", "get the file again")


def test_trailing_bytes_are_refused(tmp_path):
    folder = write_idx(tmp_path, images=idx(IMAGES) + b"x")
    refused(folder, "7 x 5 x 4 bytes of images", "more than that")


def test_wrong_magic_is_refused(tmp_path):
    folder = write_idx(tmp_path, images=idx(LABELS) + bytes(20))
    refused(folder, "0x00000801, which means labels", "begins with 0x00000803")
    folder = write_idx(tmp_path, labels=b"GIF89a and so on")
    refused(folder, "0x47494638", "begins with 0x00000801")


@pytest.mark.parametrize("extents", [(2**32 - 1,) * 3, (2**28 + 1, 1, 1)])
def test_a_huge_claim_is_refused_before_it_is_read(tmp_path, extents):
    header = struct.pack(">IIII", 0x803, *extents)
    refused(write_idx(tmp_path, images=header), str(extents[0]), "pass fewer images")


def test_memory_follows_the_file_and_not_its_header(tmp_path):
    header = struct.pack(">IIII", 0x803, 2**18, 32, 32)  # the most that is read: 256 MiB
    folder = write_idx(tmp_path, images=header + bytes(1000))
    tracemalloc.start()
    try:
        refused(folder, "holds 1000 bytes")
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_images_without_labels_are_refused(tmp_path):
    folder = write_idx(tmp_path)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    refused(folder, "has no labels beside it", "put t10k-labels-idx1-ubyte into")
    write_idx(folder)
    (folder / "t10k-images-idx3-ubyte").unlink()
    refused(folder, "has no images beside it", "put t10k-images-idx3-ubyte into")


def npz_of(split, images, labels):
    return npz(**{f"x_{split}": images, f"y_{split}": labels})


def test_npz_round_trip(tmp_path):
    path = write(tmp_path / "images.npz", npz_of("test", IMAGES, LABELS))
    loaded = load(path)
    assert_holds(loaded)
    assert loaded.name == "images.npz"
    refused(path, "has no train split", "--split test", split="train")


def test_npz_is_told_by_content_too(tmp_path):
    assert_holds(load(write(tmp_path / "images", npz_of("test", IMAGES, LABELS))))


def test_npz_with_both_splits(tmp_path):
    content = npz(x_test=IMAGES, y_test=LABELS, x_train=IMAGES[:2], y_train=LABELS[:2])
    path = write(tmp_path / "both.npz", content)
    assert len(load(path).training) == COUNT
    train = load(path, "train")
    assert (len(train.training), len(train.evaluation)) == (2, COUNT)


@pytest.mark.parametrize("dtype", ["float32", "float64", ">f4", "float16"])
def test_floats_from_0_to_1_stay_as_they_are(tmp_path, dtype):
    images = np.linspace(0, 1, IMAGES.size).reshape(IMAGES.shape).astype(dtype)
    loaded = load(write(tmp_path / "f.npz", npz_of("test", images, LABELS)))
    np.testing.assert_array_equal(loaded.training.images, images.astype("float32"))
    assert loaded.training.images.dtype == np.float32


@pytest.mark.parametrize(
    ("images", "labels", "texts"),
    [
        (IMAGES[:-1], LABELS, ["6 images and labels of shape (7,)", "one label for each image"]),
        (IMAGES, LABELS[:, None], ["labels of shape (7, 1)"]),
        (IMAGES, LABELS + 4, ["run from 4 to 10", "integers from 0 to 9"]),
        (IMAGES, LABELS.astype("int64") - 1, ["run from -1 to 5"]),
        (IMAGES, LABELS.astype("float32"), ["as float32", "integers from 0 to 9"]),
        (IMAGES[:0], LABELS[:0], ["holds no image"]),
        (IMAGES[..., None], LABELS, ["(7, 5, 4, 1)", "(count, height, width)"]),
        (IMAGES[:, :2], LABELS, ["(7, 2, 4)", "at least 3"]),
        (IMAGES.astype("int64") + 200, LABELS, ["run from 200 to 339", "0 to 255"]),
        (IMAGES.astype("float32"), LABELS, ["run from 0.0 to 139.0", "floats from 0 to 1"]),
        (IMAGES * np.float32("nan"), LABELS, ["nan", "floats from 0 to 1"]),
        (IMAGES > 3, LABELS, ["dtype bool", "uint8"]),
        (IMAGES.astype(complex), LABELS, ["dtype complex128"]),
    ],
)
def test_what_the_model_cannot_take_is_refused(tmp_path, images, labels, texts):
    refused(write(tmp_path / "x.npz", npz_of("test", images, labels)), "x.npz", *texts)


def test_npz_without_the_arrays_is_refused(tmp_path):
    path = write(tmp_path / "x.npz", npz(images=IMAGES, labels=LABELS))
    refused(path, "has no x_test and no y_test", "holds images, labels", "np.savez_compressed")
    path = write(tmp_path / "x.npz", npz(x_test=IMAGES))
    refused(path, "has no y_test", "holds x_test")


class Payload:
    def __reduce__(self):
        return (pytest.fail, ("a pickle in a data file was run",))


def test_a_pickle_in_an_npz_is_refused_and_not_run(tmp_path):
    pickled = np.empty(1, dtype=object)
    pickled[0] = Payload()
    path = write(tmp_path / "x.npz", npz(x_test=pickled, y_test=LABELS))
    refused(path, "x_test in", "dtype object", "save them as uint8")
    refused(write(tmp_path / "y.npz", pickle.dumps(Payload())), "y.npz is no .npz file")


@pytest.mark.parametrize(
    ("shape", "texts"),
    [
        ("(1000000, 1000, 1000)", ["1000000 x 1000 x 1000", "pass fewer images"]),
        ("(1000, 28, 28)", ["holds 784000 bytes", "get the file again"]),
    ],
)
def test_a_lying_npz_header_is_refused(tmp_path, shape, texts):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    refused(write(tmp_path / "x.npz", npz_with_header(header, bytes(140))), *texts)


def test_every_truncated_npz_is_refused(tmp_path):
    whole = npz_of("test", IMAGES, LABELS)
    for end in range(0, len(whole), 23):
        refused(write(tmp_path / "x.npz", whole[:end]), "x.npz is no .npz file", "get the file")


@pytest.mark.parametrize("name", ["nothing.npz", "nothing", "no/such/folder", ""])
def test_a_path_to_nothing_names_what_was_expected(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(name, "digits, mnist, an .npz file", "IDX")


def test_a_file_of_another_kind_names_what_was_expected(tmp_path):
    refused(write(tmp_path / "cat.png", b"\x89PNG"), "cat.png is neither", "t10k-images-idx3-ubyte")
    refused(write(tmp_path / "empty", b""), "is neither")


def test_mnist_comes_from_keras(monkeypatch):
    import keras

    splits = ((IMAGES[:2], LABELS[:2]), (IMAGES, LABELS))
    monkeypatch.setattr(keras.datasets.mnist, "load_data", lambda: splits)
    assert_holds(load("mnist"))
    train = load("mnist", "train")
    assert (len(train.training), len(train.evaluation)) == (2, COUNT)


def test_mnist_without_a_network_names_the_way_out(monkeypatch):
    import keras

    def fail():
        raise Exception("URL fetch failure on https://...: None -- Name or service not known")

    monkeypatch.setattr(keras.datasets.mnist, "load_data", fail)
    refused("mnist", "URL fetch failure", "--data PATH", "--data digits")


@settings(deadline=None, max_examples=150)
@given(content=st.binary(max_size=300), prefix=st.sampled_from(["zip", "idx", "gzip", "none"]))
def test_random_bytes_are_refused(tmp_path_factory, content, prefix):
    folder = tmp_path_factory.mktemp("random")
    start = {"zip": b"PK\x03\x04", "idx": b"\0\0\x08\x03", "gzip": b"\x1f\x8b\x08", "none": b""}
    refused(write(folder / "x.npz", start[prefix] + content), "x.npz")
    write_idx(folder, images=start[prefix] + content)
    refused(folder)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_damaged_npz_is_refused_or_still_holds_images(tmp_path_factory, data):
    damaged = bytearray(npz_of("test", IMAGES, LABELS))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    path = write(tmp_path_factory.mktemp("damaged") / "x.npz", bytes(damaged))
    try:
        loaded = load(path)
    except ValueError:
        return
    assert loaded.training.images.ndim == 3
    assert len(loaded.training) == len(loaded.training.labels)


@pytest.mark.skipif(not MNIST.is_dir(), reason="the MNIST test split is not at ../shared/data")
def test_the_real_test_split():
    loaded = load(str(MNIST))
    assert loaded.training.images.shape == (10000, 28, 28)
    assert loaded.training.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert loaded.training.images.max() == 1
    assert tutorial_data.load(str(MNIST / "t10k-labels-idx1-ubyte.gz")).image_shape == (28, 28)
