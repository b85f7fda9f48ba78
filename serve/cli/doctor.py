"""`octet doctor`: report what this machine or cluster can serve, and what prevents it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..settings.file import load_settings
from .doctor_machine import examine, look
from .doctor_settings import examine_cluster, examine_settings, needs_gpu
from .plan_inputs import nodes_of_cluster
from .terminal import Debug, readable_errors


def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="Settings file (YAML) whose models are to be served here.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster to examine, instead of this machine."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Report what this machine or a cluster can serve, and what prevents it.

    The exit code is 1 if there is a problem. A model of CONFIG that cannot be served is a problem.
    """
    with readable_errors(debug):
        settings = load_settings(config) if config else None
        if ray:
            findings = list(examine_cluster(nodes_of_cluster(ray), settings))
        else:
            machine = look(settings.models_folder if settings else None)
            findings = list(examine(machine, needs_gpu(settings) if settings else True))
            findings += examine_settings(settings, machine) if settings else []
    signs = {"ok": "[green]ok     [/]", "note": "[yellow]note   [/]", "problem": "[red]problem[/]"}
    out = Console(highlight=False, soft_wrap=True)
    for finding in findings:
        out.print(f"{signs[finding.verdict]} {escape(finding.text)}")
    if any(finding.verdict == "problem" for finding in findings):
        raise typer.Exit(1)
