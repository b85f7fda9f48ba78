"""Console, progress and common options that all `octet` commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .exit_codes import UsageError

console = Console(stderr=True)


def existing(path: Path | None) -> Path | None:
    """The path of an option or argument. Raises `UsageError` if nothing is there."""
    if path is not None and not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    return path


def settings_file(file: Path | None) -> Path | None:
    """The path of a settings file. Raises `UsageError` if nothing is there."""
    if file is not None and not file.exists():
        raise UsageError(f"{file}: no such file; examples/laptop.yaml is a complete settings file")
    return file


ConfigFile = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="Settings file (YAML); see the folder examples.",
        callback=settings_file,
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="Settings file (YAML).", callback=settings_file),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")]


def complain(message: object) -> None:
    """Print a message in red to standard error."""
    console.print(str(message), style="red", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def working(on: str) -> Iterator[None]:
    """Show what a command works on, and for how many seconds, until the `with` block ends.

    Without a terminal nothing is shown.
    """
    text = TextColumn("{task.description}", markup=False)
    columns, shown = (SpinnerColumn(), text, TimeElapsedColumn()), console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        progress.add_task(on, total=None)
        yield


@contextmanager
def counting(on: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar until the `with` block ends; yields a function that counts one more.

    Without a terminal nothing is shown.
    """
    text = TextColumn("{task.description}", markup=False)
    columns = text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(on, total=total)
        yield lambda: progress.advance(task)


def examples(*commands: str) -> str:
    """The end of a command's help: command lines to copy."""
    return "\n\n".join(("Examples:", *(f"- `{command}`" for command in commands)))
