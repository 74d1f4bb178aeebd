"""Who binds a name and who reads it: the scopes of Python source, as CPython makes them."""

import ast
import collections
import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_LEAVES_ITS_BLOCK = (ast.Raise, ast.Return, ast.Continue, ast.Break)
# Strings in an annotation that are values all the same.
_LITERALS = ("Annotated", "Literal")


@dataclasses.dataclass(eq=False)
class Scope:
    """A part of a module with names of its own."""

    kind: str  # "module", "class", "function", "comprehension", or "types" around type parameters
    parent: "Scope | None"
    # What binds each name here: imports, and None for anything else.
    bound: dict[str, list["Import | None"]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(list)
    )


@dataclasses.dataclass(eq=False)
class Place:
    """Where a statement stands."""

    statements: list[ast.stmt]
    block: int  # names the list; the `else` of a `try` continues the block of its body
    index: int
    outer: "Place | None"  # of the statement around the list; None around the module's
    falls_through: bool  # whether what follows `outer` runs only once the block ran to its end

    def precedes(self, other: "Place | None") -> bool:
        """Whether `other` runs only after this statement has run without an exception."""
        first, place = self, other
        while place is not None and place.block != first.block:
            place = place.outer
        if place is not None and place.index > first.index:
            return True
        return first.falls_through and first.outer is not None and first.outer.precedes(other)


@dataclasses.dataclass(eq=False)
class Import:
    """A name that an import binds."""

    statement: ast.Import | ast.ImportFrom
    alias: ast.alias
    name: str  # as the code below says it
    path: str  # what is imported, in full
    stands_for: str  # what the name stands for; `import a.b` imports a.b, and binds a
    scope: Scope
    place: Place


class Context(NamedTuple):
    """What a node stands in."""

    scope: Scope
    place: Place | None = None
    is_annotation: bool = False  # where a string is source
    is_method: bool = False
    shown: str = ""  # what an f-string prints of its own source, as `x=` of f"{x=}"


class Use(NamedTuple):
    """A name that is read, with the attributes after it; or a string."""

    node: ast.Name | ast.Constant
    attributes: tuple[ast.Attribute, ...]
    context: Context


_Nodes = Iterator[tuple[ast.AST, Context]]


class Scopes:
    """Every import, use and string of a module, found without recursion."""

    def __init__(self, tree: ast.Module):
        self.imports: list[Import] = []
        self.stars: list[ast.ImportFrom] = []
        self.uses: list[Use] = []
        self.strings: list[Use] = []
        self.all: list[Scope] = []
        # By `global` or `nonlocal`, or in a class, which changes names like __x.
        self.redirected: set[str] = set()
        self._elsewhere: list[tuple[Scope, str, bool]] = []
        todo: list[tuple[ast.AST, Context]] = [(tree, Context(self._scope("module", None)))]
        while todo:
            node, here = todo.pop()
            todo.extend(self._visit(node, here))
        for scope, name, is_global in self._elsewhere:
            binders = scope.bound.pop(name, [])
            found = [] if is_global else lookup(scope, lambda each, name=name: name in each.bound)
            (found or self.all)[0].bound[name] += binders

    def _scope(self, kind: str, parent: Scope | None) -> Scope:
        self.all.append(Scope(kind, parent))
        return self.all[-1]

    def _bind(self, name: str, scope: Scope, binder: Import | None = None) -> None:
        scope.bound[name].append(binder)
        if name.startswith("__") and not name.endswith("__"):
            self.redirected.add(name)

    def _visit(self, node: ast.AST, here: Context) -> _Nodes:
        """What a node binds and reads is noted, and what is in it comes back with its context."""
        for field in ("name", "rest", "arg"):  # of functions, patterns, handlers, parameters
            name = getattr(node, field, None)
            if isinstance(name, str) and not isinstance(node, ast.keyword):
                self._bind(name, here.scope)
        match node:
            case ast.Import() | ast.ImportFrom():
                self._import(node, here)
            case ast.Global() | ast.Nonlocal():
                self.redirected.update(node.names)
                is_global = isinstance(node, ast.Global)
                self._elsewhere += ((here.scope, name, is_global) for name in node.names)
            case ast.Name(ctx=ast.Store() | ast.Del()):
                self._bind(node.id, here.scope)
            case ast.Name() | ast.Attribute():
                yield from self._read(node, here)
            case ast.Constant(value=str()):
                self.strings.append(Use(node, (), here))
            case ast.JoinedStr():
                yield from _shown(node, here)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                yield from self._function(node, here)
            case ast.ClassDef():
                yield from ((each, here) for each in node.decorator_list)
                outer = yield from self._type_parameters(node, here)
                yield from ((each, outer) for each in [*node.bases, *node.keywords])
                inner = here._replace(scope=self._scope("class", outer.scope), is_method=False)
                yield from _block(node.body, inner)
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                inner = here._replace(scope=self._scope("comprehension", here.scope))
                first, *others = node.generators
                yield first.iter, here
                yield from ((each, inner) for each in [first.target, *first.ifs, *others])
                yield from _fields(node, inner, without="generators")
            case ast.NamedExpr():
                scope = here.scope
                while scope.kind == "comprehension":
                    scope = scope.parent
                yield node.target, here._replace(scope=scope)
                yield node.value, here
            case ast.AugAssign(target=ast.Name() as target):  # which is read, too
                self.uses.append(Use(target, (), here))
                yield from _fields(node, here)
            case ast.Try() | ast.TryStar():
                falls = all(isinstance(each.body[-1], _LEAVES_ITS_BLOCK) for each in node.handlers)
                yield from _block(node.body, here, falls_through=falls)
                yield from _block(node.orelse, here, before=node.body, falls_through=falls)
                yield from ((each, here) for each in node.handlers)
                yield from _block(node.finalbody, here)
            case _ if hasattr(node, "type_params"):  # of `type X[T] = ...`
                yield node.name, here
                inner = yield from self._type_parameters(node, here)
                yield node.value, inner
            case _:
                yield from _fields(node, here)

    def _import(self, node: ast.Import | ast.ImportFrom, here: Context) -> None:
        module = "." * node.level + (node.module or "") if isinstance(node, ast.ImportFrom) else ""
        for alias in node.names:
            if alias.name == "*":
                self.stars.append(node)
                continue
            first = alias.name.partition(".")[0]
            path = ".".join(filter(None, [module, alias.name]))
            stands_for = path if alias.asname or module else first
            name = alias.asname or first
            bound = Import(node, alias, name, path, stands_for, here.scope, here.place)
            self.imports.append(bound)
            self._bind(name, here.scope, bound)

    def _read(self, node: ast.Name | ast.Attribute, here: Context) -> _Nodes:
        attributes = []
        while isinstance(node, ast.Attribute):
            attributes.append(node)
            node = node.value
        if isinstance(node, ast.Name):
            self.uses.append(Use(node, tuple(attributes[::-1]), here))
        else:
            yield node, here

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda, here) -> _Nodes:
        outer = here
        if not isinstance(node, ast.Lambda):
            yield from ((each, here) for each in node.decorator_list)
            outer = yield from self._type_parameters(node, here)
            if node.returns is not None:
                yield node.returns, outer._replace(is_annotation=True)
        is_method = here.is_method or here.scope.kind == "class"
        inner = here._replace(scope=self._scope("function", outer.scope), is_method=is_method)
        for name, each in ast.iter_fields(node.args):
            if name in ("defaults", "kw_defaults"):
                yield from ((default, here) for default in each if default is not None)
                continue
            for argument in each if isinstance(each, list) else filter(None, [each]):
                self._bind(argument.arg, inner.scope)
                if argument.annotation is not None:
                    yield argument.annotation, outer._replace(is_annotation=True)
        if isinstance(node, ast.Lambda):
            yield node.body, inner
        else:
            yield from _block(node.body, inner)

    def _type_parameters(self, node: ast.AST, here: Context) -> Generator:
        """The scope that the type parameters of a class, function or alias make, if it has any."""
        parameters = getattr(node, "type_params", [])
        is_alias = not hasattr(node, "body")
        if parameters or is_alias:
            here = here._replace(scope=self._scope("types", here.scope))
            yield from ((each, here) for each in parameters)
        return here


def lookup(scope: Scope, is_bound: Callable[[Scope], bool]) -> list[Scope]:
    """The scopes that a name may come from as `scope` reads it, of those that `is_bound` knows."""
    found: list[Scope] = []
    inner, each = None, scope
    while each is not None:
        # A class shows its names to itself and to the scope of its type parameters, no further.
        is_seen = each.kind != "class" or inner is None or inner.kind == "types"
        if is_seen and is_bound(each):
            found.append(each)
            if each.kind != "class":  # where a name may not be bound yet, and comes from outside
                break
        inner, each = each, each.parent
    return found


def _block(statements, here: Context, *, before=(), falls_through: bool = False) -> _Nodes:
    block = id(before or statements)
    for index, each in enumerate(statements, start=len(before)):
        place = Place(statements, block, index, here.place, falls_through)
        yield each, here._replace(place=place)


def _fields(node: ast.AST, here: Context, without: str = "") -> _Nodes:
    if isinstance(node, ast.Call) or _is_literal(node):
        here = here._replace(is_annotation=False)
    for name, value in ast.iter_fields(node):
        inner = here._replace(is_annotation=True) if name == "annotation" else here
        values = value if isinstance(value, list) else [value]
        if values and isinstance(values[0], ast.stmt):
            yield from _block(values, here)
        elif name != without:
            yield from ((each, inner) for each in values if isinstance(each, ast.AST))


def _is_literal(node: ast.AST) -> bool:
    """Whether a node is like Literal["x"], whose string is a value in an annotation, too."""
    value = getattr(node, "value", None) if isinstance(node, ast.Subscript) else None
    return getattr(value, "attr", getattr(value, "id", None)) in _LITERALS


def _shown(node: ast.JoinedStr, here: Context) -> _Nodes:
    """The values of an f-string, each with the text before it if that ends as of f"{x=}"."""
    for before, value in itertools.pairwise([None, *node.values]):
        if isinstance(value, ast.FormattedValue):
            text = before.value if isinstance(before, ast.Constant) else ""
            shown = text if text.rstrip().endswith("=") else here.shown
            yield value, here._replace(shown=shown)
