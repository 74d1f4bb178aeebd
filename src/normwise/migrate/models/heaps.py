"""A guard for the heaps of HDF5 files, where its library may walk in a circle for ever."""

import mmap
from pathlib import Path

SIGNATURE = b"\x89HDF\r\n\x1a\n"
HEAP = b"GCOL"
HEADER_BYTES = 16  # of a heap, and of each object in it


def check_file(path: Path) -> None:
    """Refuse a file as `check` refuses its bytes."""
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        check(data)


def check(data: bytes | mmap.mmap) -> None:
    """Refuse an HDF5 file with a heap that its library would not come out of.

    A heap, where texts of any length lie, is a run of objects: index (2 bytes), references (2),
    reserved (4), size (8), and as many bytes, padded to 8; with index 0 it is free room, and the
    size counts the header too. The library steps from one to the next by the size as it finds it:
    at 0, it stays (HDF5 1.14.6, three of 3,000 files with some bytes changed).

    Raises:
        ValueError: the data is no HDF5 file with lengths of 8 bytes, as all files of Keras are, or
            an object ends outside of its heap.

    Reference: HDF5 File Format Specification 3.0, III.E,
    https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html
    """
    sizes = data[13:15] if data[8:9] in (b"\0", b"\1") else data[9:11]
    if data[:8] != SIGNATURE or sizes != b"\x08\x08":
        raise ValueError("it is no HDF5 file as Keras writes them")
    at = data.find(HEAP)
    while at >= 0:
        end = at + int.from_bytes(data[at + 8 : at + 16], "little")
        # Weights may hold these four letters by chance, but no length that fits after them.
        if data[at + 4 : at + 5] == b"\1" and at + HEADER_BYTES <= end <= len(data):
            _check_heap(data, at, end)
        at = data.find(HEAP, at + 1)


def _check_heap(data, start: int, end: int) -> None:
    at = start + HEADER_BYTES
    while at + HEADER_BYTES <= end:
        index = int.from_bytes(data[at : at + 2], "little")
        size = int.from_bytes(data[at + 8 : at + 16], "little")
        step = HEADER_BYTES + -(-size // 8) * 8 if index else size
        if not 0 < step <= end - at:
            raise ValueError(f"its heap at byte {start} is damaged")
        at += step
