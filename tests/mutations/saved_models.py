"""Mutations of SavedModel folders."""

from pathlib import Path

from mutations import configs, raw, tables


def mutate(folder: Path, rng) -> str:
    """Change a file of the folder, or the folder, and name the change."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    choice = rng.random()
    metadata = folder / "keras_metadata.pb"
    if choice < 0.45:
        content, kind = _mutate_metadata(metadata.read_bytes(), rng)
        metadata.write_bytes(content)
        return f"metadata {kind}"
    chosen = rng.choice(files)
    if choice < 0.55:
        chosen.unlink()
        return f"remove {chosen.name}"
    if choice < 0.6:
        chosen.unlink()
        chosen.mkdir()
        return f"folder for {chosen.name}"
    if choice < 0.65:
        chosen.write_bytes(rng.choice(files).read_bytes())
        return f"other file for {chosen.name}"
    return f"{chosen.name} {raw.mutate(chosen, rng)}"


def _mutate_metadata(content: bytes, rng) -> tuple[bytes, str]:
    """Change the JSON of one node of keras_metadata.pb, and the lengths around it."""
    nodes = list(_fields(content))
    described = [i for i, (_, node) in enumerate(nodes) if len(node) > 20]
    # The first node is the model, whose config is what matters most.
    index = described[0] if rng.random() < 0.6 else rng.choice(described)
    number, node = nodes[index]
    fields, kind = [], "none"
    for field in _fields(node):
        if field[0] == 5:
            text, kind = configs.mutate(field[1], rng)
            field = (5, text)
        fields.append(field)
    nodes[index] = (number, tables.message(*fields))
    return tables.message(*nodes), kind


def _fields(content: bytes):
    """The fields of a protocol buffer: their number, and what they hold, an int or bytes."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        number, at = _varint(content, at)
        if key & 7 == 0:
            yield key >> 3, number
        elif key & 7 == 2:
            yield key >> 3, content[at : at + number]
            at += number
        else:
            raise ValueError(f"wire type {key & 7} is not in Keras's metadata")


def _varint(content, at):
    number = shift = 0
    while True:
        byte = content[at]
        number, shift, at = number | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return number, at
