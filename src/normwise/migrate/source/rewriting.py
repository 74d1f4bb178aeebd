"""Python source that uses TensorFlow Addons, rewritten to use normwise where normwise has the name.

A name is followed from its import to its uses in CPython's own tree, and replaced where it stands;
what is not about TensorFlow Addons comes out as it went in.
"""

import ast
import bisect
import contextlib
import dataclasses
import warnings
from collections.abc import Sequence

from normwise.migrate.source.edits import Edits
from normwise.migrate.source.keras3 import find_hints
from normwise.migrate.source.references import Finding, Lines, References


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """Source, rewritten.

    Args:
        text: the new text; the old one itself where nothing moved.
        changes: what moved.
        remaining: what did not.
        hints: what Keras 3 refuses, whether TensorFlow Addons was there or not.
    """

    text: str
    changes: tuple[Finding, ...]
    remaining: tuple[Finding, ...]
    hints: tuple[Finding, ...] = ()


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
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    parse(text.removeprefix(mark))
    done = rewrite_cells(text.removeprefix(mark), cell_starts=(1,))
    if done.changes:
        parse(done.text)
    return dataclasses.replace(done, text=mark + done.text)


def rewrite_cells(text: str, cell_starts: Sequence[int]) -> Rewritten:
    """`rewrite_source` of text whose parts run one by one, each with imports of its own.

    Args:
        text: the parts, one after the other, each of which is known to be Python.
        cell_starts: the line of each part's beginning, in order.
    """
    lines = Lines(text)
    references = References(lines, _compiled(text, ast.PyCF_ONLY_AST))
    if references.changes:
        new = Edits(lines, references, cell_starts).rewritten()
        again = References(Lines(new), _compiled(new, ast.PyCF_ONLY_AST)).changes
        if again:
            raise ValueError(
                f"line {again[0].line} of the result: {again[0].old} would move only in a second "
                "run; move it by hand"
            )
        text = new
    hints = find_hints(references.scopes, lines)
    findings = (references.changes, references.remaining, hints)
    return Rewritten(text, *map(in_order, findings))


def parse(text: str) -> None:
    """Compile Python source, which may await at its top as cells do, and forget the code.

    Raises:
        ValueError: it is no Python.
    """
    try:
        _compiled(text, ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    except SyntaxError as error:
        line = error.lineno or text.count("\n", 0, text.find("\0")) + 1
        reason = f"no Python 3: {error.msg}; correct it first"
    except UnicodeEncodeError as error:
        line = text.count("\n", 0, error.start) + 1
        reason = f"{error.object[error.start]!a} is half a character; write it as an escape"
    except (RecursionError, MemoryError):
        lines = text.splitlines(keepends=True)
        starts = range(1, len(lines))
        # Of an expression over several lines the last one counts, which completes it.
        line = bisect.bisect(starts, False, key=lambda n: _is_too_deep("".join(lines[:n]))) + 1
        reason = "nested too deeply for Python to compile it; divide it first"
    else:
        return
    raise ValueError(f"line {line}: {reason}")


def _is_too_deep(text: str) -> bool:
    with contextlib.suppress(SyntaxError):
        try:
            _compiled(text, ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        except (RecursionError, MemoryError):
            return True
    return False


def _compiled(text: str, flags: int):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is odd in the source
        return compile(text, "source", "exec", flags, dont_inherit=True)


def in_order(findings: list[Finding]) -> tuple[Finding, ...]:
    """Findings as they stand in a script, or in the cells of a notebook."""
    return tuple(sorted(findings, key=lambda each: (each.cell, each.line, each.column)))
