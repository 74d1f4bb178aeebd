"""The command `normwise`: the tutorial as a program, and the picture of any norm's sets.

Matplotlib and scikit-learn are imported by the commands that need them. The script itself is
`normwise_command`, which chooses Keras's backend first.
"""

import enum
import importlib.util
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

import normwise
from normwise.doctor import report
from normwise.tutorial import NORMS, SPLITS

EXIT_REMAINING = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

Norm = enum.StrEnum("Norm", {norm: norm for norm in NORMS})
Split = enum.StrEnum("Split", {split: split for split in SPLITS})
DrawnNorm = enum.StrEnum("DrawnNorm", ["batch", "layer", "instance", "group", "rms"])

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"normwise {normwise.__version__}")
        raise typer.Exit


@app.callback()
def normwise_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Group, instance, layer and RMS normalization for Keras 3."""


@app.command()
def tutorial(
    data: Annotated[
        str,
        typer.Option(
            metavar="digits|mnist|PATH",
            help="What to train on: scikit-learn's digits, Keras's MNIST, or an .npz file in "
            "Keras's layout, or a file or folder in MNIST's IDX format.",
        ),
    ] = "digits",
    norm: Annotated[
        list[Norm] | None,
        typer.Option(help="A norm to train with; repeat it for several.  [default: all five]"),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 1,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    split: Annotated[Split, typer.Option(help="The images to train on.")] = Split.test,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder for the pictures.")] = Path(
        "normwise-tutorial"
    ),
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers to this file.")
    ] = None,
) -> None:
    """Train the tutorial's model with each norm, compare them, and draw two pictures."""
    norms = list(dict.fromkeys(norm or Norm))
    _require_installed("matplotlib", *(["sklearn"] if data == "digits" else []))
    with _one_line_errors(OSError):
        out.mkdir(parents=True, exist_ok=True)
        if json_file is not None and not json_file.parent.is_dir():
            _fail(f"--json {json_file}: there is no folder {json_file.parent}; make it first")

    from normwise.tutorial import data as tutorial_data
    from normwise.tutorial import figures, model, run

    with _one_line_errors(ValueError, OSError):
        loaded = tutorial_data.load(data, split)
    runs: list[run.Run] = []
    # A bar redraws its line, which only a terminal can do.
    verbose = 1 if sys.stdout.isatty() else 2
    try:
        for finished in run.train(
            norms, loaded, epochs=epochs, batch_size=batch_size, seed=seed, verbose=verbose
        ):
            runs.append(finished)
    except KeyboardInterrupt:
        typer.echo(f"\nInterrupted: {len(runs)} of {len(norms)} norms are done.", err=True)
    interrupted = len(runs) < len(norms)
    if runs:
        Console().print(run.table(runs, loaded))
        with _one_line_errors(OSError):
            curves, sets = out / "learning-curves.png", out / "shared-statistics.png"
            figures.save(figures.learning_curves(runs), curves)
            figures.save(figures.shared_statistics(model.norms_to_draw()), sets)
            typer.echo(f"Wrote {curves}\nWrote {sets}")
            if json_file is not None:
                run.write_json(json_file, runs, loaded, interrupted=interrupted)
                typer.echo(f"Wrote {json_file}")
    if interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


@app.command()
def figure(
    norm: Annotated[DrawnNorm, typer.Argument(help="The norm to draw.")],
    shape: Annotated[
        str, typer.Option(metavar="N,...", help="The input's shape, of rank 2 to 5.")
    ] = "4,5,5,8",
    axis: Annotated[
        str,
        typer.Option(
            metavar="AXIS[,AXIS]", help="The channel axis; for layer and rms, the axes of a set."
        ),
    ] = "-1",
    groups: Annotated[
        int | None, typer.Option(help="Into how many groups group norm splits.  [default: 2]")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The picture.  [default: normwise-NORM.png]"),
    ] = None,
) -> None:
    """Draw which elements of an input share their statistics."""
    _require_installed("matplotlib")

    from normwise import geometry
    from normwise.tutorial import figures

    if groups is not None and norm is not DrawnNorm.group:
        _fail(f"--groups {groups} is for group norm, and {norm} norm has none; leave it out")
    out = out or Path(f"normwise-{norm}.png")
    if not out.suffix:
        out = out.with_suffix(".png")
    extents = _ints("--shape", shape)
    axes = _ints("--axis", axis)
    title = f"{norm}, axis={axis}, shape {shape}"
    with _one_line_errors(ValueError, OSError):
        match norm:
            case DrawnNorm.batch:
                drawn = geometry.batch(extents, axes)
            case DrawnNorm.layer | DrawnNorm.rms:
                drawn = geometry.layer(extents, axes)
            case DrawnNorm.instance:
                drawn = geometry.group(extents, axes, geometry.INSTANCE)
            case DrawnNorm.group:
                groups = 2 if groups is None else groups
                drawn = geometry.group(extents, axes, groups)
                title = f"{norm}, groups={groups}, axis={axis}, shape {shape}"
        figures.save(figures.shared_statistics({title: drawn}), out)
    typer.echo(f"Wrote {out}")


@app.command()
def convert(
    old: Annotated[
        Path, typer.Argument(help="A model of Keras 2: .h5, .keras or the folder of a SavedModel.")
    ],
    new: Annotated[Path, typer.Argument(metavar="NEW.keras", help="The file to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace NEW.keras.")] = False,
    unsafe: Annotated[
        bool,
        typer.Option("--unsafe", help="Run code that is in the file, as of Lambda layers."),
    ] = False,
) -> None:
    """Write a model of TensorFlow Addons as a .keras file of Keras 3, and check the file."""
    from normwise.migrate.models import conversion

    with _one_line_errors(ValueError, OSError):
        converted = conversion.convert(old, new, overwrite=overwrite, safe_mode=not unsafe)
    Console().print(conversion.table(converted))
    typer.echo(f"Wrote {new}")


@app.command()
def migrate(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Python files, notebooks, folders.")
    ],
    diff: Annotated[
        bool, typer.Option("--diff", help="Print what would change, as patch takes it.")
    ] = False,
    write: Annotated[bool, typer.Option("--write", help="Change the files.")] = False,
) -> None:
    """Rewrite source from TensorFlow Addons to normwise; 1 says that something is left to do."""
    _require_installed("libcst", extra="migrate")
    if diff and write:
        _fail("--diff only shows what --write does; leave one of them out")

    from normwise.migrate.source import paths as sources

    with _one_line_errors(ValueError):
        found = sources.find(paths)
    migrated, errors = sources.migrate_each(found)
    if diff:
        sources.print_diff(migrated)
    elif migrated:
        errors += sources.write_each(migrated) if write else []
        sources.print_findings(migrated, is_written=write)
    for error in errors:
        typer.echo(f"Error: {error}", err=True)
    if errors:
        raise typer.Exit(EXIT_BAD_INPUT)
    if any(each.rewritten.remaining for each in migrated):
        raise typer.Exit(EXIT_REMAINING)


@app.command()
def doctor() -> None:
    """Say what normwise finds on this machine: versions, CPU, and which kernels will run."""
    table = Table(show_header=False, box=None)
    with _one_line_errors(ValueError):
        findings = report()
    for name, finding in findings.items():
        table.add_row(name, finding)
    Console().print(table)


def _ints(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        _fail(f"{option} {text!r} is no list of ints; write it as in {option} 4,5,5,8")


def _require_installed(*modules: str, extra: str = "tutorial") -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        _fail(f"{' and '.join(missing)} must be installed; run pip install 'normwise[{extra}]'")


@contextmanager
def _one_line_errors(*kinds: type[Exception]) -> Iterable[None]:
    """Report what a user can put right in one line; anything else keeps its traceback."""
    try:
        yield
    except kinds as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(EXIT_BAD_INPUT)
