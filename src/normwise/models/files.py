"""Models in `.keras` files: read as what they are, and written whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import keras

from normwise.models.comparison import first_line
from normwise.text import one_line


def read(path: Path, unsafe: bool = False) -> keras.Model:
    """The model of a `.keras` file of Keras 3.

    Raises:
        ValueError: it is no such file, or Keras cannot load it; the message says what to do.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; name a .keras file of Keras 3")
    if path.suffix != ".keras":
        raise ValueError(
            f"{path} is no .keras file; save the model as one, and convert what Keras 2 saved by "
            "`normwise convert`"
        )
    try:
        return keras.saving.load_model(path, safe_mode=not unsafe)
    except Exception as error:
        raise refused(
            f"{path} cannot be loaded by Keras {keras.__version__} ({first_line(error)}); a class "
            "or function of yours must be known to it: use normwise.models from Python then. Code "
            "in the file, as of a Lambda layer, is run with --unsafe only"
        ) from error


@contextlib.contextmanager
def written(path: Path, out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A file to write to in the block, which moves to `out` at the end: if that raises, never.

    Args:
        path: the file that was read; `out` may not be it.
        out: a new file, or one to replace with `overwrite`.

    Raises:
        ValueError: `out` is no new `.keras` file in a folder that exists.
    """
    check_out(path, out, overwrite)
    with tempfile.TemporaryDirectory(
        prefix=".normwise-", dir=out.parent, ignore_cleanup_errors=True
    ) as folder:
        file = Path(folder) / out.name
        yield file
        _move(file, out, overwrite)


def check_out(path: Path, out: Path, overwrite: bool) -> None:
    """Refuse a file that could not be written in the end."""
    if out.suffix != ".keras":
        raise refused(
            f"{out} does not end in .keras, as Keras 3 wants it; "
            f"write to {out.with_suffix('.keras')}"
        )
    if not out.parent.is_dir():
        raise refused(f"{out}: there is no folder {out.parent}; make it first")
    if out.exists() and path.exists() and out.samefile(path):
        raise refused(f"{out} is the file to convert; write to another")
    if out.is_dir():
        raise refused(f"{out} is a folder; write to another name")
    if os.path.lexists(out) and not overwrite:
        raise refused(_exists(out))


def refused(text: str) -> ValueError:
    """An error whose message, which may quote files of others, is one printable line."""
    return ValueError(one_line(text))


def _move(file: Path, out: Path, overwrite: bool) -> None:
    """Move a file to its place in one step; without `overwrite`, to one that nobody has taken."""
    if overwrite:
        file.replace(out)
        return
    try:
        try:
            os.link(file, out)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            out.open("xb").close()
            try:
                file.replace(out)
            except OSError:
                out.unlink()
                raise
    except FileExistsError:
        raise refused(_exists(out)) from None


def _exists(out: Path) -> str:
    return f"{out} exists; write to another, or pass overwrite=True (--overwrite)"
