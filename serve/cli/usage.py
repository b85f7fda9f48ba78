"""`octet usage`: show what tenants were charged, from the usage records in the database."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from ..errors import SettingsError, did_you_mean
from ..settings.file import load_settings
from ..usage.months import month_of
from .exit_codes import UsageError
from .terminal import AsJson, ConfigOption
from .usage_source import StoredUsage

GROUP = "tenant", "model", "precision", "outcome"


def usage(
    config: ConfigOption = None,
    tenant: Annotated[str | None, typer.Option(help="Show this tenant only; default: all.")] = None,
    since: Annotated[
        str | None,
        typer.Option(
            help="Show usage since this time in UTC: YYYY-MM-DD or YYYY-MM-DDTHH:MM. Default: the "
            "beginning of this month."
        ),
    ] = None,
    records: Annotated[
        bool,
        typer.Option("--records", help="Print each record as a line of JSON, instead of sums."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what tenants were charged: images and work, by model, precision and outcome."""
    if records and as_json:
        raise UsageError("--records prints JSON already: leave out --json")
    begin = _since(since)
    if config is None:
        raise UsageError("which usage? Name a settings file with data_folder or store by --config")
    source = StoredUsage(load_settings(config))
    if tenant:
        _check_tenant(source, tenant)
    found = source.read(begin, tenant)
    if records:
        for record in found:
            sys.stdout.write(json.dumps(record) + "\n")
        return
    sums = _sums(found)
    until = datetime.now(UTC).isoformat(timespec="seconds")[:19]
    if as_json:
        typer.echo(_as_json(sums, begin, until))
    else:
        Console().print(_table(sums, begin, until))


def _check_tenant(source: StoredUsage, tenant: str) -> None:
    """Raise `SettingsError` if there is no record of a tenant at all."""
    names = dict.fromkeys(record["tenant"] for record in source.read())
    if tenant not in names:
        raise SettingsError(f"--tenant '{tenant}' was never charged: {did_you_mean(tenant, names)}")


def _since(given: str | None) -> str:
    """The time of --since in UTC, as usage records write it.

    Raises `SettingsError` if the text is not a time.
    """
    if given is None:
        return f"{month_of(time.time())}-01T00:00:00"
    try:
        begin = datetime.fromisoformat(given)
    except ValueError:
        raise UsageError(f"--since '{given}': expected YYYY-MM-DD or YYYY-MM-DDTHH:MM") from None
    utc = begin.replace(tzinfo=UTC) if begin.tzinfo is None else begin.astimezone(UTC)
    return utc.strftime("%Y-%m-%dT%H:%M:%S")


def _sums(records: Iterable[dict[str, Any]]) -> dict[tuple[str, ...], tuple[int, float]]:
    """Images and work of each tenant, by tenant, model, precision and outcome, in order.

    The sum of a tenant has "" as model, precision and outcome.
    """
    images: dict[tuple[str, ...], int] = defaultdict(int)
    work: dict[tuple[str, ...], float] = defaultdict(float)
    for record in records:
        group = tuple(record[name] for name in GROUP)
        for key in (group, (record["tenant"], "", "", "")):
            images[key] += 1
            work[key] += record["work_s"]
    return {key: (images[key], work[key]) for key in sorted(images)}


def _table(sums: dict[tuple[str, ...], tuple[int, float]], since: str, until: str) -> Table:
    columns = [Column(name, overflow="fold") for name in GROUP]
    table = Table(*columns, title=f"since {since}, until {until} UTC")
    for name in ("images", "work"):
        table.add_column(name, justify="right")
    for key, (images, work) in sums.items():
        is_total = not key[1]
        table.add_row(*key, str(images), f"{work:.3f}", style="bold" if is_total else None)
    return table


def _as_json(sums: dict[tuple[str, ...], tuple[int, float]], since: str, until: str) -> str:
    """The sums by model, precision and outcome, without those of whole tenants."""
    rows = [
        {**dict(zip(GROUP, key, strict=True)), "images": images, "work_s": round(work, 6)}
        for key, (images, work) in sums.items()
        if key[1]
    ]
    return json.dumps({"since": f"{since}Z", "until": f"{until}Z", "usage": rows}, indent=1)
