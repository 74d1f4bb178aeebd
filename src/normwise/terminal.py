"""How the command line says that something is wrong: in one line, with an exit code."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from normwise.text import one_line, printable

EXIT_BAD_INPUT = 2


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Report what a user can put right in one line; anything else keeps its traceback."""
    try:
        yield
    except kinds as error:
        fail(str(error))


def print_error(message: str) -> None:
    """Print an error in a line of its own, to stderr."""
    typer.echo(f"Error: {printable(message)}", err=True)


def fail(message: str) -> NoReturn:
    """Print an error and end the program."""
    print_error(one_line(message))
    raise typer.Exit(EXIT_BAD_INPUT)
