"""`octet doctor`: report what this machine or cluster can serve, and what prevents it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import OctetError
from ..settings.application import Settings
from ..settings.file import load_settings
from ..settings.serve_config import pool_arguments
from .doctor_machine import Finding, examine, look
from .doctor_settings import examine_cluster, examine_settings, needs_gpu
from .exit_codes import FAULT
from .ray_cluster import nodes_of_cluster
from .terminal import AsJson, settings_file, working


def _examine_code(settings: Settings) -> Iterator[Finding]:
    """A note for each pool whose code this machine would have to compile at the first start."""
    for arguments in pool_arguments(settings):
        pool = arguments.pool
        if pool.compile == "off" or (pool.compile == "auto" and not pool.num_gpus):
            continue
        from ..engine.precompile import is_compiled  # loads torch and diffusers

        with suppress(OctetError):  # the pool cannot run here, which another finding says
            if is_compiled(arguments) is False:
                yield Finding(
                    "note",
                    f"the code of pool {arguments.name} is not compiled here: run octet compile",
                )


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG",
            help="Settings file (YAML) whose models are to be served here.",
            callback=settings_file,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster to examine, instead of this machine."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Report what this machine or a cluster can serve, and what prevents it.

    The exit code is 1 if there is a problem. A model of CONFIG that cannot be served is a problem.
    """
    settings = load_settings(config) if config else None
    if ray:
        with working(f"asking the Ray at {ray}"):
            nodes = nodes_of_cluster(ray)
        findings = list(examine_cluster(nodes, settings))
    else:
        with working("examining this machine"):
            machine = look(settings.models_folder if settings else None)
        findings = list(examine(machine, needs_gpu(settings) if settings else True))
        if settings:
            findings += examine_settings(settings, machine)
            findings += _examine_code(settings)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _print(findings)
    if any(finding.verdict == "problem" for finding in findings):
        raise typer.Exit(FAULT)


def _print(findings: Iterable[Finding]) -> None:
    signs = {"ok": "[green]ok     [/]", "note": "[yellow]note   [/]", "problem": "[red]problem[/]"}
    out = Console(highlight=False, soft_wrap=True)
    for finding in findings:
        out.print(f"{signs[finding.verdict]} {escape(finding.text)}")
