"""`octet usage`: show what tenants were charged, from the usage records on disk."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from ..errors import SettingsError, did_you_mean
from ..settings.file import load_settings
from ..usage.ledger import month_of, read_usage, usage_files
from .terminal import ConfigOption, Debug, readable_errors


def usage(
    config: ConfigOption = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder with the usage records, instead of the one that --config names."),
    ] = None,
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
    debug: Debug = False,
) -> None:
    """Show what tenants were charged: images and work, by model, precision and outcome."""
    with readable_errors(debug):
        if folder is None:
            found_folder = load_settings(config).usage_path if config else None
            if found_folder is None:
                raise SettingsError(
                    "which usage? Name a settings file with data_folder by --config, or --folder"
                )
            folder = Path(found_folder).expanduser()
        begin = _since(since)
        if not folder.is_dir():
            raise SettingsError(
                f"{folder}: no such folder; usage is recorded on the node where the Dispatcher runs"
            )
        try:
            if not usage_files(folder):
                raise SettingsError(
                    f"{folder}: no usage was recorded there; name the folder `usage_folder` of the "
                    "settings, or the folder `usage` in `data_folder`"
                )
            if tenant:
                _check_tenant(folder, tenant)
            found = read_usage(folder, begin, tenant)
            if records:
                for record in found:
                    sys.stdout.write(json.dumps(record) + "\n")
            else:
                Console().print(_sums(found, begin))
        except BrokenPipeError:  # such as `| head`, which closes the pipe early
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (OSError, ValueError) as error:
            raise SettingsError(str(error)) from None


def _check_tenant(folder: Path, tenant: str) -> None:
    """Raise `SettingsError` if a folder has no record of a tenant at all."""
    names = dict.fromkeys(record["tenant"] for record in read_usage(folder))
    if tenant not in names:
        raise SettingsError(f"--tenant '{tenant}' was never charged: {did_you_mean(tenant, names)}")


def _since(given: str | None) -> str:
    """The time of --since in UTC, as usage records write it.

    Raises `SettingsError` if the text is not a time.
    """
    if given is None:
        return month_of(time.time())
    try:
        begin = datetime.fromisoformat(given)
    except ValueError:
        raise SettingsError(f"--since '{given}': expected YYYY-MM-DD or YYYY-MM-DDTHH:MM") from None
    utc = begin.replace(tzinfo=UTC) if begin.tzinfo is None else begin.astimezone(UTC)
    return utc.strftime("%Y-%m-%dT%H:%M:%S")


def _sums(records: Iterable[dict[str, Any]], since: str) -> Table:
    """Images and work of each tenant, in all and by model, precision and outcome."""
    images: dict[tuple[str, ...], int] = defaultdict(int)
    work: dict[tuple[str, ...], float] = defaultdict(float)
    for record in records:
        group = tuple(record[name] for name in ("tenant", "model", "precision", "outcome"))
        for key in (group, (record["tenant"], "", "", "")):
            images[key] += 1
            work[key] += record["work_s"]
    now = datetime.now(UTC).isoformat(timespec="seconds")[:19]
    columns = [Column(n, overflow="fold") for n in ("tenant", "model", "precision", "outcome")]
    table = Table(*columns, title=f"since {since}, until {now} UTC")
    for name in ("images", "work"):
        table.add_column(name, justify="right")
    for key in sorted(images):
        is_total = not key[1]
        row = (*key, str(images[key]), f"{work[key]:.3f}")
        table.add_row(*row, style="bold" if is_total else None)
    return table
