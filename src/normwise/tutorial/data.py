"""The tutorial's data: real images of the ten digits, from scikit-learn, from Keras or from a file.

A file is somebody else's, so every number in it is checked before it is believed: a header may
claim any size, and what is read stays below `MAX_PIXELS` whatever it claims.
"""

import dataclasses
import gzip
import math
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from normwise.tutorial import SPLITS

CLASS_COUNT = 10
# The model's convolution is 3 x 3 and does not pad.
MIN_SIDE = 3
# Five times MNIST's 60,000 training images.
MAX_PIXELS = 256 * 1024 * 1024

EXPECTED = (
    "expected digits, mnist, an .npz file in Keras's layout (x_test, y_test, x_train, y_train), or "
    "a file or folder in MNIST's IDX format (t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte, "
    "train-..., gzipped or not)"
)

_IDX_NAME = re.compile(
    r"(?P<family>(?!\.).*?)(?P<split>train|t10k|test)-(?P<kind>images|labels)[-.]idx[13]-ubyte(\.gz)?"
)
_IDX_MAGIC = {0x803: "images", 0x801: "labels"}
_CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Examples:
    """Images with their labels.

    Args:
        images: (count, height, width), float32, from 0 to 1.
        labels: (count,), int32, from 0 to 9.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Data:
    """What one run of the tutorial trains on, and what it is evaluated on.

    Args:
        name: `digits`, `mnist`, or the name of the file or folder.
        source: where the images came from, for the reader.
        split: the split that is trained on, `test` or `train`.
        training, evaluation: the examples; one and the same object where there is but one split.
    """

    name: str
    source: str
    split: str
    training: Examples
    evaluation: Examples

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        return self.training.images.shape[1:]

    def summary(self) -> dict:
        """The facts about the data, as plain Python values."""
        return {
            "name": self.name,
            "source": self.source,
            "split": self.split,
            "training_images": len(self.training),
            "evaluation_images": len(self.evaluation),
            "image_shape": list(self.image_shape),
            "class_count": CLASS_COUNT,
        }


def load(name: str = "digits", split: str = "test") -> Data:
    """Load the images that `name` stands for.

    The original tutorial trains on MNIST's test split and evaluates on it as well, which
    `split="test"` repeats. With `split="train"` the evaluation still uses the test split, where
    there is one.

    Args:
        name: `digits` (1,797 images of 8 x 8 pixels that scikit-learn ships), `mnist` (what Keras
            downloads), or the path of an `.npz` file in Keras's layout or of a file or folder in
            MNIST's IDX format, gzipped or not.
        split: the split to train on, `test` or `train`.

    Raises:
        ValueError: there is no such data, no such split in it, or a file is broken; the text says
            what was expected, what was found, and what to do.
        ImportError: `digits` needs scikit-learn, and it is not installed.

    Example:

    >>> digits = load("digits")
    >>> digits.training.images.shape, digits.image_shape, len(digits.evaluation)
    ((1797, 8, 8), (8, 8), 1797)
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is no split; use {' or '.join(SPLITS)}")
    if name == "digits":
        source, read = "scikit-learn's load_digits", _read_digits
    elif name == "mnist":
        source, read = "keras.datasets.mnist", _read_mnist
    else:
        source, read = name, _reader_of(Path(name))
    training = read(split)
    if training is None:
        other = "train" if split == "test" else "test"
        raise ValueError(
            f"{name} has no {split} split; use --split {other}, or pass data that has one "
            "(--data mnist has both)"
        )
    evaluation = training if split == "test" else read("test") or training
    if evaluation.images.shape[1:] != training.images.shape[1:]:
        raise ValueError(
            f"{name} holds images of {training.images.shape[1:]} pixels to train on and of "
            f"{evaluation.images.shape[1:]} to evaluate on; give both splits one size"
        )
    return Data(Path(name).name or name, source, split, training, evaluation)


# A reader takes a split and gives its examples, or None where the data has no such split.
Reader = Callable[[str], Examples | None]


def _read_digits(split: str) -> Examples | None:
    if split != "test":
        return None
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _examples(digits.images / 16, digits.target, "scikit-learn's digits")


def _read_mnist(split: str) -> Examples:
    import keras

    try:
        train, test = keras.datasets.mnist.load_data()
    except Exception as error:  # Keras raises a bare Exception when the download fails.
        raise ValueError(
            f"mnist could not be loaded ({error}); pass the files if you have them, as in "
            "--data PATH with an .npz in Keras's layout or a folder of MNIST's IDX files, or use "
            "--data digits, which needs no network"
        ) from error
    return _examples(*(test if split == "test" else train), "keras.datasets.mnist")


def _reader_of(path: Path) -> Reader:
    try:
        if path.is_dir():
            return _idx_reader(path, path.iterdir())
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError:
        raise ValueError(f"--data {path}: there is no such file or folder; {EXPECTED}") from None
    except OSError as error:
        raise ValueError(f"--data {path} cannot be read ({error.strerror}); {EXPECTED}") from error
    if path.suffix == ".npz" or start.startswith(b"PK"):
        return lambda split: _read_npz(path, split)
    named = _IDX_NAME.fullmatch(path.name)
    if not named:
        raise ValueError(
            f"{path} is neither an .npz file nor named like a file of MNIST's; {EXPECTED}"
        )
    own = (named["family"], named["split"])
    return _idx_reader(path.parent, (p for p in path.parent.iterdir() if _family(p) == own))


def _family(path: Path) -> tuple[str, str] | None:
    named = _IDX_NAME.fullmatch(path.name)
    return named and (named["family"], named["split"])


def _idx_reader(folder: Path, candidates) -> Reader:
    """A reader of the IDX files among `candidates`; of two equal names the unzipped one counts."""
    paths: dict[tuple[str, str], Path] = {}
    families = set()
    for path in sorted(candidates, reverse=True):
        if named := _IDX_NAME.fullmatch(path.name):
            split = "train" if named["split"] == "train" else "test"
            paths[split, named["kind"]] = path
            families.add(named["family"])
    if not paths:
        raise ValueError(f"the folder {folder} holds no file of MNIST's; {EXPECTED}")
    if len(families) > 1:
        raise ValueError(
            f"the folder {folder} holds {len(families)} data sets, whose files begin with "
            f"{', '.join(map(repr, sorted(families)))}; pass one of the files"
        )

    def read(split: str) -> Examples | None:
        images, labels = paths.get((split, "images")), paths.get((split, "labels"))
        if images is None and labels is None:
            return None
        if images is None or labels is None:
            found, wanted = (images or labels).name, "labels" if images else "images"
            partner = found.replace("labels", "images").replace("idx1", "idx3")
            if wanted == "labels":
                partner = found.replace("images", "labels").replace("idx3", "idx1")
            raise ValueError(
                f"{found} has no {wanted} beside it in {folder}; put {partner} into that folder"
            )
        return _examples(
            _read_idx(images, "images"), _read_idx(labels, "labels"), f"{images}, {labels.name}"
        )

    return read


def _read_idx(path: Path, kind: str) -> np.ndarray:
    """The array in one IDX file: a magic number, the extents, then a byte per element."""
    rank, magic = (3, 0x803) if kind == "images" else (1, 0x801)
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            header = file.read(4 + 4 * rank)
            found = int.from_bytes(header[:4], "big")
            if len(header) >= 4 and found != magic:
                meant = f", which means {_IDX_MAGIC[found]}" if found in _IDX_MAGIC else ""
                raise ValueError(
                    f"{path} begins with the number 0x{found:08x}{meant}, but an IDX file of "
                    f"{kind} begins with 0x{magic:08x}; check that it is what its name says"
                )
            if len(header) < 4 + 4 * rank:
                raise ValueError(
                    f"{path} ends after {len(header)} bytes, inside the header of {4 + 4 * rank} "
                    f"bytes of an IDX file of {kind}; get the file again"
                )
            extents = tuple(int(n) for n in np.frombuffer(header, ">u4", offset=4))
            expected_bytes = _check_size(extents, path)
            body = _read_at_most(file, expected_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}); get the file again") from error
    if len(body) != expected_bytes:
        amount = "more than that" if len(body) > expected_bytes else f"{len(body)} bytes"
        raise ValueError(
            f"{path} says that it holds {' x '.join(map(str, extents))} bytes of {kind}, and holds "
            f"{amount}; get the file again"
        )
    return np.frombuffer(body, np.uint8).reshape(extents)


def _read_at_most(file: IO[bytes], limit_bytes: int) -> bytes:
    """Read in chunks, so that memory follows what is there and not what a header claims."""
    chunks, left_bytes = [], limit_bytes
    while left_bytes and (chunk := file.read(min(left_bytes, _CHUNK_BYTES))):
        chunks.append(chunk)
        left_bytes -= len(chunk)
    return b"".join(chunks)


def _read_npz(path: Path, split: str) -> Examples | None:
    names = (f"x_{split}", f"y_{split}")
    try:
        with zipfile.ZipFile(path) as archive:
            held = [Path(name).stem for name in archive.namelist()]
            missing = [name for name in names if name not in held]
            if not missing:
                images, labels = (_read_npy(archive, name, path) for name in names)
    except _RefusedError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen kinds for a damaged file.
        raise ValueError(
            f"{path} is no .npz file that can be read ({error or type(error).__name__}); "
            f"get the file again; {EXPECTED}"
        ) from error
    if len(missing) == 1 or not any(name.startswith(("x_t", "y_t")) for name in held):
        raise ValueError(
            f"{path} has no {' and no '.join(missing)}, it holds {', '.join(held) or 'nothing'}; "
            f"save it as np.savez_compressed(path, {names[0]}=images, {names[1]}=labels)"
        )
    return None if missing else _examples(images, labels, str(path))


class _RefusedError(ValueError):
    """What a check of ours found in an archive, as against what NumPy stumbled over."""


def _read_npy(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    """One array of an archive, whose header is checked before NumPy allocates what it claims."""
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read_header(file)
    if dtype.kind not in "uif":
        raise _RefusedError(
            f"{name} in {path} has dtype {dtype}, but images and labels are numbers; save them as "
            "uint8"
        )
    try:
        claimed_bytes = _check_size(shape, f"{name} in {path}") * dtype.itemsize
    except ValueError as error:
        raise _RefusedError(*error.args) from None
    if claimed_bytes > member.file_size:
        raise _RefusedError(
            f"{name} in {path} says that it holds {claimed_bytes} bytes, and holds at most "
            f"{member.file_size}; get the file again"
        )
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _check_size(extents: tuple[int, ...], where: str | Path) -> int:
    size = math.prod(extents)
    if size > MAX_PIXELS:
        raise ValueError(
            f"{where} says that it holds {' x '.join(map(str, extents))} = {size} numbers, more "
            f"than the {MAX_PIXELS} that the tutorial reads; pass fewer images"
        )
    return size


def _examples(images: np.ndarray, labels: np.ndarray, where: str) -> Examples:
    """Check what was read, whatever it was read from, and bring it to the model's form."""
    if images.ndim != 3 or min(images.shape[1:], default=0) < MIN_SIDE:
        raise ValueError(
            f"the images of {where} have shape {images.shape}; expected (count, height, width), "
            f"grey, with height and width of at least {MIN_SIDE}"
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{where} holds {len(images)} images and labels of shape {labels.shape}; expected one "
            f"label for each image, shape ({len(images)},)"
        )
    if not len(images):
        raise ValueError(f"{where} holds no image; pass data with at least one")
    return Examples(_unit_range(images, where), _class_numbers(labels, where))


def _unit_range(images: np.ndarray, where: str) -> np.ndarray:
    whole = images.dtype.kind in "ui"
    low, high = images.min(), images.max()
    # Written so that a NaN fails.
    if not (low >= 0 and high <= (255 if whole else 1)):
        raise ValueError(
            f"the pixels of {where} run from {low} to {high} as {images.dtype}; expected integers "
            "from 0 to 255 or floats from 0 to 1"
        )
    images = images.astype("float32")
    return images / np.float32(255) if whole else images


def _class_numbers(labels: np.ndarray, where: str) -> np.ndarray:
    low, high = labels.min(), labels.max()
    if labels.dtype.kind not in "ui" or low < 0 or high >= CLASS_COUNT:
        raise ValueError(
            f"the labels of {where} run from {low} to {high} as {labels.dtype}; the model tells "
            f"{CLASS_COUNT} classes apart, so expected integers from 0 to {CLASS_COUNT - 1}"
        )
    return labels.astype("int32")
