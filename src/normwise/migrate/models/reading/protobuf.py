"""The wire format of protocol buffers, as far as TensorFlow's files need it.

Reference: https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, seven bits to a byte, and where it ends.

    >>> varint(bytes([0xAC, 0x02]), 0)
    (300, 2)
    """
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    raise ValueError("a number in the file does not end")


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Every field of a message: its number, and its value as an int or as bytes.

    >>> list(fields(bytes([0x08, 0x05, 0x12, 0x02]) + b"hi"))
    [(1, 5), (2, b'hi')]
    """
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            value, at = varint(data, at)
            yield number, value
            continue
        if kind == BYTES:
            length, at = varint(data, at)
        elif kind in (FIXED32, FIXED64):
            length = 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"a message in the file has a field of the unknown kind {kind}")
        if length > len(data) - at:
            raise ValueError(f"a message in the file is cut short, {length} bytes are announced")
        yield number, data[at : at + length]
        at += length


def collect(data: bytes) -> dict[int, list[int | bytes]]:
    """The values of every field of a message, by its number."""
    found = {}
    for number, value in fields(data):
        found.setdefault(number, []).append(value)
    return found
