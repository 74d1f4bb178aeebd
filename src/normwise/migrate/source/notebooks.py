"""Notebooks that use TensorFlow Addons: their code cells, rewritten as the one program they are."""

import bisect
import dataclasses
import json
import re
from collections.abc import Iterator

from normwise.migrate.source.names import NEW_PACKAGE
from normwise.migrate.source.references import NEWLINE, REQUIREMENT, Finding
from normwise.migrate.source.rewriting import Rewritten, in_order, parse, rewrite_cells

# What IPython takes for itself or the shell: %pip, !ls, files = !ls, model?
_MAGIC = re.compile(r"\s*(?:[%!?]|[\w, ]+=\s*[%!])|.*\?\s*$")
# A cell with one of these is Python all the same; any other %% hands it to something else.
_MAGIC_OF_PYTHON = re.compile(r"\s*%%(?:time|timeit|capture|prun)\b")
_OLD_NAME = re.compile(r"\b(?:tfa|tensorflow_addons)\b")
_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()


@dataclasses.dataclass
class _Cell:
    """A cell of code.

    Args:
        number: its place among all cells, from 1.
        span: where its source stands in the file.
        source: its lines, as one text.
        hidden: the lines that are no Python, by their index.
    """

    number: int
    span: slice
    source: str
    hidden: dict[int, str] = dataclasses.field(default_factory=dict)


def rewrite_notebook(text: str) -> Rewritten:
    """Rewrite the code of a notebook from TensorFlow Addons to normwise.

    What one cell imports the others know. Of the file only the lines of code that change are
    written anew: outputs, metadata and the layout of the JSON stay as they are. What `pip install`
    installs changes, too, once nothing needs TensorFlow Addons.

    Args:
        text: the notebook, as JSON of format 4.

    Returns:
        A Rewritten, whose findings name the cell and count lines from its top.

    Raises:
        ValueError: text is no such notebook, or a cell no Python; the message has cell and line.

    Example:

    >>> sources = [["import tensorflow_addons as tfa"], ["tfa.layers.TLU()"]]
    >>> cells = [{"cell_type": "code", "source": source} for source in sources]
    >>> done = rewrite_notebook(json.dumps({"nbformat": 4, "cells": cells}))
    >>> [cell["source"] for cell in json.loads(done.text)["cells"]]
    [['import normwise'], ['normwise.layers.TLU()']]
    """
    cells = _code_cells(text)
    mark = "# normwise-"
    while any(mark in cell.source for cell in cells):
        mark += "-"
    parts = [_python(cell, mark) for cell in cells]
    starts, line = [], 1
    for part in parts:
        starts.append(line + 1)
        line += len(NEWLINE.findall(f"{mark}\n{part}\n"))
    # The parts keep apart by a comment before each, and keep their ends by a newline after each.
    done = rewrite_cells("".join(f"{mark}\n{part}\n" for part in parts), starts)
    changes, remaining, hints = (
        [_in_cell(finding, cells, starts) for finding in findings]
        for findings in (done.changes, done.remaining, done.hints)
    )
    new_parts = [part[:-1] for part in done.text.split(f"{mark}\n")[1:]]
    magics = [finding for cell in cells for finding in _in_magics(cell)]
    if remaining or any(finding.new is None for finding in magics):
        remaining += magics
    else:
        changes += magics
        for cell in cells:
            cell.hidden = {n: REQUIREMENT.sub(NEW_PACKAGE, s) for n, s in cell.hidden.items()}
    for cell, part in reversed(list(zip(cells, new_parts, strict=True))):
        source = re.sub(
            rf"[ \t]*(?:pass  )?{re.escape(mark)}(\d+)",
            lambda found, cell=cell: cell.hidden[int(found[1])],
            part,
        )
        if source != cell.source:
            parse(part)
            text = text[: cell.span.start] + _encoded(source, text, cell) + text[cell.span.stop :]
    return Rewritten(text, *map(in_order, (changes, remaining, hints)))


def _code_cells(text: str) -> list[_Cell]:
    try:
        document = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no notebook: no JSON: {error}; save it anew") from error
    cells = document.get("cells") if isinstance(document, dict) else None
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise ValueError(
            "no notebook of format 4, which has cells; convert an older one by "
            "jupyter nbconvert --to notebook"
        )
    language = _found(document, "metadata", "kernelspec", "language")
    language = language or _found(document, "metadata", "language_info", "name") or "python"
    if not isinstance(language, str):
        raise ValueError(f"no notebook: its language is {language!r}, and no text; correct it")
    if language.lower() != "python":
        return []
    _, cells_at, _ = next(item for item in _items(text, 0) if item[0] == "cells")
    return [
        _Cell(number + 1, slice(start, stop), _source(cells[number], number + 1))
        for number, cell_at, _ in _items(text, cells_at)
        if cells[number].get("cell_type") == "code"
        for key, start, stop in _items(text, cell_at)
        if key == "source"
    ]


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)!r} stands twice in one object")
    return document


def _found(value: object, *keys: str) -> object:
    """The value below some keys; nothing where one of them is missing."""
    for key in keys:
        if not isinstance(value, dict):
            raise ValueError(f"no notebook: {value!r} has no {key}, for it is no object; remove it")
        value = value.get(key, {})
    return value


def _source(cell: dict, number: int) -> str:
    source = cell["source"]
    lines = [source] if isinstance(source, str) else source
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"cell {number}: the source is neither a text nor a list of texts")
    return "".join(lines)


def _items(text: str, at: int) -> Iterator[tuple[str | int, int, int]]:
    """The keys or indices of the JSON value that begins at `at`, and where their values stand."""
    at = _SPACE.match(text, at).end()
    is_object = text[at] == "{"
    at = _SPACE.match(text, at + 1).end()
    index = 0
    while text[at] not in "}]":
        key = index
        if is_object:
            key, at = _DECODER.raw_decode(text, at)
            at = _SPACE.match(text, text.index(":", at) + 1).end()
        _, stop = _DECODER.raw_decode(text, at)
        yield key, at, stop
        at = _SPACE.match(text, stop).end()
        if text[at] == ",":
            at = _SPACE.match(text, at + 1).end()
        index += 1


def _encoded(source: str, text: str, cell: _Cell) -> str:
    """The JSON of a cell's new source, in the layout of the old, whose lines it takes over."""
    is_ascii = text.isascii()
    old = text[cell.span]
    if old.startswith('"'):
        return json.dumps(source, ensure_ascii=is_ascii)
    spans = [(start, stop) for _, start, stop in _items(old, 0)]
    encoded = {json.loads(old[start:stop]): old[start:stop] for start, stop in spans}
    opening, closing = old[: spans[0][0]], old[spans[-1][1] :]
    between = opening[1:] or (" " if '": ' in text else "")
    separator = old[spans[0][1] : spans[1][0]] if len(spans) > 1 else f",{between}"
    lines = source.splitlines(keepends=True)
    new = [encoded.get(line) or json.dumps(line, ensure_ascii=is_ascii) for line in lines]
    return opening + separator.join(new) + closing


def _python(cell: _Cell, mark: str) -> str:
    """The source of a cell with what is no Python hidden behind marks."""
    try:
        parse(cell.source)
        return cell.source
    except ValueError:
        pass  # Python itself has no magics.
    lines = cell.source.split("\n")
    is_other = lines[0].lstrip().startswith("%%") and not _MAGIC_OF_PYTHON.match(lines[0])
    continues = False
    for index, line in enumerate(lines):
        if is_other or continues or _MAGIC.match(line):
            cell.hidden[index] = line
            indent = line[: len(line) - len(line.lstrip())]
            # The first line may be all that is in a block.
            lines[index] = f"{mark}{index}" if continues else f"{indent}pass  {mark}{index}"
            continues = line.rstrip().endswith("\\")
    source = "\n".join(lines)
    try:
        parse(source)
    except ValueError as error:
        raise ValueError(f"cell {cell.number}, {error}") from error
    return source


def _in_magics(cell: _Cell) -> Iterator[Finding]:
    """What the lines of a cell that are no Python say of TensorFlow Addons."""
    for index, line in cell.hidden.items():
        if (found := REQUIREMENT.search(line)) and "uninstall" not in line:
            position = (index + 1, found.start() + 1)
            yield Finding(*position, found[0], NEW_PACKAGE, cell=cell.number)
        elif found := found or _OLD_NAME.search(line):
            position = (index + 1, found.start() + 1)
            note = "this line is no Python; edit it by hand"
            yield Finding(*position, found[0], None, note, cell=cell.number)


def _in_cell(finding: Finding, cells: list[_Cell], starts: list[int]) -> Finding:
    index = bisect.bisect(starts, finding.line) - 1
    line = finding.line - starts[index] + 1
    return dataclasses.replace(finding, line=line, cell=cells[index].number)
