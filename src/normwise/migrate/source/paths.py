"""Python files and notebooks, found in folders, rewritten, compared and written back whole."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import shutil
import tempfile
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from normwise.migrate.source.notebooks import rewrite_notebook
from normwise.migrate.source.references import Finding
from normwise.migrate.source.rewriting import Rewritten, rewrite_source

SUFFIXES = (".ipynb", ".py")
_OTHERS_FOLDERS = {"__pycache__", "node_modules", "site-packages"}
# A file that has none of these is not read further: it need not even be Python 3.
_MENTIONS = re.compile(rb"tensorflow[-_.]addons|Addons>")


@dataclasses.dataclass(frozen=True)
class Migrated:
    """A file and what it becomes.

    Args:
        path: of the file.
        encoding: of its text.
        old: its text.
        rewritten: its new text, and what was found in it.
    """

    path: Path
    encoding: str
    old: str
    rewritten: Rewritten

    @property
    def is_changed(self) -> bool:
        """Whether there is anything to write."""
        return self.rewritten.text != self.old

    def diff(self) -> bytes:
        """What changes, as `patch -p1` and `git apply` take it, in the encoding of the file."""
        name = _relative(self.path).as_posix().lstrip("/")
        old, new = map(_lines, (self.old, self.rewritten.text))
        lines = difflib.unified_diff(old, new, f"a/{name}", f"b/{name}")
        ended = (s if s.endswith("\n") else f"{s}\n\\ No newline at end of file\n" for s in lines)
        return "".join(ended).encode(self.encoding)

    def write(self) -> None:
        """Put the new text in the place of the old in one step, with the file's permissions."""
        target = self.path.resolve()  # the file that a link leads to, not the link
        with tempfile.TemporaryDirectory(prefix=".normwise-", dir=target.parent) as folder:
            written = Path(folder) / target.name
            written.write_bytes(self.rewritten.text.encode(self.encoding))
            shutil.copymode(target, written)
            written.replace(target)

    def where(self, finding: Finding) -> str:
        """The place of a finding, as an editor takes it; a notebook's cell by its number."""
        cell = "" if finding.cell is None else f"cell {finding.cell}:"
        return f"{_relative(self.path)}:{cell}{finding.line}:{finding.column}"


def migrate(path: Path) -> Migrated:
    """Read one file and rewrite it; nothing is written.

    Raises:
        ValueError: it is no Python file or notebook that can be read; the message names it.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    try:
        encoding = "utf-8" if path.suffix == ".ipynb" else _encoding(content)
        old = content.decode(encoding)
        if not _MENTIONS.search(content):
            rewritten = Rewritten(old, (), ())
        elif path.suffix == ".ipynb":
            rewritten = rewrite_notebook(old)
        else:
            rewritten = rewrite_source(old)
    except (ValueError, SyntaxError, LookupError) as error:
        raise ValueError(f"{_relative(path)}: {error}") from error
    return Migrated(path, encoding, old, rewritten)


def migrate_each(paths: Iterable[Path]) -> tuple[list[Migrated], list[str]]:
    """Every file that can be rewritten, and for each other one why it cannot."""
    migrated, errors = [], []
    for path in paths:
        try:
            migrated.append(migrate(path))
        except (ValueError, OSError) as error:
            errors.append(str(error))
    return migrated, errors


def find(paths: Iterable[Path]) -> list[Path]:
    """The Python files and notebooks among `paths` and in the folders among them, each once.

    Hidden folders, virtual environments and what is installed in them are nobody's source.

    Raises:
        ValueError: a path is neither a folder, nor a Python file or notebook.
    """
    found = {}
    for path in paths:
        if path.is_dir():
            files = sorted(_walk(path))
        elif not path.exists():
            raise ValueError(f"{path}: there is no such file or folder; check the name")
        elif path.suffix not in SUFFIXES:
            raise ValueError(f"{path} is no .py or .ipynb file; name such a file, or a folder")
        else:
            files = [path]
        found |= {file.resolve(): file for file in files if file.resolve() not in found}
    return list(found.values())


def write_each(migrated: Iterable[Migrated]) -> list[str]:
    """Write the files that change; for each that cannot be written, why."""
    errors = []
    for file in migrated:
        try:
            if file.is_changed:
                file.write()
        except OSError as error:
            errors.append(str(error))
    return errors


def print_diff(migrated: Sequence[Migrated]) -> None:
    """Print what changes, and apart from it, on standard error, what does not move."""
    typer.echo(b"".join(file.diff() for file in migrated if file.is_changed), nl=False)
    for file in migrated:
        for finding in file.rewritten.remaining:
            typer.echo(f"{file.where(finding)}: {finding.old}: {advice(finding)}", err=True)


def print_findings(migrated: Sequence[Migrated], *, is_written: bool) -> None:
    """Print what moves and what does not, and how many files that concerns.

    Once written, what remains is found anew, for its lines have moved.
    """
    moved = sum(len(file.rewritten.changes) for file in migrated)
    total = moved + sum(len(file.rewritten.remaining) for file in migrated)
    changed = sum(file.is_changed for file in migrated)
    if not total:
        typer.echo(f"Nothing of TensorFlow Addons is in {len(migrated)} files.")
        return
    left = [migrate(file.path) for file in migrated] if is_written else migrated
    Console().print(table(migrated, left))
    typer.echo(
        f"{moved} of {total} names were moved, in {changed} files."
        if is_written
        else f"{moved} of {total} names can be moved, in {changed} files: "
        "--diff shows how, --write does it."
    )


def table(migrated: Iterable[Migrated], left: Iterable[Migrated]) -> Table:
    """The names that moved in some files, and those to move by hand in what is left of them."""
    listed = Table()
    for heading in ("where", "TensorFlow Addons", "now"):
        listed.add_column(heading, overflow="fold")
    for file in migrated:
        for finding in file.rewritten.changes:
            cells = (file.where(finding), finding.old, _with_note(finding.new, finding.note))
            listed.add_row(*map(escape, cells))
    for file in left:
        for finding in file.rewritten.remaining:
            cells = (file.where(finding), finding.old, advice(finding))
            listed.add_row(*map(escape, cells), style="bold")
    return listed


def advice(finding: Finding) -> str:
    """What to do about a name that did not move."""
    if finding.new is None:
        return _with_note("no successor", finding.note)
    return f"by hand: {_with_note(finding.new, finding.note)}"


def _with_note(text: str, note: str) -> str:
    return f"{text} ({note})" if note else text


def _lines(text: str) -> list[str]:
    """The lines as `patch` counts them, which str.splitlines does otherwise at form feeds."""
    return io.StringIO(text, newline="\n").readlines()


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _is_others(Path(parent, name))]
        yield from (Path(parent, name) for name in files if name.endswith(SUFFIXES))


def _is_others(folder: Path) -> bool:
    is_hidden = folder.name.startswith(".")
    return is_hidden or folder.name in _OTHERS_FOLDERS or (folder / "pyvenv.cfg").exists()


def _encoding(content: bytes) -> str:
    """The encoding that Python reads a source in; a byte order mark is a character of the text."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    return "utf-8" if encoding == "utf-8-sig" else encoding


def _relative(path: Path) -> Path:
    """A path as seen from the current folder, if it is below it."""
    with contextlib.suppress(ValueError):  # on another drive
        relative = Path(os.path.relpath(path))
        return path if ".." in relative.parts else relative
    return path
