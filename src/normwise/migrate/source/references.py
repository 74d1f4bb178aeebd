"""Where source names TensorFlow Addons, and what is to become of each place."""

import bisect
import dataclasses
import re
from collections.abc import Sequence

import libcst as cst
from libcst import helpers, matchers, metadata

from normwise.migrate.source import names
from normwise.migrate.source.names import NEW_PACKAGE, OLD_PACKAGE

# A requirement of pip, with its extras and its versions; no import.
_VERSION = r"\s*(?:[=!<>~]=|[<>])\s*\d[\w.*]*"
REQUIREMENT = re.compile(
    rf"(?<!import )(?<!from )\btensorflow[-_.]addons\b(?!\.)(?:\[[^]]*\])?"
    rf"(?:{_VERSION}(?:\s*,{_VERSION})*)?"
)
_DOTTED = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
_UNCLEAR = "it may be something else here; move it by hand"
_AS_VALUE = f"name what is taken from it, as {NEW_PACKAGE}.layers.GroupNormalization"
_UNKNOWN = "no name of TensorFlow Addons 0.23"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One place where source names TensorFlow Addons.

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


@dataclasses.dataclass
class Binding:
    """A name that an import binds to TensorFlow Addons or a part of it, and what became of it.

    Args:
        statement: the import.
        name: as the code below the import says it.
        path: what is imported, below the old package; "" is the package itself.
        stands_for: what the name stands for; `import a.b` imports a.b, and binds a.
        position: line and column.
        is_moved: whether a use of it was rewritten, so that the new package must be imported.
        is_needed: whether a use of it was not, so that the old one must.
    """

    statement: cst.Import | cst.ImportFrom
    name: str
    path: str
    stands_for: str
    position: tuple[int, int]
    is_moved: bool = False
    is_needed: bool = False


class References(cst.CSTVisitor):
    """Finds every name of TensorFlow Addons, and decides what becomes of it."""

    METADATA_DEPENDENCIES = (
        metadata.ExpressionContextProvider,
        metadata.PositionProvider,
        metadata.ScopeProvider,
    )

    def __init__(self, cell_starts: Sequence[int]):
        super().__init__()
        self.changes: list[Finding] = []
        self.remaining: list[Finding] = []
        self.bindings: dict[cst.ImportAlias, Binding] = {}
        # What to rewrite, and its path below the new package.
        self.references: dict[cst.Attribute | cst.SimpleString, str] = {}
        self.cells: dict[cst.Import | cst.ImportFrom, int] = {}
        self._cell_starts = cell_starts
        self._redirected: set[str] = set()
        self._annotations = 0

    def visit_Module(self, node: cst.Module) -> None:
        """Note every import, for a function may use one that stands below it."""
        for item in matchers.findall(node, matchers.NameItem()):
            self._redirected.add(item.name.value)  # by `global` or `nonlocal`
        for statement in matchers.findall(node, matchers.Import() | matchers.ImportFrom()):
            self.cells[statement] = bisect.bisect(self._cell_starts, self._position(statement)[0])
            for alias, path in old_imports(statement):
                is_package = isinstance(alias.name, cst.Attribute) and alias.asname is None
                self.bindings[alias] = Binding(
                    statement=statement,
                    name=bound_name(alias),
                    path=path,
                    stands_for="" if is_package else path,
                    position=self._position(alias),
                )

    def leave_Module(self, original_node: cst.Module) -> None:
        """Decide what becomes of the imports, now that their uses are known."""
        for binding in self.bindings.values():
            known = names.successor(binding.path)
            if known is not None and known.is_ours:
                binding.is_moved = True
                self._moved(binding.position, binding.path, known)
            elif known is not None:
                binding.is_needed = True
                self._remains(binding.position, binding.path, known)
            elif binding.is_needed:
                continue
            elif not self._is_clear(binding):
                binding.is_needed = True
                unclear = names.Successor(None, _UNCLEAR)
                self._remains(binding.position, binding.path, unclear)
            elif binding.is_moved or binding.path in names.REGISTERING_MODULES:
                binding.is_moved = True
                self._moved(binding.position, binding.path, names.Successor(NEW_PACKAGE))
            else:
                binding.is_needed = True
                unused = names.Successor(None, "nothing here uses it; remove the import")
                self._remains(binding.position, binding.path, unused)

    def visit_Import(self, node: cst.Import) -> bool:
        """Leave what an import names to `leave_Module`."""
        return False

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        """Leave what an import names to `leave_Module`; an import of everything names nothing."""
        path = _path_below(_module_of(node) or "")
        if path is not None and isinstance(node.names, cst.ImportStar):
            star = names.Successor(None, "import what is used by its name")
            self._remains(self._position(node), f"{path}.*".lstrip("."), star)
        return False

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        """Follow a chain of attributes that begins with a name; look into any other."""
        chain = chain_of(node)
        if chain:
            self._refer(*chain)
        else:
            node.value.visit(self)
        return False

    def visit_Name(self, node: cst.Name) -> None:
        """Follow a name that stands by itself."""
        self._refer(node)

    def visit_Annotation(self, node: cst.Annotation) -> None:
        """From here on a string is source."""
        self._annotations += 1

    def leave_Annotation(self, original_node: cst.Annotation) -> None:
        """From here on a string is a string."""
        self._annotations -= 1

    def visit_SimpleString(self, node: cst.SimpleString) -> None:
        """Look for names in strings: of a module, of a registered class, of the distribution."""
        value = node.evaluated_value
        if not isinstance(value, str):
            return
        by_hand = "in a string; edit it by hand"
        if self._annotations:
            for found in _DOTTED.finditer(value):
                self._refer_in_annotation(node, found[0], is_all=found[0] == value)
        elif _DOTTED.fullmatch(value) and (path := _path_below(value)) is not None:
            known = names.successor(path) or names.Successor(None)
            self._remains(self._position(node), path, known._replace(note=known.note or by_hand))
        elif value.startswith(names.REGISTERED):
            known = names.registered(value.removeprefix(names.REGISTERED))
            if known is not None and not known.is_ours:
                self._add(self.remaining, self._position(node), value, known)
        elif REQUIREMENT.fullmatch(value):
            new = names.Successor(NEW_PACKAGE, by_hand)
            self._add(self.remaining, self._position(node), value, new)

    def _refer(self, root: cst.Name, *attributes: cst.Attribute) -> None:
        context = self.get_metadata(metadata.ExpressionContextProvider, root, None)
        if context in (None, metadata.ExpressionContext.STORE):
            return
        bindings = self._bindings_of(root.value, root)
        if not bindings:
            return
        position = self._position(root)
        if (path := self._stands_for(root.value, root, bindings)) is None:
            for binding in bindings:
                binding.is_needed = True
            written = ".".join([root.value, *(node.attr.value for node in attributes)])
            self._add(self.remaining, position, written, names.Successor(None, _UNCLEAR))
            return
        known = names.successor(path)
        if known is not None:
            return  # A class by the name that it was imported under: that import decides.
        for node in attributes:
            path = f"{path}.{node.attr.value}".lstrip(".")
            known = names.successor(path)
            if known is not None:
                break
        if known is None:
            known = names.Successor(None, _AS_VALUE if path in names.MODULES else _UNKNOWN)
        last = node if attributes else root
        self._decide(last, position, path, known, bindings, known.is_ours)

    def _refer_in_annotation(self, node: cst.SimpleString, dotted: str, is_all: bool) -> None:
        root, *attributes = dotted.split(".")
        bindings = self._bindings_of(root, node)
        path = self._stands_for(root, node, bindings) if bindings else None
        if path is None or names.successor(path) is not None:
            return
        path = ".".join([*filter(None, [path]), *attributes])
        known = names.successor(path) or names.Successor(None, _UNKNOWN)
        if known.is_ours and not is_all:
            known = known._replace(note="in a string; edit it by hand")
        self._decide(node, self._position(node), path, known, bindings, is_all and known.is_ours)

    def _decide(self, node, position, path, known, bindings, moves) -> None:
        if moves:
            self.references[node] = known.name.removeprefix(f"{NEW_PACKAGE}.")
            self._moved(position, path, known)
        else:
            self._remains(position, path, known)
        for binding in bindings:
            binding.is_moved |= moves
            binding.is_needed |= not moves

    def _bindings_of(self, name: str, node: cst.CSTNode) -> list[Binding]:
        """The imports of TensorFlow Addons that may have bound a name, as `node` sees it."""
        assigned = self._assignments(name, node)
        statements = {each.node for each in assigned}
        return [
            self.bindings[alias]
            for statement in statements
            if isinstance(statement, cst.Import | cst.ImportFrom)
            for alias, _ in old_imports(statement)
            if self.bindings[alias].name == name
        ]

    def _stands_for(self, name: str, node: cst.CSTNode, bindings: list[Binding]) -> str | None:
        """The path below the old package that a name stands for; None where that is not clear."""
        paths = {binding.stands_for for binding in bindings}
        others = {
            each
            for each in self._assignments(name, node)
            if not isinstance(each, metadata.ImportAssignment) or not old_imports(each.node)
        }
        is_clear = len(paths) == 1 and not others and name not in self._redirected
        return paths.pop() if is_clear else None

    def _is_clear(self, binding: Binding) -> bool:
        bindings = self._bindings_of(binding.name, binding.statement)
        return self._stands_for(binding.name, binding.statement, bindings) is not None

    def _assignments(self, name: str, node: cst.CSTNode) -> list[metadata.Assignment]:
        scope = self.get_metadata(metadata.ScopeProvider, node, None)
        found = scope[name] if scope is not None else ()
        return [each for each in found if isinstance(each, metadata.Assignment)]  # no builtin

    def _moved(self, position: tuple[int, int], path: str, known: names.Successor) -> None:
        self._add(self.changes, position, _below(OLD_PACKAGE, path), known)

    def _remains(self, position: tuple[int, int], path: str, known: names.Successor) -> None:
        self._add(self.remaining, position, _below(OLD_PACKAGE, path), known)

    def _add(self, findings: list[Finding], position, old: str, known: names.Successor) -> None:
        findings.append(Finding(*position, old, known.name, known.note))

    def _position(self, node: cst.CSTNode) -> tuple[int, int]:
        start = self.get_metadata(metadata.PositionProvider, node).start
        return start.line, start.column + 1


def old_imports(statement: cst.Import | cst.ImportFrom) -> list[tuple[cst.ImportAlias, str]]:
    """What a statement imports of TensorFlow Addons, each with its path below the package."""
    module = _module_of(statement) if isinstance(statement, cst.ImportFrom) else ""
    if module is None or isinstance(statement.names, cst.ImportStar):
        return []
    paths = {alias: _path_below(_below(module, alias.evaluated_name)) for alias in statement.names}
    return [(alias, path) for alias, path in paths.items() if path is not None]


def bound_name(alias: cst.ImportAlias) -> str:
    """The name that an import binds."""
    return alias.evaluated_alias or alias.evaluated_name.partition(".")[0]


def chain_of(node: cst.BaseExpression) -> list[cst.Name | cst.Attribute]:
    """The nodes of `a.b.c` from a to c; none if it does not begin with a name."""
    chain = [node]
    while isinstance(node, cst.Attribute):
        node = node.value
        chain.append(node)
    return chain[::-1] if isinstance(node, cst.Name) else []


def _module_of(statement: cst.ImportFrom) -> str | None:
    """The module of `from module import ...`; None for a relative one, which is not the package."""
    return None if statement.relative else helpers.get_full_name_for_node(statement.module)


def _path_below(dotted: str) -> str | None:
    """The path below the old package of a dotted name; None outside of it."""
    package, _, path = dotted.partition(".")
    return path if package == OLD_PACKAGE else None


def _below(package: str, path: str) -> str:
    return ".".join(filter(None, [package, path]))
