"""`octet check-config`: what a settings file means, without starting anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ..settings.file import changed_values, load_settings
from ..tenants.files import read_keys, read_tenants
from .terminal import AsJson, ConfigFile, console


def check_config(config: ConfigFile, as_json: AsJson = False) -> None:
    """Check CONFIG and the OCTET_* environment variables without starting anything.

    Prints the pools, and every value that differs from its default with the place where it is set.
    """
    settings, changed = load_settings(config), changed_values(config)
    if settings.tenants_folder:
        read_tenants(Path(settings.tenants_folder).expanduser())
        read_keys(Path(settings.tenants_folder).expanduser())
    pools: list[dict[str, Any]] = [
        {
            "model": model.id,
            "pool": " on ".join(filter(None, (pool.precision, pool.card))),
            "replicas": pool.replicas,
            "min_replicas": pool.min_replicas,
            "slots": pool.slots,
            "num_gpus": pool.num_gpus,
            "num_cpus": pool.num_cpus,
        }
        for model in settings.models
        for pool in model.pools
    ]
    if as_json:
        values = [{"key": key, "value": value, "set_in": place} for key, value, place in changed]
        typer.echo(json.dumps({"pools": pools, "changed": values}, indent=1))
        return
    table = Table("model", "pool", "replicas", "slots", "GPU each", "CPU each")
    for row in pools:
        least, most = row["min_replicas"], row["replicas"]
        between = str(most) if least in (None, most) else f"{least} to {most}"
        sizes = (f"{row[name]:g}" for name in ("slots", "num_gpus", "num_cpus"))
        table.add_row(str(row["model"]), str(row["pool"]), between, *sizes)
    Console().print(table)
    table = Table(
        Column("key", overflow="fold"),
        Column("value", overflow="fold"),
        Column("set in", overflow="fold"),
    )
    for key, value, place in changed:
        table.add_row(escape(key), escape(str(value)), escape(place))
    Console().print(table)
    console.print(f"{config}: ok", style="green", highlight=False)
