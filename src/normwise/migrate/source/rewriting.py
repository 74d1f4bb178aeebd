"""Python source that uses TensorFlow Addons, rewritten to use normwise where normwise has the name.

A name is followed from its import to its uses by LibCST, whose tree keeps every space and comment;
what is not about TensorFlow Addons comes out as it went in.
"""

import ast
import dataclasses
from collections.abc import Sequence

try:
    import libcst as cst
except ImportError as error:
    raise ImportError(
        "rewriting source needs LibCST, which is not installed; run pip install 'normwise[migrate]'"
    ) from error
from libcst import metadata

from normwise.migrate.source.edits import Edits, name_of_package
from normwise.migrate.source.references import Finding, References

# Below the source while it is read: after its own last statement LibCST keeps neither all blank
# lines nor all comments (version 1.8; `test_the_layout_of_a_script_stays`).
_LAST_STATEMENT = "pass\n"


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """Source, rewritten.

    Args:
        text: the new text; the old one itself where nothing moved.
        changes: what moved.
        remaining: what did not.
    """

    text: str
    changes: tuple[Finding, ...]
    remaining: tuple[Finding, ...]


def rewrite_source(text: str) -> Rewritten:
    """Rewrite Python source from TensorFlow Addons to normwise.

    References through a module become `normwise.layers.X` and `normwise.rnn.X`, below `import
    normwise`, and so do the uses of an alias like `tfa`; a class that is imported by name keeps the
    name that it has in the file. An old import stays where something still needs it. Everything
    else, comments, quotes, line endings and a byte order mark with it, stays as it is. The result
    rewritten again is the result.

    Args:
        text: the source of a module.

    Returns:
        A Rewritten: the new text, what moved, and what remains, with what Keras 3 has for it.

    Raises:
        TypeError: text is no str.
        ValueError: text is no Python; the message has the line.

    Example:

    >>> import normwise
    >>> done = normwise.migrate.rewrite_source('''
    ... import tensorflow_addons as tfa
    ... norm = tfa.layers.GroupNormalization(groups=5, axis=3)  # of ten channels
    ... loss = tfa.losses.SigmoidFocalCrossEntropy()
    ... ''')
    >>> print(done.text)
    <BLANKLINE>
    import normwise
    import tensorflow_addons as tfa
    norm = normwise.layers.GroupNormalization(groups=5, axis=3)  # of ten channels
    loss = tfa.losses.SigmoidFocalCrossEntropy()
    <BLANKLINE>
    >>> [(found.line, found.new) for found in done.remaining]
    [(4, 'keras.losses.BinaryFocalCrossentropy')]
    """
    if not isinstance(text, str):
        raise TypeError(
            f"rewrite_source takes the source as a str, not {type(text).__name__}; "
            "decode it, as with tokenize.open"
        )
    return rewrite_cells(text, cell_starts=(1,))


def rewrite_cells(text: str, cell_starts: Sequence[int]) -> Rewritten:
    """`rewrite_source` of text whose parts run one by one, each with imports of its own.

    Args:
        text: the parts, one after the other.
        cell_starts: the line of each part's beginning, in order.
    """
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    source = text.removeprefix(mark)
    end = _LAST_STATEMENT if source.endswith("\n") or not source else f"\n{_LAST_STATEMENT}"
    module = metadata.MetadataWrapper(parse(source + end))
    _check_nothing_is_lost(source + end, module.module.code)
    references = References(cell_starts)
    module.visit(references)
    if references.changes:
        scopes = set(module.resolve(metadata.ScopeProvider).values()) - {None}
        rewritten = module.module.visit(Edits(references, name_of_package(scopes)))
        text = mark + rewritten.code.removesuffix(end)
    return Rewritten(text, in_order(references.changes), in_order(references.remaining))


def _check_nothing_is_lost(source: str, read: str) -> None:
    lines = zip(source.split("\n"), read.split("\n"), strict=False)
    for number, (line, kept) in enumerate(lines, start=1):
        if line != kept:
            raise ValueError(
                f"line {number}: LibCST loses a form feed or a backslash before a statement; "
                "remove it first"
            )


def parse(text: str) -> cst.Module:
    """The tree of Python source.

    Raises:
        ValueError: it is no Python.
    """
    try:
        return cst.parse_module(text)
    except cst.ParserSyntaxError as error:
        raise ValueError(f"{_what_is_wrong(text, error)}; correct it first") from error


def _what_is_wrong(text: str, error: cst.ParserSyntaxError) -> str:
    try:
        ast.parse(text)
    except SyntaxError as plain:  # In better words than the parser's.
        return f"line {plain.lineno}: no Python 3: {plain.msg}"
    return f"line {error.raw_line}: no Python that LibCST knows: {error.message}"


def in_order(findings: list[Finding]) -> tuple[Finding, ...]:
    """Findings as they stand in a script, or in the cells of a notebook."""
    return tuple(sorted(findings, key=lambda each: (each.cell, each.line, each.column)))
