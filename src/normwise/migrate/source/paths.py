"""Python files and notebooks, found in folders, rewritten, compared and written back whole."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import shutil
import stat
import tempfile
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from normwise.migrate.source.notebooks import rewrite_notebook
from normwise.migrate.source.references import Finding
from normwise.migrate.source.rewriting import Rewritten, rewrite_source

SUFFIXES = (".ipynb", ".py")
_OTHERS_FOLDERS = {"__pycache__", "node_modules", "site-packages"}
# A file that has none of these is not read further: it need not even be Python 3.
_MENTIONS = re.compile(r"tensorflow[-_.]addons|Addons>|normwise")


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
        if not _MENTIONS.search(old) and not _MENTIONS.search(content.decode("latin-1")):
            return Migrated(path, encoding, old, Rewritten(old, (), ()))
        rewritten = rewrite_notebook(old) if path.suffix == ".ipynb" else rewrite_source(old)
        new = rewritten.text.encode(encoding)
        # Some encodings write a text in several ways, or read it back as another.
        if old.encode(encoding) != content or new.decode(encoding) != rewritten.text:
            raise ValueError(f"{encoding} does not keep its bytes; save it in UTF-8 first")
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


def find(paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """The Python files and notebooks among `paths` and in the folders among them, each once.

    Hidden folders, virtual environments and what is installed in them are nobody's source, and
    neither is a pipe or a device of such a name.

    Returns:
        The files, and for each folder that cannot be read, why.

    Raises:
        ValueError: a path is neither a folder, nor a Python file or notebook.
    """
    found: dict[str, Path] = {}
    errors: list[OSError] = []
    for path in paths:
        if path.is_dir():
            files = sorted(_walk(path, errors.append))
        elif not path.exists():
            raise ValueError(f"{path}: there is no such file or folder; check the name")
        elif path.suffix not in SUFFIXES or not path.is_file():
            raise ValueError(f"{path} is no .py or .ipynb file; name such a file, or a folder")
        else:
            files = [path]
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values()), list(map(str, errors))


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


def _lines(text: str) -> list[str]:
    """The lines as `patch` counts them, which str.splitlines does otherwise at form feeds."""
    return io.StringIO(text, newline="\n").readlines()


def _walk(folder: Path, report: Callable[[OSError], None]) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, onerror=report):
        folders[:] = [name for name in folders if not _is_others(Path(parent, name))]
        paths = (Path(parent, name) for name in files if name.endswith(SUFFIXES))
        yield from filter(_can_be_read, paths)


def _can_be_read(path: Path) -> bool:
    """Whether a file is one that ends; where that cannot be seen, reading it says why."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:  # a link to nowhere, as editors make for locks
        return False
    except OSError:
        return True


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
