"""`octet tenant`, `usage` and `top`: who may call, what they had, and what they have now."""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Column, Table

from .dispatch.usage import erase_usage, month_of, read_usage
from .errors import StoreFailed
from .results.opening import open_store
from .settings import SettingsError
from .settings_file import load_settings
from .tenants import add_tenant, read_keys, read_tenants, revoke_keys, rotate_key
from .terminal import ConfigOption, Debug, console, readable_errors
from .top import overview_table

ANSWER_S = 5.0

app = typer.Typer(help="Who may call: tenants, their limits and their keys.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The tenant's id: a-z 0-9 -", show_default=False)]
FolderOption = Annotated[
    Path | None, typer.Option(help="Tenants' folder, instead of that of --config.")
]
Limit = float | None


@app.command("add")
def add(
    tenant: Name,
    config: ConfigOption = None,
    folder: FolderOption = None,
    weight: Annotated[Limit, typer.Option(help="Its share is weight ÷ all weights.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="That it may use; default: all.")] = None,
    requests_per_s: Annotated[Limit, typer.Option(help="Requests a second.")] = None,
    work_per_s: Annotated[Limit, typer.Option(help="Work a second.")] = None,
    max_requests: Annotated[int | None, typer.Option(help="Open at a time.")] = None,
    monthly_work: Annotated[Limit, typer.Option(help="Work in a calendar month.")] = None,
    timeout_s: Annotated[Limit, typer.Option(help="Deadline of requests without one.")] = None,
    operator: Annotated[bool, typer.Option("--operator", help="May run octet top.")] = False,
    debug: Debug = False,
) -> None:
    """Add a tenant and print its key, which is shown only now."""
    with readable_errors(debug):
        given = {
            "weight": weight,
            "models": model or None,
            "requests_per_s": requests_per_s,
            "work_per_s": work_per_s,
            "max_requests": max_requests,
            "monthly_work": monthly_work,
            "timeout_s": timeout_s,
            "operator": operator or None,
        }
        values = {name: value for name, value in given.items() if value is not None}
        _show(add_tenant(_folder(config, folder), tenant, values))


@app.command("list")
def list_tenants(
    config: ConfigOption = None, folder: FolderOption = None, debug: Debug = False
) -> None:
    """Tenants, their limits, and when their keys were made."""
    with readable_errors(debug):
        where = _folder(config, folder)
        tenants, keys = read_tenants(where), read_keys(where)
    table = Table(Column("tenant", overflow="fold"), "weight", "models", "limits", "keys since")
    for name, tenant in tenants.items():
        limits = {
            "requests/s": tenant.requests_per_s,
            "work/s": tenant.work_per_s,
            "open": tenant.max_requests,
            "queued work": tenant.max_queued_work,
            "work/month": tenant.monthly_work,
            "timeout s": tenant.timeout_s,
        }
        table.add_row(
            name + (" (operator)" if tenant.operator else ""),
            f"{tenant.weight:g}",
            ", ".join(tenant.models) if tenant.models is not None else "all",
            ", ".join(f"{key} {value:g}" for key, value in limits.items() if value is not None),
            ", ".join(key["created"][:10] for key in keys.get(name, ())) or "no key",
        )
    for name in sorted(set(keys) - set(tenants)):
        if keys[name]:
            table.add_row(name, "", "not in tenants.yaml: it cannot call", "", "keys are kept")
    Console().print(table)


@app.command("rotate-key")
def rotate(
    tenant: Name, config: ConfigOption = None, folder: FolderOption = None, debug: Debug = False
) -> None:
    """Print a new key; the newest of the old ones stays valid until `revoke --old`."""
    with readable_errors(debug):
        _show(rotate_key(_folder(config, folder), tenant))


@app.command("revoke")
def revoke(
    tenant: Name,
    config: ConfigOption = None,
    folder: FolderOption = None,
    old: Annotated[bool, typer.Option("--old", help="All keys but the newest.")] = False,
    debug: Debug = False,
) -> None:
    """End a tenant's keys, everywhere within 5 s."""
    with readable_errors(debug):
        ended = revoke_keys(_folder(config, folder), tenant, but_newest=old)
    console.print(f"{ended} of the keys of {tenant} ended", highlight=False)


@app.command("erase")
def erase(tenant: Name, config: ConfigOption = None, debug: Debug = False) -> None:
    """Delete a tenant's images and usage records for ever. Revoke its keys before."""
    with readable_errors(debug):
        if config is None:
            raise SettingsError("whose images? Name a settings file with --config")
        settings = load_settings(config).application()
        if settings.data_folder is None:
            raise SettingsError(f"{config}: without data_folder nothing is kept")
        store = open_store(settings, drain=False)
        folder = Path(settings.data_folder).expanduser() / "usage"
        try:
            images = store.erase(tenant)
            erased = erase_usage(folder, tenant) if folder.is_dir() else 0
        except (OSError, ValueError, StoreFailed) as error:
            raise SettingsError(str(error)) from None
        finally:
            store.close()
    console.print(f"{images} images and {erased} records of {tenant} are gone", highlight=False)


def usage(
    config: ConfigOption = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder of usage, instead of that of --config.")
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Of one tenant.")] = None,
    since: Annotated[
        str | None, typer.Option(help="YYYY-MM-DD or later, UTC; default: this month.")
    ] = None,
    records: Annotated[
        bool, typer.Option("--records", help="Every record as a line of JSON, not sums.")
    ] = False,
    debug: Debug = False,
) -> None:
    """What tenants were charged: images and work, by model and outcome."""
    with readable_errors(debug):
        if folder is None:
            data = load_settings(config).data_folder if config else None
            if data is None:
                raise SettingsError("which usage? Name a settings file with --config, or --folder")
            folder = Path(data).expanduser() / "usage"
        begin = _since(since)
        if not folder.is_dir():
            raise SettingsError(f"{folder}: no such folder; usage is where the Dispatcher runs")
        try:
            found = read_usage(folder, begin, tenant)
            if records:
                for record in found:
                    sys.stdout.write(json.dumps(record) + "\n")
            else:
                Console().print(_sums(found, begin))
        except BrokenPipeError:  # `| head` has what it wants
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (OSError, ValueError) as error:
            raise SettingsError(str(error)) from None


def top(
    url: Annotated[str, typer.Argument(help="The server.")] = "http://127.0.0.1:8000",
    key: Annotated[
        str, typer.Option(envvar="OCTET_KEY", help="An operator's key.", show_default=False)
    ] = "",
    once: Annotated[bool, typer.Option("--once", help="Print it once.")] = False,
    debug: Debug = False,
) -> None:
    """Pools, slots and queue by tenant, live."""
    with readable_errors(debug):
        if once:
            Console().print(overview_table(_state(url, key)))
            return
        shown = overview_table(_state(url, key))
        with Live(shown, auto_refresh=False) as live, suppress(KeyboardInterrupt):
            while True:
                time.sleep(1)
                try:
                    shown = overview_table(_state(url, key))
                except SettingsError as error:  # a restart is no reason to look away
                    live.update(Group(shown, f"[red]{escape(str(error))}[/]"), refresh=True)
                else:
                    live.update(shown, refresh=True)


def _folder(config: Path | None, folder: Path | None) -> Path:
    if folder:
        return folder
    if config is None:
        raise SettingsError("whose tenants? Name a settings file with --config, or --folder")
    return Path(load_settings(config).tenants_folder).expanduser()


def _show(key: str) -> None:
    console.print("The key; it is shown only now, and valid within 5 s:", highlight=False)
    sys.stdout.write(key + "\n")


def _since(given: str | None) -> str:
    if given is None:
        return month_of(time.time())
    try:
        begin = datetime.fromisoformat(given)
    except ValueError:
        raise SettingsError(f"--since '{given}': YYYY-MM-DD, or YYYY-MM-DDTHH:MM") from None
    utc = begin.replace(tzinfo=UTC) if begin.tzinfo is None else begin.astimezone(UTC)
    return utc.strftime("%Y-%m-%dT%H:%M:%S")


def _sums(records: Iterable[dict[str, Any]], since: str) -> Table:
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
        whole = not key[1]
        row = (*key, str(images[key]), f"{work[key]:.3f}")
        table.add_row(*row, style="bold" if whole else None)
    return table


def _state(url: str, key: str) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        raise SettingsError(f"'{url}' is no http address")
    headers = {"authorization": f"Bearer {key.strip()}"} if key else {}
    request = urllib.request.Request(url.rstrip("/") + "/v1/state", headers=headers)  # noqa: S310 - checked
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=ANSWER_S) as answer:
            state: dict[str, Any] = json.load(answer)
            return state
    except urllib.error.HTTPError as error:
        what = {401: "the key is missing or wrong", 404: "the key is not an operator's"}
        raise SettingsError(f"{url}: {what.get(error.code, error.reason)}") from None
    except OSError as error:
        raise SettingsError(f"{url}: {getattr(error, 'reason', error)}") from None
    except (ValueError, http.client.HTTPException) as error:  # whose words may hold the key
        raise SettingsError(f"{url}: no answer of an Octet ({type(error).__name__})") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key is for one server alone."""

    def redirect_request(self, *_: Any) -> None:
        return None
