"""The commands `normwise model ...`: what normwise.models does, on `.keras` files."""

import enum
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import keras
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from normwise import models
from normwise.models import files
from normwise.terminal import one_line_errors
from normwise.text import printable

app = typer.Typer(
    name="model",
    no_args_is_help=True,
    help="The norms of a saved model, and others in their place.",
)

Replacement = enum.StrEnum("Replacement", {each: each for each in ("group", "instance", "layer")})
Kind = enum.StrEnum("Kind", {each.replace(" ", "_"): each for each in models.KINDS})

_File = Annotated[Path, typer.Argument(metavar="FILE", help="A .keras file of Keras 3.")]
_New = Annotated[Path, typer.Argument(metavar="NEW.keras", help="The file to write.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace NEW.keras.")]
_Unsafe = Annotated[
    bool, typer.Option("--unsafe", help="Run code that is in the file, as of Lambda layers.")
]
_Kinds = Annotated[
    list[Kind] | None, typer.Option("--kind", help="A kind of norm; repeat it.  [default: all]")
]


@app.command("norms")
def norms(file: _File, unsafe: _Unsafe = False) -> None:
    """Print a table of the norms of a model: kind, shapes, sets, and the kernel that would run."""
    with one_line_errors(ValueError, OSError):
        found = models.norms_of(files.read(file, unsafe))
    if not found:
        typer.echo(f"There is no norm in {printable(str(file))}.")
        return
    table = Table()
    for heading in ("layer", "kind", "input", "sets"):
        table.add_column(heading, overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("kernel", overflow="fold")
    for norm in found:
        cells = (norm.path, norm.kind, _shape(norm.shape), _sets(norm))
        cells = (*cells, f"{norm.parameters:,}", norm.kernel)
        table.add_row(*(Text(printable(cell)) for cell in cells))
    Console().print(table)


@app.command("accelerate")
def accelerate(
    file: _File, new: _New, overwrite: _Overwrite = False, unsafe: _Unsafe = False
) -> None:
    """Put norms of normwise in the place of Keras's, and write the model anew."""
    _rewrite(models.accelerate, file, new, overwrite, unsafe)


@app.command("replace-batch-norm")
def replace_batch_norm(
    file: _File,
    new: _New,
    with_: Annotated[
        Replacement, typer.Option("--with", help="The norm to have in its place.")
    ] = Replacement.group,
    groups: Annotated[
        int | None,
        typer.Option(help="Of group norm.  [default: the largest divisor of the channels to 32]"),
    ] = None,
    overwrite: _Overwrite = False,
    unsafe: _Unsafe = False,
) -> None:
    """Put group, instance or layer norms in the place of batch norms, and write the model anew."""

    def replaced(model: keras.Model) -> tuple[keras.Model, models.Report]:
        return models.replace_batch_norm(model, str(with_), groups)

    _rewrite(replaced, file, new, overwrite, unsafe)


@app.command("fold-batch-norm")
def fold_batch_norm(
    file: _File, new: _New, overwrite: _Overwrite = False, unsafe: _Unsafe = False
) -> None:
    """Fold batch norms into the layers beside them, for inference, and write the model anew."""
    _rewrite(models.fold_batch_norm, file, new, overwrite, unsafe)


@app.command("freeze")
def freeze(
    file: _File,
    new: _New,
    kind: _Kinds = None,
    overwrite: _Overwrite = False,
    unsafe: _Unsafe = False,
) -> None:
    """Let training leave norms as they are, and write the model anew."""
    _rewrite(lambda model: models.freeze(model, kind), file, new, overwrite, unsafe)


@app.command("unfreeze")
def unfreeze(
    file: _File,
    new: _New,
    kind: _Kinds = None,
    overwrite: _Overwrite = False,
    unsafe: _Unsafe = False,
) -> None:
    """Let training move norms again, and write the model anew."""
    _rewrite(lambda model: models.unfreeze(model, kind), file, new, overwrite, unsafe)


def _rewrite(
    change: Callable[[keras.Model], tuple[keras.Model, models.Report]],
    file: Path,
    new: Path,
    overwrite: bool,
    unsafe: bool,
) -> None:
    """Write what a function makes of the model of a file, and print its report."""
    with one_line_errors(ValueError, OSError):
        files.check_out(file, new, overwrite)
        changed, report = change(files.read(file, unsafe))
        # What cannot be printed is not written.
        with files.written(file, new, overwrite) as written:
            changed.save(written)
            Console().print(report)
            typer.echo(f"Writing {new}")


def _shape(shape: tuple | None) -> str:
    if shape is None:
        return "not known"
    return ", ".join("any" if extent is None else str(extent) for extent in shape)


def _sets(norm: models.Norm) -> str:
    """Which elements share their statistics, as the sets' size where that is known."""
    if norm.kind in ("spectral", "weight"):
        return "of weights"
    if norm.sets is None:
        return "not known"
    axes = ", ".join(map(str, norm.sets.set_axes))
    groups = f" in {norm.sets.groups} groups" if norm.sets.splits_channels else ""
    return f"axes {axes}{groups}"
