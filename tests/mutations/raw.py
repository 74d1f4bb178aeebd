"""Mutations of bytes, whatever their format."""

from pathlib import Path


def mutate(path: Path, rng) -> str:
    """Change the bytes of a file, and name the change."""
    change = rng.choice(BYTES)
    path.write_bytes(change(path.read_bytes(), rng))
    return change.__name__


def truncate(content, rng):
    return content[: int(len(content) * rng.random() ** 2)]


def flip_bytes(content, rng):
    changed = bytearray(content)
    for _ in range(rng.choice([1, 2, 8, 64])):
        changed[_place(content, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite_block(content, rng):
    at, length = _place(content, rng), rng.choice([1, 4, 8, 64, 4096])
    block = rng.choice([bytes(length), b"\xff" * length, rng.randbytes(length)])
    return (content[:at] + block + content[at + length :])[: len(content)]


def duplicate_block(content, rng):
    at, length = _place(content, rng), rng.choice([1, 8, 512, 4096])
    return content[: at + length] + content[at:]


def remove_block(content, rng):
    at, length = _place(content, rng), rng.choice([1, 8, 512, 4096])
    return content[:at] + content[at + length :]


def move_block(content, rng):
    at, to, length = _place(content, rng), _place(content, rng), rng.choice([8, 64, 512])
    changed = bytearray(content)
    changed[to : to + length] = content[at : at + length]
    return bytes(changed)


def change_digits(content, rng):
    """Numbers in text, of which configs are full, keep their length."""
    digits = [i for i, byte in enumerate(content[:65536]) if 48 <= byte <= 57]
    changed = bytearray(content)
    for at in rng.sample(digits, min(len(digits), rng.choice([1, 4]))):
        changed[at] = rng.choice(b"0123456789-.e")
    return bytes(changed)


def prepend(content, rng):
    return rng.choice([b"\0" * 512, b"\x89HDF\r\n\x1a\n", b"PK\x03\x04", b"\n"]) + content


def append(content, rng):
    return content + rng.choice([b"\0" * 512, content[: 1 << 16], rng.randbytes(100)])


BYTES = (
    *(truncate, flip_bytes, flip_bytes, overwrite_block, overwrite_block, duplicate_block),
    *(remove_block, move_block, change_digits, prepend, append),
)


def _place(content, rng):
    """Anywhere, but oftener near the beginning or the end, where formats keep their tables."""
    size = max(1, len(content))
    near = int(min(size, 4096) * rng.random())
    return rng.choice([near, size - 1 - near, rng.randrange(size), rng.randrange(size)])
