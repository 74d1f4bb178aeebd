"""The command `normwise`: the tutorial as a program, and the picture of any norm's sets.

Matplotlib and scikit-learn are imported by the commands that need them. The script itself is
`normwise_command`, which chooses Keras's backend first.
"""

import enum
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import normwise
from normwise import model_commands
from normwise.doctor import report
from normwise.terminal import EXIT_BAD_INPUT, fail, one_line_errors, print_error
from normwise.text import printable
from normwise.tutorial import NORMS, SPLITS

EXIT_REMAINING = 1
EXIT_INTERRUPTED = 130

Norm = enum.StrEnum("Norm", {norm: norm for norm in NORMS})
Split = enum.StrEnum("Split", {split: split for split in SPLITS})
# Modulated is not among them: its sets are those of the norm that it wraps.
_DRAWN = ("batch", "layer", "instance", "group", "rms", "response", "global-response", "adaptive")
DrawnNorm = enum.StrEnum(
    "DrawnNorm", {norm.replace("-", "_"): norm for norm in (*_DRAWN, "spade", "reversible")}
)

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.add_typer(model_commands.app)


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
    # What a terminal cannot show, of the names in others' files say, is written out.
    sys.stdout.reconfigure(errors="backslashreplace")


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
    with one_line_errors(OSError):
        out.mkdir(parents=True, exist_ok=True)
    if json_file is not None:
        _check_file("--json", json_file)

    from normwise.tutorial import data as tutorial_data
    from normwise.tutorial import figures, model, run

    with one_line_errors(ValueError, OSError):
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
        with one_line_errors(OSError):
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
        str | None,
        typer.Option(
            metavar="N,...",
            help="The input's shape, of rank 2 to 5.  [default: 4,5,5,8, for reversible 4,12,8]",
        ),
    ] = None,
    axis: Annotated[
        str | None,
        typer.Option(
            metavar="AXIS[,AXIS]",
            help="The channel axis; for layer and rms the axes of a set, for reversible that of "
            "time.  [default: -1, for reversible 1]",
        ),
    ] = None,
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
        fail(f"--groups {groups} is for group norm, and {norm} norm has none; leave it out")
    out = out or Path(f"normwise-{norm}.png")
    if not out.suffix and out.name:
        out = out.with_suffix(".png")
    _check_file("--out", out)
    is_series = norm is DrawnNorm.reversible
    shape = shape or ("4,12,8" if is_series else "4,5,5,8")
    axis = axis or ("1" if is_series else "-1")
    extents, axes = _ints("--shape", shape), _ints("--axis", axis)
    title = f"{norm}, axis={axis}, shape {shape}"
    with one_line_errors(ValueError, OSError):
        match norm:
            case DrawnNorm.batch:
                drawn = geometry.batch(extents, axes)
            case DrawnNorm.layer | DrawnNorm.rms:
                drawn = geometry.layer(extents, axes)
            case DrawnNorm.group:
                groups = 2 if groups is None else groups
                drawn = geometry.group(extents, axes, groups)
                title = f"{norm}, groups={groups}, axis={axis}, shape {shape}"
            case DrawnNorm.reversible:
                time = axes[0] if len(axes) == 1 else axes
                layer = normwise.layers.ReversibleInstanceNormalization(time)
                drawn = layer.geometry(extents)
            case _:
                drawn = geometry.group(extents, axes, geometry.INSTANCE)
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

    # What cannot be printed is not written.
    with (
        one_line_errors(ValueError, OSError),
        conversion.prepared(old, new, overwrite=overwrite, safe_mode=not unsafe) as converted,
    ):
        Console().print(converted_table(converted))
        typer.echo(f"Writing {new}")
        sys.stdout.flush()


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
    if diff and write:
        fail("--diff only shows what --write does; leave one of them out")

    from normwise.migrate.source import paths as sources

    with one_line_errors(ValueError, OSError):
        found, errors = sources.find(paths)
    migrated, unread = sources.migrate_each(found)
    errors += unread
    if diff:
        typer.echo(b"".join(each.diff() for each in migrated if each.is_changed), nl=False)
        for where, old, advice in _left(migrated):
            typer.echo(printable(f"{where}: {old}: {advice}"), err=True)
    elif migrated:
        left = migrated
        if write:
            errors += sources.write_each(migrated)
            # What remains is found anew, for its lines have moved.
            left, unread = sources.migrate_each(each.path for each in migrated)
            errors += unread
        _print_findings(migrated, left, is_written=write)
    for error in errors:
        print_error(error)
    if errors:
        raise typer.Exit(EXIT_BAD_INPUT)
    if any(each.rewritten.remaining for each in migrated):
        raise typer.Exit(EXIT_REMAINING)


def _print_findings(migrated: list, left: list, *, is_written: bool) -> None:
    """Print what moves, what is left in the files after it, and how much that is."""
    moved = [
        (each.where(finding), finding.old, _with_note(finding.new, finding.note))
        for each in migrated
        for finding in each.rewritten.changes
    ]
    remaining = sum(len(each.rewritten.remaining) for each in migrated)
    rows = [(row, "") for row in moved] + [(row, "bold") for row in _left(left)]
    if rows:
        table = Table("where", "old", "now")
        for column in table.columns:
            column.overflow = "fold"
        for row, style in rows:
            # As text, for Rich would read :100: as an emoji and [x] as a style.
            table.add_row(*(Text(printable(cell)) for cell in row), style=style)
        Console().print(table)
    changed = sum(each.is_changed for each in migrated)
    if not moved and not remaining:
        typer.echo(f"Nothing of TensorFlow Addons is in {len(migrated)} files.")
        return
    names = f"{len(moved)} of {len(moved) + remaining} names"
    typer.echo(
        f"{names} were moved, in {changed} files."
        if is_written
        else f"{names} can be moved, in {changed} files: --diff shows how, --write does it."
    )


def _left(migrated: list) -> Iterator[tuple[str, str, str]]:
    """What the files name of TensorFlow Addons, then what Keras 3 refuses, and what to do."""
    for each in migrated:
        for found in each.rewritten.remaining:
            by_hand = "no successor" if found.new is None else f"by hand: {found.new}"
            yield each.where(found), found.old, _with_note(by_hand, found.note)
    for each in migrated:
        for found in each.rewritten.hints:
            new = _with_note(found.new or "nothing", found.note)
            yield each.where(found), found.old, f"for Keras 3: {new}"


def _with_note(text: str, note: str) -> str:
    return f"{text} ({note})" if note else text


@app.command()
def doctor() -> None:
    """Say what normwise finds on this machine: versions, CPU, and which kernels will run."""
    table = Table(show_header=False, box=None)
    with one_line_errors(ValueError):
        findings = report()
    for name, finding in findings.items():
        # As text: Rich would take the [gpu] of 'normwise[gpu]' for a style.
        table.add_row(name, Text(finding))
    Console().print(table)


def converted_table(conversion) -> Table:
    """The layers of a conversion as a table for the terminal."""
    titled = Table(
        caption=(
            f"saved by Keras {conversion.versions['saved by Keras']}, "
            f"written by Keras {conversion.versions['keras']}; largest difference on random input "
            f"{conversion.largest_difference:.1e} ({conversion.tolerance:.1e} is allowed)"
        ),
        caption_justify="left",
    )
    for heading in ("layer", "old class", "new class"):
        titled.add_column(heading, overflow="fold")
    for heading in ("weights\nmoved", "parameters"):
        titled.add_column(heading, justify="right")
    for layer in conversion.layers:
        counts = (f"{layer.weights:,}", f"{layer.parameters:,}") if layer.weights else ("-", "-")
        names = (Text(printable(name or "-")) for name in (layer.name, layer.old, layer.new))
        titled.add_row(*names, *counts)
    return titled


def _ints(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        fail(f"{option} {text!r} is no list of ints; write it as in {option} 4,5,5,8")


def _check_file(option: str, path: Path) -> None:
    """Refuse a file that could not be written in the end."""
    if path.is_dir():
        fail(f"{option} {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        fail(f"{option} {path}: there is no folder {path.parent}; make it first")


def _require_installed(*modules: str, extra: str = "tutorial") -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        fail(f"{' and '.join(missing)} must be installed; run pip install 'normwise[{extra}]'")
