"""Console, common options and one-line error messages that all `octet` commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import SettingsError
from ..launch import LaunchError
from ..models.checkpoints import CheckpointError

console = Console(stderr=True)
ConfigFile = Annotated[Path, typer.Argument(help="Settings file (YAML); see the folder examples.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="Settings file (YAML).")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]


def complain(message: object) -> None:
    """Print a message in red to standard error."""
    console.print(str(message), style="red", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def readable_errors(debug: bool) -> Iterator[None]:
    """Turn expected errors into one-line messages and exit code 1; `debug` lets them through."""
    try:
        yield
    except (SettingsError, LaunchError, CheckpointError) as error:
        if debug:
            raise
        complain(f"octet: {error}")
        raise typer.Exit(1) from None
