"""Where source names TensorFlow Addons, and what is to become of each place."""

import ast
import collections
import dataclasses
import itertools
import re
import unicodedata
from collections.abc import Iterable

from normwise.migrate.source import names
from normwise.migrate.source.names import NEW_PACKAGE, OLD_PACKAGE, Successor
from normwise.migrate.source.scopes import Import, Scope, Scopes, Use, lookup

# A requirement of pip, with its extras and its versions; no import.
_VERSION = r"\s*(?:[=!<>~]=|[<>])\s*\d[\w.*]*"
REQUIREMENT = re.compile(
    rf"(?<!import )(?<!from )\btensorflow[-_.]addons\b(?!\.)(?:\[[^]]*\])?"
    rf"(?:{_VERSION}(?:\s*,{_VERSION})*)?"
)
_DOTTED = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
NEWLINE = re.compile(r"\r\n|\r|\n")
_LAST_NAME = re.compile(r"\w+\Z")
_PLAIN_STRING = re.compile(r"""[rRuU]?("{3}|'{3}|"|')(?P<value>[\w.]+)\1""")
_UNCLEAR = Successor(None, "it may be something else here; move it by hand")
_AS_VALUE = Successor(
    None, f"name what is taken from it, as {NEW_PACKAGE}.layers.GroupNormalization"
)
_UNKNOWN = Successor(None, "no name of TensorFlow Addons 0.23")
_UNUSED = Successor(None, "nothing here uses it; remove the import")
_IN_A_STRING = "in a string; edit it by hand"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One place where source names TensorFlow Addons, or what Keras 3 refuses.

    Args:
        line, column: where it stands in the old text, both from 1; in a notebook, in its cell.
        old: what it names, in full.
        new: what to use now; None where nothing replaces it.
        note: what differs, or what to do; may be empty.
        cell: the number of the notebook's cell, from 1; None in a script.
    """

    line: int
    column: int
    old: str
    new: str | None
    note: str = ""
    cell: int | None = None


class Lines:
    """Source, and where CPython's lines and columns are in it.

    Args:
        text: the source.
    """

    def __init__(self, text: str):
        self.text = text
        self._starts = [0, *(found.end() for found in NEWLINE.finditer(text)), len(text)]
        lines = map(text.__getitem__, map(slice, self._starts, self._starts[1:]))
        self._wide = {n: each.encode() for n, each in enumerate(lines) if not each.isascii()}

    def index(self, line: int, column: int) -> int:
        """The index of a column, which counts the bytes of UTF-8."""
        if line - 1 in self._wide:
            column = len(self._wide[line - 1][:column].decode(errors="ignore"))
        return self._starts[line - 1] + column

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Where a node begins and ends."""
        start = self.index(node.lineno, node.col_offset)
        return start, self.index(node.end_lineno, node.end_col_offset)

    def position(self, node: ast.AST) -> tuple[int, int]:
        """The line and column of a node, both from 1."""
        return node.lineno, self.span(node)[0] - self._starts[node.lineno - 1] + 1

    def ends_with(self, node: ast.AST, name: str) -> bool:
        """Whether a node is as it should be where it says that it is."""
        start, end = self.span(node)
        found = _LAST_NAME.search(self.text, start, end)
        return found is not None and unicodedata.normalize("NFKC", found[0]) == name

    def quoted(self, node: ast.Constant) -> str | None:
        """What a string is, if that is written in one pair of quotes as it is."""
        start, end = self.span(node)
        found = _PLAIN_STRING.fullmatch(self.text, start, end)
        return found and found["value"]


class References:
    """Finds every name of TensorFlow Addons, and decides what becomes of it.

    Args:
        lines: the source.
        tree: the same, parsed.
    """

    def __init__(self, lines: Lines, tree: ast.Module):
        self.changes: list[Finding] = []
        self.remaining: list[Finding] = []
        self.moved_uses: dict[Use, str] = {}  # each with its path below the new package
        self.moved: set[Import] = set()  # the imports whose place one of the new package takes
        self.needed: set[Import] = set()  # those that something needs as they are
        self.scopes = Scopes(tree)
        self.package = self._name_of_package()
        self._lines = lines
        self._old = {each for each in self.scopes.imports if below_old(each.path) is not None}
        self._unclear = {each for each in self._old if not self._is_clear(each)}
        self._candidates: list[tuple[Use, str, list[Import]]] = []
        for use in self.scopes.uses:
            written = [use.node.id, *(each.attr for each in use.attributes)]
            self._refer(use, written, is_whole=self._is_where_it_says(use, written))
        for string in self.scopes.strings:
            if string.context.is_annotation:
                for found in _DOTTED.finditer(string.node.value):
                    is_whole = lines.quoted(string.node) == found[0]
                    self._refer(string, found[0].split("."), is_whole)
            else:
                self._read_string(string.node)
        self._move_uses()
        self._move_imports()

    def binds_package(self, each: Import) -> bool:
        """Whether an import is of the new package, by the name that it has here."""
        return _is_of_package(each) and each.name == self.package

    def _name_of_package(self) -> str:
        """What the module calls the new package already, or can call it without a clash."""
        imported, taken = [], set(self.scopes.redirected)
        for scope in self.scopes.all:
            for name, binders in scope.bound.items():
                if scope.kind == "class" or not all(map(_is_of_package, binders)):
                    taken.add(name)
                elif scope.kind == "module":
                    imported.append(name)
        read = {(use.context.scope, use.node.id) for use in self.scopes.uses}
        taken |= {name for scope, name in read if not binders_of(scope, name)}
        others = (NEW_PACKAGE + "_" * count for count in itertools.count())
        return next(name for name in itertools.chain(imported, others) if name not in taken)

    def _is_clear(self, each: Import) -> bool:
        """Whether the name of an import is one part of TensorFlow Addons wherever it is bound."""
        meanings = {_meaning(other) for other in each.scope.bound[each.name]}
        is_attribute = each.scope.kind == "class"
        is_redirected = each.name in self.scopes.redirected
        return not is_attribute and not is_redirected and meanings == {_meaning(each)}

    def _is_where_it_says(self, use: Use, written: list[str]) -> bool:
        """Whether a name can be rewritten, and no f"{x=}" prints it.

        Before Python 3.12 not all places in f-strings are true.
        """
        nodes = [use.node, *use.attributes]
        is_shown = re.search(rf"\b{use.node.id}\b", use.context.shown)
        return not is_shown and all(map(self._lines.ends_with, nodes, written))

    def _refer(self, use: Use, written: list[str], is_whole: bool) -> None:
        """Decide what becomes of a name that is read."""
        binders = binders_of(use.context.scope, written[0])
        old = self._old.intersection(binders)
        if all(map(is_of_class, old)):
            return  # Of something else, or a class by the name of its import, which decides.
        if not old.issuperset(binders) or old & self._unclear:
            self._leave(use, ".".join(written), old)
            return
        path = below_old(binders[0].stands_for)
        known = None
        for attribute in written[1:]:
            path = _joined(path, attribute)
            known = names.successor(path)
            if known is not None:
                break
        if known is None:
            known = _AS_VALUE if path in names.MODULES else _UNKNOWN
        elif known.is_ours and is_whole:
            self._candidates.append((use, path, binders))
            return
        elif known.is_ours:
            known = known._replace(note=_IN_A_STRING)
        self.needed |= old
        self._remains(use.node, path, known)

    def _leave(self, use: Use, written: str, old: Iterable[Import]) -> None:
        self.needed.update(old)
        self._add(self.remaining, use.node, written, _UNCLEAR)

    def _read_string(self, node: ast.Constant) -> None:
        """Look for names in a string: of a module, a registered class, the distribution."""
        root, _, rest = node.value.partition(".")
        if _DOTTED.fullmatch(node.value):
            named = {each for each in self._old if each.name == root and not is_of_class(each)}
            self.needed |= named  # as of __all__, or of globals()
            full = min((_joined(each.stands_for, rest) for each in named), default=node.value)
            if (path := below_old(full)) is not None:
                known = names.successor(path) or Successor(None)
                self._remains(node, path, known._replace(note=known.note or _IN_A_STRING))
        elif node.value.startswith(names.REGISTERED):
            known = names.registered(node.value.removeprefix(names.REGISTERED))
            if known is not None and not known.is_ours:
                self._add(self.remaining, node, node.value, known)
        elif REQUIREMENT.fullmatch(node.value):
            self._add(self.remaining, node, node.value, Successor(NEW_PACKAGE, _IN_A_STRING))

    def _move_uses(self) -> None:
        """Move the names that find the new package exactly where they find the old one."""
        ours = [each for each in self.scopes.imports if self.binds_package(each)]
        own = {each.scope for each in ours}
        read = [use for use in self.scopes.uses if use.node.id == self.package]
        read += [
            string
            for string in self.scopes.strings
            if string.context.is_annotation and self.package in string.node.value
        ]
        while True:
            moving = {each for *_, binders in self._candidates for each in binders}
            moving |= {each for each in self._old if self._is_registering(each)}
            homes = own | {each.scope for each in moving}
            hiding = {
                found
                for use, _, (first, *_) in self._candidates
                for found in lookup(use.context.scope, homes.__contains__)
                if found is not first.scope
            }
            for use in read:
                found = lookup(use.context.scope, homes.__contains__)
                if found != lookup(use.context.scope, own.__contains__) or not (
                    any(each.scope in found and _is_bound(each, use) for each in ours)
                ):
                    hiding.update(found)
            # An import in a function makes the name local to it, for all that the function reads.
            stuck = {each for each in moving if each.scope in hiding}
            if not stuck:
                break
            self._unclear |= stuck
            for use, path, binders in self._candidates:
                if stuck.intersection(binders):
                    self._leave(use, _joined(OLD_PACKAGE, path), binders)
            self._candidates = [each for each in self._candidates if not stuck & set(each[2])]
        # Where several names become one, that one may be bound while one of them is not.
        named = {(each.scope, each.name) for each in moving} | {(scope, None) for scope in own}
        names_in = collections.Counter(scope for scope, _ in named)
        for use, path, binders in self._candidates:
            home = binders[0].scope
            is_bound = names_in[home] == 1 or any(_is_bound(each, use) for each in binders)
            if is_bound and lookup(use.context.scope, homes.__contains__) == [home]:
                known = names.successor(path)
                self.moved_uses[use] = known.name.removeprefix(f"{NEW_PACKAGE}.")
                self.moved.update(binders)
                self._add(self.changes, use.node, _joined(OLD_PACKAGE, path), known)
            else:
                self._leave(use, _joined(OLD_PACKAGE, path), binders)

    def _is_registering(self, each: Import) -> bool:
        """Whether an import that nothing refers to is there to register layers."""
        is_unused = each not in self.needed and each not in self._unclear
        return is_unused and below_old(each.path) in names.REGISTERING_MODULES

    def _move_imports(self) -> None:
        """Decide what becomes of the imports, now that their uses are known."""
        for star in self.scopes.stars:
            if star.level == 0 and (path := below_old(star.module)) is not None:
                known = Successor(None, "import what is used by its name")
                self._remains(star, _joined(path, "*"), known)
        for each in self.scopes.imports:
            path = below_old(each.path)
            known = None if path is None else names.successor(path)
            if path is None or (known is None and each in self.needed):
                continue
            if each in self._unclear:
                known = known if known is not None and not known.is_ours else _UNCLEAR
            elif known is None and (each in self.moved or self._is_registering(each)):
                known = Successor(NEW_PACKAGE)
            known = known or _UNUSED
            if known.is_ours or known.name == NEW_PACKAGE:
                self.moved.add(each)
                self._add(self.changes, each.alias, _joined(OLD_PACKAGE, path), known)
            else:
                self.needed.add(each)
                self._remains(each.alias, path, known)

    def _remains(self, node: ast.AST, path: str, known: Successor) -> None:
        self._add(self.remaining, node, _joined(OLD_PACKAGE, path), known)

    def _add(self, findings: list[Finding], node: ast.AST, old: str, known: Successor) -> None:
        findings.append(Finding(*self._lines.position(node), old, known.name, known.note))


def below_old(dotted: str) -> str | None:
    """The path below the old package of a dotted name; None outside of it."""
    package, _, path = dotted.partition(".")
    return path if package == OLD_PACKAGE else None


def _joined(*parts: str) -> str:
    return ".".join(filter(None, parts))


def _is_bound(each: Import, use: Use) -> bool:
    """Whether an import has run whenever a name is read; nobody reads one in a string so soon."""
    return isinstance(use.node, ast.Constant) or each.place.precedes(use.context.place)


def binders_of(scope: Scope, name: str) -> list[Import | None]:
    """All that may have bound a name as `scope` reads it."""
    found = lookup(scope, lambda each: name in each.bound)
    return [binder for each in found for binder in each.bound[name]]


def is_of_class(each: Import) -> bool:
    """Whether an import of the old package binds what is no module."""
    return names.successor(below_old(each.stands_for)) is not None


def _is_of_package(each: Import | None) -> bool:
    """Whether what an import binds is the new package: `import normwise.layers` does so, too."""
    return each is not None and each.stands_for == NEW_PACKAGE


def _meaning(binder: Import | None) -> str | None:
    """What a name stands for by what binds it; one name for a class in all modules that have it."""
    path = None if binder is None else below_old(binder.stands_for)
    known = None if path is None else names.successor(path)
    return known.name if known is not None and known.is_ours else path
