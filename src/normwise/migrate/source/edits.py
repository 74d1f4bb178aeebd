"""The source without TensorFlow Addons: imports and references, as `References` decided."""

import itertools
from collections.abc import Iterable, Sequence

import libcst as cst
from libcst import metadata

from normwise.migrate.source import names
from normwise.migrate.source.names import NEW_PACKAGE
from normwise.migrate.source.references import References, bound_name, chain_of, old_imports


class Edits(cst.CSTTransformer):
    """Changes what a `References` decided."""

    def __init__(self, references: References, package: str):
        super().__init__()
        self._references = references
        self._package = package
        # For each block around a statement, the cells where it has imported the new package.
        self._imported: list[set[int]] = []

    def visit_Module(self, node: cst.Module) -> None:
        """Enter the outermost block."""
        self._enter(node.body)

    def visit_IndentedBlock(self, node: cst.IndentedBlock) -> None:
        """Enter a block."""
        self._enter(node.body)

    def visit_SimpleStatementSuite(self, node: cst.SimpleStatementSuite) -> None:
        """Enter a block that stands on the line of its header."""
        self._imported.append(set())

    def leave_Module(self, original_node: cst.Module, updated_node: cst.Module):
        """Leave the outermost block."""
        self._imported.pop()
        return updated_node

    def leave_IndentedBlock(self, original_node, updated_node):
        """Leave a block."""
        self._imported.pop()
        return updated_node

    def leave_SimpleStatementSuite(self, original_node, updated_node):
        """Replace the imports in a block that stands on the line of its header."""
        body = self._small_statements(original_node, updated_node)
        self._imported.pop()
        return updated_node if body is None else updated_node.with_changes(body=body)

    def leave_SimpleStatementLine(self, original_node, updated_node):
        """Replace the imports of a line; one import that becomes several has a line for each."""
        body = self._small_statements(original_node, updated_node)
        if body is None:
            return updated_node
        if not body and not _has_comment(original_node):
            return cst.RemovalSentinel.REMOVE
        if not body:
            body = [self._import_of_package()]
        if len(original_node.body) > 1 or len(body) == 1:
            return updated_node.with_changes(body=body)
        *new, last = ([each] for each in body)
        lines = [cst.SimpleStatementLine(each) for each in new]
        lines[0] = lines[0].with_changes(leading_lines=updated_node.leading_lines)
        return cst.FlattenSentinel([*lines, updated_node.with_changes(body=last, leading_lines=[])])

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute):
        """Rename a reference."""
        path = self._references.references.get(original_node)
        if path is None:
            return updated_node
        module, _ = path.split(".")
        root, *attributes = chain_of(updated_node)
        if attributes[0].attr.value == module:
            # Of a.layers.X only a differs, and the spaces around the dots stay.
            package = root.with_changes(value=self._package)
            value = attributes[0].with_changes(value=package)
        else:
            value = cst.Attribute(cst.Name(self._package), cst.Name(module))
        return updated_node.with_changes(value=value)

    def leave_SimpleString(self, original_node: cst.SimpleString, updated_node: cst.SimpleString):
        """Rename a reference in an annotation that is a string."""
        path = self._references.references.get(original_node)
        if path is None:
            return updated_node
        new = f"{updated_node.prefix}{updated_node.quote}{self._package}.{path}{updated_node.quote}"
        return updated_node.with_changes(value=new)

    def _enter(self, body: Sequence[cst.BaseStatement]) -> None:
        # An import of the new package that stands a little below is enough, too.
        imports = itertools.takewhile(_is_import_or_docstring, body)
        self._imported.append(
            {
                self._references.cells[statement]
                for line in imports
                for statement in line.body
                if _binds_package(statement, self._package)
            }
        )

    def _small_statements(self, original, updated) -> list[cst.BaseSmallStatement] | None:
        """The statements of a line, imports replaced; None if there is nothing to replace."""
        replaced = []
        is_changed = False
        for old, new in zip(original.body, updated.body, strict=True):
            if _binds_package(old, self._package):
                self._imported[-1].add(self._references.cells[old])
            if self._is_moved(old):
                is_changed = True
                group = self._replaced(old)
            else:
                group = [new]
            if group:
                group[-1] = group[-1].with_changes(semicolon=new.semicolon)
            replaced += group
        if replaced:
            replaced[-1] = replaced[-1].with_changes(semicolon=updated.body[-1].semicolon)
        return replaced if is_changed else None

    def _is_moved(self, statement: cst.BaseSmallStatement) -> bool:
        return isinstance(statement, cst.Import | cst.ImportFrom) and any(
            self._references.bindings[alias].is_moved for alias, _ in old_imports(statement)
        )

    def _replaced(self, statement: cst.Import | cst.ImportFrom) -> list[cst.BaseSmallStatement]:
        """The imports that take the place of one: of the package, of classes, and what is left."""
        old = {alias: self._references.bindings[alias] for alias, _ in old_imports(statement)}
        moved = {alias: names.successor(each.path) for alias, each in old.items() if each.is_moved}
        classes = [alias for alias, known in moved.items() if known is not None]
        kept = [alias for alias in statement.names if alias not in old or old[alias].is_needed]
        new = []
        cell = self._references.cells[statement]
        if len(moved) > len(classes) and cell not in self._imported[-1]:
            self._imported[-1].add(cell)
            new.append(self._import_of_package())
        if classes:
            home, _, _ = moved[classes[0]].name.rpartition(".")
            new.append(_only(statement, classes).with_changes(module=cst.parse_expression(home)))
        if kept:
            new.append(_only(statement, kept))
        return new

    def _import_of_package(self) -> cst.Import:
        renamed = self._package != NEW_PACKAGE
        asname = cst.AsName(cst.Name(self._package)) if renamed else None
        return cst.Import([cst.ImportAlias(cst.Name(NEW_PACKAGE), asname)])


def name_of_package(scopes: Iterable[metadata.Scope]) -> str:
    """What a module calls the new package already, or what it can call it without a clash."""
    imported, taken = [], set()
    for scope in scopes:
        for assignment in scope.assignments:
            if not _binds_package(assignment.node, assignment.name):
                taken.add(assignment.name)
            elif isinstance(scope, metadata.GlobalScope):
                imported.append(assignment.name)
    others = (NEW_PACKAGE + "_" * count for count in itertools.count())
    return next(name for name in itertools.chain(imported, others) if name not in taken)


def _binds_package(node: cst.CSTNode, name: str) -> bool:
    """Whether a statement imports the new package under a name."""
    return isinstance(node, cst.Import) and any(
        _is_of_package(alias) and bound_name(alias) == name for alias in node.names
    )


def _is_of_package(alias: cst.ImportAlias) -> bool:
    """Whether what `import` binds is the new package: `import normwise.layers` does so, too."""
    package, _, rest = alias.evaluated_name.partition(".")
    return package == NEW_PACKAGE and not (rest and alias.asname)


def _is_import_or_docstring(statement: cst.BaseStatement) -> bool:
    allowed = (cst.Import, cst.ImportFrom)
    return isinstance(statement, cst.SimpleStatementLine) and all(
        isinstance(each, allowed)
        or (isinstance(each, cst.Expr) and isinstance(each.value, cst.SimpleString))
        for each in statement.body
    )


def _has_comment(line: cst.SimpleStatementLine) -> bool:
    lines = [line.trailing_whitespace, *line.leading_lines]
    return any(each.comment is not None for each in lines)


def _only(statement: cst.Import | cst.ImportFrom, aliases: Sequence[cst.ImportAlias]):
    """An import with some of its names, each with its comment, in the layout that it has."""
    last = statement.names[-1]
    if aliases[-1] is last:
        return statement.with_changes(names=aliases)
    *others, end = aliases
    if isinstance(statement, cst.Import) or statement.lpar is None:
        return statement.with_changes(
            names=[*others, end.with_changes(comma=cst.MaybeSentinel.DEFAULT)]
        )
    has_comma = isinstance(last.comma, cst.Comma)
    closing = last.comma.whitespace_after if has_comma else statement.rpar.whitespace_before
    if not isinstance(closing, cst.ParenthesizedWhitespace):
        # On one line, unless a comment of its own ends the line.
        has_line = isinstance(end.comma.whitespace_after, cst.ParenthesizedWhitespace)
        keep = (
            end.comma if has_line and end.comma.whitespace_after.first_line.comment else last.comma
        )
        return statement.with_changes(names=[*others, end.with_changes(comma=keep)])
    own = end.comma.whitespace_after
    is_line = isinstance(own, cst.ParenthesizedWhitespace)
    first_line = own.first_line if is_line else closing.first_line.with_changes(comment=None)
    comma = end.comma.with_changes(whitespace_after=closing.with_changes(first_line=first_line))
    rpar = statement.rpar
    if not has_comma:
        rpar = rpar.with_changes(whitespace_before=cst.SimpleWhitespace(""))
    return statement.with_changes(names=[*others, end.with_changes(comma=comma)], rpar=rpar)
