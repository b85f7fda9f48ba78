"""`octet tenant`: add and list tenants, change their keys, and erase their data."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from ..errors import SettingsError, StoreFailed
from ..results.from_settings import open_store
from ..settings.application import Settings
from ..settings.file import load_settings
from ..tenants.files import add_tenant, read_keys, read_tenants, revoke_keys, rotate_key
from .exit_codes import UsageError
from .terminal import AsJson, ConfigOption, console, examples
from .usage_source import FolderUsage, StoreUsage, usage_source

app = typer.Typer(help="Manage tenants, their limits and their API keys.", no_args_is_help=True)

Name = Annotated[
    str,
    typer.Argument(
        metavar="TENANT",
        help="Id of the tenant: letters a-z, digits and hyphens.",
        show_default=False,
    ),
]
FolderOption = Annotated[
    Path | None,
    typer.Option(help="Folder with the tenants, instead of the one that --config names."),
]
Limit = float | None


@app.command(
    "add",
    epilog=examples(
        "octet tenant add acme --config octet.yaml --weight 2 --monthly-work 100000",
        "octet tenant add ops --operator --folder tenants",
    ),
)
def add(
    tenant: Name,
    config: ConfigOption = None,
    folder: FolderOption = None,
    weight: Annotated[
        Limit,
        typer.Option(
            help="Weight of the tenant. Its share is its weight ÷ the sum of the weights."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Model that the tenant may use; repeat it for several. Default: all."),
    ] = None,
    requests_per_s: Annotated[Limit, typer.Option(help="Limit of requests per second.")] = None,
    work_per_s: Annotated[
        Limit,
        typer.Option(help="Limit of work per second; work is in seconds of a reference replica."),
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(help="Limit of requests that are open at a time.")
    ] = None,
    monthly_work: Annotated[
        Limit,
        typer.Option(help="Budget of work per calendar month, in seconds of a reference replica."),
    ] = None,
    timeout_s: Annotated[
        Limit,
        typer.Option(help="Deadline in seconds of requests that name none."),
    ] = None,
    operator: Annotated[
        bool, typer.Option("--operator", help="Let the tenant run octet top.")
    ] = False,
) -> None:
    """Add a tenant and print its API key. The key is shown only this once."""
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


@app.command(
    "list",
    epilog=examples(
        "octet tenant list --config octet.yaml", "octet tenant list --folder tenants --json"
    ),
)
def list_tenants(
    config: ConfigOption = None, folder: FolderOption = None, as_json: AsJson = False
) -> None:
    """List the tenants, their limits, and when their keys were made."""
    where = _folder(config, folder)
    tenants, keys = read_tenants(where), read_keys(where)
    if as_json:
        found = {
            name: {**asdict(tenant), "keys_created": [key["created"] for key in keys.get(name, ())]}
            for name, tenant in tenants.items()
        }
        typer.echo(json.dumps(found, indent=1))
        return
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
            table.add_row(
                name, "", "not in tenants.yaml: its keys are refused", "", "keys are kept"
            )
    Console().print(table)


@app.command(
    "rotate-key",
    epilog=examples(
        "octet tenant rotate-key acme --config octet.yaml",
        "octet tenant rotate-key acme --folder tenants",
    ),
)
def rotate(tenant: Name, config: ConfigOption = None, folder: FolderOption = None) -> None:
    """Make and print a new key. The newest old key stays valid until `revoke --old`."""
    _show(rotate_key(_folder(config, folder), tenant))


@app.command(
    "revoke",
    epilog=examples(
        "octet tenant revoke acme --config octet.yaml --old",
        "octet tenant revoke acme --config octet.yaml",
    ),
)
def revoke(
    tenant: Name,
    config: ConfigOption = None,
    folder: FolderOption = None,
    old: Annotated[bool, typer.Option("--old", help="Revoke all keys except the newest.")] = False,
) -> None:
    """Revoke a tenant's keys. Every Ingress refuses them within 5 s."""
    count = revoke_keys(_folder(config, folder), tenant, but_newest=old)
    console.print(f"{count} of the keys of {tenant} revoked", highlight=False)


@app.command(
    "erase",
    epilog=examples(
        "octet tenant erase acme --config octet.yaml",
        "octet tenant erase acme --config octet.yaml --yes",
    ),
)
def erase(
    tenant: Name,
    config: ConfigOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a tenant's images and usage records for ever. Revoke its keys first."""
    if config is None:
        raise UsageError("whose images? Name a settings file with --config")
    settings = load_settings(config)
    source = usage_source(settings)
    if source is None:
        raise SettingsError(f"{config}: it has no data_folder, so no images or records are kept")
    if not yes:
        _confirm_erasure(settings, tenant, source)
    with ExitStack() as cleanup:
        images = erased = 0
        try:
            if settings.data_folder:
                store = open_store(settings, drain=False)
                cleanup.callback(store.close)
                images = store.erase(tenant)
            erased = source.erase(tenant)
        except (OSError, ValueError, StoreFailed) as error:
            raise SettingsError(str(error)) from None
    console.print(f"{images} images and {erased} records of {tenant} are deleted", highlight=False)


def _confirm_erasure(settings: Settings, tenant: str, source: FolderUsage | StoreUsage) -> None:
    """Say what an erasure deletes, and ask. Raises `SettingsError` unless the answer is yes."""
    try:
        records = sum(1 for _ in source.read(tenant=tenant))
        has_keys = settings.auth == "keys" and bool(
            read_keys(Path(settings.tenants_folder).expanduser()).get(tenant)
        )
    except (OSError, ValueError) as error:
        raise SettingsError(str(error)) from None
    place = f"the bucket {settings.s3.bucket}" if settings.s3 else settings.data_folder
    images = f"all images of {tenant} in {place}, and " if place else ""
    console.print(
        f"This deletes {images}{records} usage records in {source.place}.", highlight=False
    )
    if has_keys:
        console.print(
            f"The keys of {tenant} still work: revoke them first with octet tenant revoke {tenant}",
            highlight=False,
        )
    if not sys.stdin.isatty():
        raise UsageError("nothing is deleted: there is no terminal to ask; add --yes")
    if not typer.confirm("Delete them for ever?"):
        raise SettingsError("nothing is deleted")


def _folder(config: Path | None, folder: Path | None) -> Path:
    """The tenants' folder: `folder` if it is given, else the one that the settings name.

    `config`: the settings file. Raises `SettingsError` if neither is given.
    """
    if folder:
        return folder
    if config is None:
        raise UsageError("whose tenants? Name a settings file with --config, or --folder")
    return Path(load_settings(config).tenants_folder).expanduser()


def _show(key: str) -> None:
    console.print("The key, valid within 5 s. It is shown only this once:", highlight=False)
    sys.stdout.write(key + "\n")
