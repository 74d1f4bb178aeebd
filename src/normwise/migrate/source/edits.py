"""The source without TensorFlow Addons: imports and references, as `References` decided."""

import ast
import bisect
import collections
import re
from collections.abc import Iterator, Sequence

from normwise.migrate.source import names
from normwise.migrate.source.names import NEW_PACKAGE
from normwise.migrate.source.references import (
    NEWLINE,
    Lines,
    References,
    below_old,
    is_of_class,
)
from normwise.migrate.source.scopes import Import, Use

_COMMENT = re.compile(r"#[^\r\n]*")
_REST_OF_LINE = re.compile(r"[ \t\f]*(?P<comment>#[^\r\n]*)?(?P<newline>\r\n|\r|\n|\Z)")
_OWN_COMMENT = re.compile(r"\s*,([ \t\f]*#[^\r\n]*)")
_MODULE = re.compile(r"(from[\s\\]+)(.+?)([\s\\]+import\b)", re.DOTALL)
_DOT = re.compile(r"\.(?=(?:[\s\\]|#[^\r\n]*)*(\w+)\Z)")


class Edits:
    """Writes what a `References` decided.

    Args:
        lines: the source.
        references: of the same.
        cell_starts: the lines where its parts begin, each with imports of its own.
    """

    def __init__(self, lines: Lines, references: References, cell_starts: Sequence[int]):
        self._lines = lines
        self._text = lines.text
        self._references = references
        self._cell_starts = cell_starts
        renamed = references.package != NEW_PACKAGE
        self._import_of_package = f"import {NEW_PACKAGE}" + f" as {references.package}" * renamed
        newline = NEWLINE.search(lines.text)
        self._newline = newline[0] if newline else "\n"

    def rewritten(self) -> str:
        """The new source."""
        edits = list(self._imports())
        for use, path in self._references.moved_uses.items():
            edits += self._use(use, path)
        text, stop = [], len(self._text)
        for start, end, new in sorted(edits, reverse=True):
            text += [self._text[end:stop], new]
            stop = start
        new = "".join([self._text[:stop], *reversed(text)])
        # Where the last line is gone, the one above it ends as it did.
        return new if self._text.endswith(("\n", "\r")) else new.rstrip("\r\n")

    def _use(self, use: Use, path: str) -> Iterator[tuple[int, int, str]]:
        """Of a.layers.X only a differs, and the spaces around the dots stay."""
        start, end = self._lines.span(use.node)
        new = f"{self._references.package}.{path}"
        if isinstance(use.node, ast.Constant):
            yield start, end, self._text[start:end].replace(use.node.value, new)
            return
        package, module, name = new.rsplit(".", 2)
        attributes = [each.attr for each in use.attributes]
        keeps_module = attributes[0] == module
        yield start, end, package if keeps_module else f"{package}.{module}"
        for attribute in use.attributes[keeps_module : attributes.index(name)]:
            _, inner = self._lines.span(attribute.value)
            _, outer = self._lines.span(attribute)
            dot = _DOT.search(self._text, inner, outer)
            yield dot.start(), dot.end(), ""
            yield *dot.span(1), ""

    def _imports(self) -> Iterator[tuple[int, int, str]]:
        imported = set()  # the blocks, in each cell, that have imported the new package by here
        statements: dict[ast.stmt, list[Import]] = {}
        for each in self._references.scopes.imports:
            statements.setdefault(each.statement, []).append(each)
        for statement in sorted(statements, key=lambda each: (each.lineno, each.col_offset)):
            bound = statements[statement]
            cell = bisect.bisect(self._cell_starts, statement.lineno)
            block = (id(bound[0].place.statements), cell)
            if any(map(self._references.binds_package, bound)):
                imported.add(block)
            moved = [each for each in bound if each in self._references.moved]
            classes = [each.alias for each in moved if is_of_class(each)]
            gone = set(moved) - self._references.needed
            kept = [each.alias for each in bound if each not in gone]
            new = []
            if len(moved) > len(classes) and block not in imported:
                imported.add(block)
                new.append(self._import_of_package)
            if classes:
                home = names.successor(below_old(moved[0].path)).name.rpartition(".")[0]
                new.append(_MODULE.sub(rf"\g<1>{home}\g<3>", self._only(statement, classes), 1))
            if kept:
                new.append(self._only(statement, kept))
            if len(new) > 1 or kept != [each.alias for each in bound]:
                yield self._replaced(statement, new)

    def _replaced(self, statement: ast.stmt, new: list[str]) -> tuple[int, int, str]:
        """A statement's place, and some others for it: one a line if it has lines of its own."""
        start, end = self._lines.span(statement)
        first = self._lines.index(statement.lineno, 0)
        rest = _REST_OF_LINE.match(self._text, end)
        indent = self._text[first:start]
        is_continued = self._text[:first].rstrip("\r\n").endswith("\\")
        if rest is None or indent.strip() or is_continued:
            return start, end, "; ".join(new or [self._import_of_package])
        above = self._text[self._lines.index(max(statement.lineno - 1, 1), 0) : first]
        if not new and not rest["comment"] and not above.lstrip().startswith("#"):
            return first, rest.end(), ""
        text = f"{self._newline}{indent}".join(new or [self._import_of_package])
        lost = collections.Counter(_COMMENT.findall(self._text[start:end]))
        lost -= collections.Counter(_COMMENT.findall(text))
        return start, end, "".join(f"{each}{self._newline}{indent}" for each in lost) + text

    def _only(self, statement: ast.Import | ast.ImportFrom, aliases: list[ast.alias]) -> str:
        """An import with some of its names, each with its comment, in the layout that it has."""
        start, end = self._lines.span(statement)
        spans = [self._lines.span(alias) for alias in statement.names]
        stops = [*(begin for begin, _ in spans[1:]), end]
        chosen = [index for index, alias in enumerate(statement.names) if alias in aliases]
        parts = [self._text[spans[index][0] : stops[index]] for index in chosen]
        last = chosen[-1]
        if last < len(spans) - 1:
            name = self._text[slice(*spans[last])]
            behind, closing = (
                self._text[spans[last][1] : stops[last]],
                self._text[spans[-1][1] : end],
            )
            comment, newline = _OWN_COMMENT.match(behind), NEWLINE.search(closing)
            if newline:
                closing = f",{comment[1] if comment else ''}{closing[newline.start() :]}"
            elif comment and closing:
                closing = f"{behind})"
            parts[-1] = f"{name}{closing}"
        return "".join([self._text[start : spans[0][0]], *parts])
