"""What the commands of `octet` share: one console, and errors in one line each."""

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
ConfigFile = Annotated[Path, typer.Argument(help="Settings file (YAML); see examples/.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="Settings file (YAML).")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def complain(what: object) -> None:
    console.print(str(what), style="red", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def readable_errors(debug: bool) -> Iterator[None]:
    """Errors that we foresee in one line each, exit code 1."""
    try:
        yield
    except (SettingsError, LaunchError, CheckpointError) as error:
        if debug:
            raise
        complain(f"octet: {error}")
        raise typer.Exit(1) from None
