"""The guard for HDF5's heaps: silent for whole files, and there before the library hangs."""

import io
from pathlib import Path

import h5py
import numpy as np
import pytest

from normwise.migrate.models import heaps

FIXTURES = Path(__file__).parents[2] / "shared" / "tfa_models"


def written(libver="earliest"):
    file = io.BytesIO()
    with h5py.File(file, "w", libver=libver) as each:
        each.attrs["config"] = "text " * 5000
        each.attrs["names"] = ["a" * n for n in range(1, 600)]
        each["texts"] = ["one", "", "three" * 100]
        each["weights"] = np.arange(5000.0)
    return file.getvalue()


def with_object(content, index, size):
    """The file with another first object in its first heap."""
    changed = bytearray(content)
    at = content.index(heaps.HEAP) + heaps.HEADER_BYTES
    changed[at : at + 2] = index.to_bytes(2, "little")
    changed[at + 8 : at + 16] = size.to_bytes(8, "little")
    return bytes(changed)


@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_whole_files_pass(libver):
    content = written(libver)
    assert content.count(heaps.HEAP) > 1
    heaps.check(content)


def test_shipped_files_pass(tmp_path):
    for path in FIXTURES.glob("*.h5"):
        heaps.check_file(path)


@pytest.mark.parametrize(("index", "size"), [(0, 0), (1, 2**64 - 16), (1, 2**63), (0, 2**32)])
def test_an_object_that_ends_nowhere_is_refused(index, size):
    with pytest.raises(ValueError, match=r"its heap at byte \d+ is damaged"):
        heaps.check(with_object(written(), index, size))


def test_the_letters_alone_are_no_heap():
    content = written() + heaps.HEAP + b"\xff" * 100 + heaps.HEAP
    heaps.check(content)


@pytest.mark.parametrize("content", [b"PK\3\4", heaps.SIGNATURE, written()[:13] + b"\4\4"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "file.h5").write_bytes(content)
    with pytest.raises(ValueError, match="it is no HDF5 file as Keras writes them"):
        heaps.check_file(tmp_path / "file.h5")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "file.h5").touch()
    with pytest.raises(ValueError, match="empty"):
        heaps.check_file(tmp_path / "file.h5")
