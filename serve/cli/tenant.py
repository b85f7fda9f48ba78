"""`octet tenant`: add, change and list tenants and their keys, and erase their data."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from ..errors import SettingsError, StoreFailed
from ..results.from_settings import open_store
from ..settings.application import Settings
from ..settings.file import load_settings
from ..tenants.files import TENANTS
from ..tenants.keys import SCOPES
from .exit_codes import UsageError
from .operator_client import OperatorKey
from .tenant_access import RemoteTenants, StoredTenants
from .terminal import AsJson, ConfigOption, console, examples, existing
from .usage_source import StoredUsage

app = typer.Typer(help="Manage tenants, their limits and their API keys.", no_args_is_help=True)

Name = Annotated[
    str,
    typer.Argument(
        metavar="TENANT",
        help="Id of the tenant: letters a-z, digits and hyphens.",
        show_default=False,
    ),
]
UrlOption = Annotated[
    str | None,
    typer.Option("--url", help="Address of a running server, instead of --config."),
]


class ManagedBy(StrEnum):
    """The way by which tenants are changed after they were applied."""

    FILE = "file"
    API = "api"


Limit = float | None
WeightOption = Annotated[
    Limit,
    typer.Option(help="Weight of the tenant. Its share is its weight ÷ the sum of the weights."),
]
ModelOption = Annotated[
    list[str] | None,
    typer.Option(help="Model that the tenant may use; repeat it for several. Default: all."),
]
RequestsOption = Annotated[Limit, typer.Option(help="Limit of requests per second.")]
WorkOption = Annotated[
    Limit,
    typer.Option(help="Limit of work per second; work is in seconds of a reference replica."),
]
OpenOption = Annotated[int | None, typer.Option(help="Limit of requests that are open at a time.")]
JobsOption = Annotated[
    int | None, typer.Option(help="Limit of jobs and lines of batches that wait at a time.")
]
MonthlyOption = Annotated[
    Limit,
    typer.Option(help="Budget of work per calendar month, in seconds of a reference replica."),
]
TimeoutOption = Annotated[
    Limit, typer.Option(help="Deadline in seconds of requests that name none.")
]


@app.command(
    "add",
    epilog=examples(
        "octet tenant add acme --config octet.yaml --weight 2 --monthly-work 100000",
        "octet tenant add ops --operator --url http://127.0.0.1:8000",
    ),
)
def add(
    tenant: Name,
    config: ConfigOption = None,
    url: UrlOption = None,
    key: OperatorKey = "",
    weight: WeightOption = None,
    model: ModelOption = None,
    requests_per_s: RequestsOption = None,
    work_per_s: WorkOption = None,
    max_requests: OpenOption = None,
    max_queued_jobs: JobsOption = None,
    monthly_work: MonthlyOption = None,
    timeout_s: TimeoutOption = None,
    operator: Annotated[
        bool, typer.Option("--operator", help="Let the tenant administer the server.")
    ] = False,
) -> None:
    """Add a tenant and print its API key. The key is shown only this once."""
    limits = _named(
        weight=weight,
        models=model,
        requests_per_s=requests_per_s,
        work_per_s=work_per_s,
        max_requests=max_requests,
        max_queued_jobs=max_queued_jobs,
        monthly_work=monthly_work,
        timeout_s=timeout_s,
        operator=operator or None,
    )
    with _tenants(config, url, key) as tenants:
        tenants.add(tenant, limits)
        _show(tenants.new_key(tenant, SCOPES, None))


@app.command(
    "set",
    epilog=examples(
        "octet tenant set acme --config octet.yaml --monthly-work 200000",
        "octet tenant set acme --url http://127.0.0.1:8000 --unset requests_per_s",
    ),
)
def change(
    tenant: Name,
    config: ConfigOption = None,
    url: UrlOption = None,
    key: OperatorKey = "",
    weight: WeightOption = None,
    model: ModelOption = None,
    requests_per_s: RequestsOption = None,
    work_per_s: WorkOption = None,
    max_requests: OpenOption = None,
    max_queued_jobs: JobsOption = None,
    monthly_work: MonthlyOption = None,
    timeout_s: TimeoutOption = None,
    operator: Annotated[
        bool | None,
        typer.Option("--operator/--no-operator", help="Whether it may administer the server."),
    ] = None,
    unset: Annotated[
        list[str] | None,
        typer.Option(help="Limit to take away, such as monthly_work; repeat it for several."),
    ] = None,
) -> None:
    """Change limits of a tenant; those that are not named stay."""
    changes = _named(
        weight=weight,
        models=model,
        requests_per_s=requests_per_s,
        work_per_s=work_per_s,
        max_requests=max_requests,
        max_queued_jobs=max_queued_jobs,
        monthly_work=monthly_work,
        timeout_s=timeout_s,
        operator=operator,
    )
    changes |= dict.fromkeys(unset or ())
    if not changes:
        raise UsageError("nothing to change: name a limit, such as --monthly-work 200000")
    with _tenants(config, url, key) as tenants:
        tenants.change(tenant, changes)
    console.print(f"{tenant}: changed", highlight=False)


@app.command(
    "remove",
    epilog=examples(
        "octet tenant remove acme --config octet.yaml",
        "octet tenant remove acme --url http://127.0.0.1:8000 --yes",
    ),
)
def remove(
    tenant: Name,
    config: ConfigOption = None,
    url: UrlOption = None,
    key: OperatorKey = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a tenant and revoke its keys for ever. Its usage records and images stay."""
    with _tenants(config, url, key) as tenants:
        if not yes:
            count = len(list(tenants.keys(tenant)))
            console.print(f"This deletes {tenant} and revokes {count} keys.", highlight=False)
            _ask()
        tenants.remove(tenant)
    console.print(f"{tenant}: deleted", highlight=False)


@app.command(
    "list",
    epilog=examples(
        "octet tenant list --config octet.yaml",
        "octet tenant list --url http://127.0.0.1:8000 --json",
    ),
)
def list_tenants(
    config: ConfigOption = None,
    url: UrlOption = None,
    key: OperatorKey = "",
    as_json: AsJson = False,
) -> None:
    """List the tenants, their limits, and their keys."""
    with _tenants(config, url, key) as tenants:
        keys: dict[str, list[dict[str, Any]]] = {}
        for one in tenants.keys(None):
            keys.setdefault(one["tenant"], []).append(one)
        found = [{**one, "keys": keys.get(one["id"], [])} for one in tenants.tenants()]
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    columns = "weight", "models", "limits", "keys (last used)"
    table = Table(Column("tenant", overflow="fold"), *columns)
    for tenant in found:
        limits = dict(tenant["limits"])
        models, weight = limits.pop("models", None), limits.pop("weight", 1)
        name = tenant["id"] + (" (operator)" if limits.pop("operator", False) else "")
        table.add_row(
            name + (" (file)" if tenant["managed_by"] == "file" else ""),
            f"{weight:g}",
            ", ".join(models) if models is not None else "all",
            ", ".join(f"{limit} {value:g}" for limit, value in limits.items()),
            "\n".join(_key_text(one) for one in tenant["keys"]) or "no key",
        )
    Console().print(table)


def _key_text(key: dict[str, Any]) -> str:
    """A key in a table: its id, last use, and what restricts it."""
    used = key["last_used_at"]
    text = f"{key['id']} ({used[:10] if used else 'never'})"
    if len(key["scopes"]) < len(SCOPES):
        text += " " + "+".join(key["scopes"])
    return text + (f" until {key['expires_at'][:16]}" if key["expires_at"] else "")


@app.command(
    "add-key",
    epilog=examples(
        "octet tenant add-key acme --config octet.yaml",
        "octet tenant add-key acme --url http://127.0.0.1:8000 --scope generate",
    ),
)
def add_key(
    tenant: Name,
    config: ConfigOption = None,
    url: UrlOption = None,
    key: OperatorKey = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(help="What the key is for: generate, read or admin. Default: all three."),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="Time until which it is valid, such as 2027-01-31T12:00:00Z.")
    ] = None,
) -> None:
    """Make and print a further key. The old keys stay valid until they are revoked."""
    with _tenants(config, url, key) as tenants:
        _show(tenants.new_key(tenant, scope or SCOPES, expires))


@app.command(
    "revoke",
    epilog=examples(
        "octet tenant revoke acme --config octet.yaml --old",
        "octet tenant revoke acme --url http://127.0.0.1:8000 --id 1f3a95c02b7e",
    ),
)
def revoke(
    tenant: Name,
    config: ConfigOption = None,
    url: UrlOption = None,
    key: OperatorKey = "",
    old: Annotated[bool, typer.Option("--old", help="Revoke all keys except the newest.")] = False,
    id: Annotated[
        str | None, typer.Option("--id", help="Revoke this key only; octet tenant list shows ids.")
    ] = None,
) -> None:
    """Revoke all keys of a tenant, or those that an option names, for ever.

    Every Ingress refuses them within 5 s.
    """
    with _tenants(config, url, key) as tenants:
        found = sorted(tenants.keys(tenant), key=lambda one: one["created_at"])
        if not found and tenant not in [one["id"] for one in tenants.tenants()]:
            raise SettingsError(f"tenant '{tenant}' does not exist")
        if id is not None and id not in [one["id"] for one in found]:
            raise SettingsError(f"{tenant} has no key '{id}': octet tenant list shows the ids")
        chosen = found[:-1] if old else [one for one in found if id in (None, one["id"])]
        for one in chosen:
            tenants.revoke(one["id"])
    console.print(f"{len(chosen)} of the keys of {tenant} revoked", highlight=False)


@app.command(
    "apply",
    epilog=examples(
        "octet tenant apply tenants --config octet.yaml --dry-run",
        "octet tenant apply tenants --url http://127.0.0.1:8000",
    ),
)
def apply(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="Folder with tenants.yaml and keys.json.", callback=existing
        ),
    ],
    config: ConfigOption = None,
    url: UrlOption = None,
    key: OperatorKey = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would change.")
    ] = False,
    managed_by: Annotated[
        ManagedBy,
        typer.Option(help="api: copy the tenants once; the API manages them from then on."),
    ] = ManagedBy.FILE,
    yes: Annotated[bool, typer.Option("--yes", help="Delete and revoke without asking.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make tenants as the files of FOLDER say, and show the differences.

    What earlier files had and these do not have is deleted; keys are revoked for ever.
    Tenants that the API has made and the files do not name stay as they are. Without a keys.json no
    key changes.
    """
    if not (folder / TENANTS).exists():
        raise SettingsError(f"{folder / TENANTS}: no such file")
    with _tenants(config, url, key) as tenants:
        found = tenants.apply(folder, managed_by.value, dry_run=True)
        ends = [one for one in found if one["action"] in ("delete", "revoke key")]
        if ends and not (dry_run or yes):
            names = ", ".join(sorted({one["tenant"] for one in ends}))
            console.print(f"This deletes or revokes keys of: {names}.", highlight=False)
            _ask()
        if not dry_run:
            found = tenants.apply(folder, managed_by.value, dry_run=False)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for one in found:
        changes = ", ".join(f"{name} {old} → {new}" for name, (old, new) in one["changes"].items())
        what = " ".join(filter(None, (one["action"], one["tenant"], one["key_id"])))
        typer.echo(f"{what}: {changes}" if changes else what)
    done = "would change" if dry_run else "changed"
    console.print(f"{len(found)} {done} in {tenants.place}", highlight=False)


@app.command(
    "audit",
    epilog=examples(
        "octet tenant audit --config octet.yaml",
        "octet tenant audit --url http://127.0.0.1:8000 --tenant acme --json",
    ),
)
def audit(
    config: ConfigOption = None,
    url: UrlOption = None,
    key: OperatorKey = "",
    tenant: Annotated[str | None, typer.Option(help="Show this tenant only; default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show who changed which tenant or key, and when, oldest first."""
    with _tenants(config, url, key) as tenants:
        found = list(tenants.audit(tenant))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    table = Table(
        Column("time", no_wrap=True),
        Column("change", no_wrap=True),
        Column("tenant", overflow="fold"),
        Column("key", no_wrap=True),
        Column("by", overflow="fold"),
        Column("details", overflow="fold"),
    )
    for one in found:
        details = json.dumps(one["details"]) if one["details"] else ""
        table.add_row(
            one["time"][:19], one["action"], one["tenant"], one["key_id"], one["actor"], details
        )
    Console().print(table)


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
    """Delete a tenant's images, usage records and jobs for ever. Revoke its keys first."""
    if config is None:
        raise UsageError("whose images? Name a settings file with --config")
    settings = load_settings(config)
    source = StoredUsage(settings)
    if not yes:
        _confirm_erasure(settings, tenant, source)
    with ExitStack() as cleanup:
        images = erased = jobs = 0
        try:
            erased, jobs = source.erase(tenant)  # first, because running jobs would add images
            if settings.data_folder:
                store = open_store(settings, drain=False)
                cleanup.callback(store.close)
                images = store.erase(tenant)
        except (OSError, StoreFailed) as error:
            raise SettingsError(str(error)) from None
    console.print(
        f"{images} images, {erased} records and {jobs} jobs of {tenant} are deleted",
        highlight=False,
    )


def _confirm_erasure(settings: Settings, tenant: str, source: StoredUsage) -> None:
    """Say what an erasure deletes, and ask. Raises `SettingsError` unless the answer is yes."""
    records = sum(1 for _ in source.read(tenant=tenant))
    with closing(StoredTenants(settings)) as tenants:
        has_keys = any(True for _ in tenants.keys(tenant))
    place = f"the bucket {settings.s3.bucket}" if settings.s3 else settings.data_folder
    images = f"all images of {tenant} in {place}, and " if place else ""
    console.print(
        f"This deletes {images}{records} usage records and all jobs in {source.place}.",
        highlight=False,
    )
    if has_keys:
        console.print(
            f"The keys of {tenant} still work: revoke them first with octet tenant revoke {tenant}",
            highlight=False,
        )
    _ask()


def _named(**limits: Any) -> dict[str, Any]:
    """The limits that options have named."""
    return {name: value for name, value in limits.items() if value is not None and value != []}


def _ask() -> None:
    """Ask whether to delete. Raises `SettingsError` unless the answer is yes."""
    if not sys.stdin.isatty():
        raise UsageError("nothing is deleted: there is no terminal to ask; add --yes")
    if not typer.confirm("Delete for ever?"):
        raise SettingsError("nothing is deleted")


@contextmanager
def _tenants(
    config: Path | None, url: str | None, key: str
) -> Iterator[StoredTenants | RemoteTenants]:
    """The tenants of a settings file's database, or of the server at `url`."""
    if (config is None) == (url is None):
        raise UsageError(
            "whose tenants? Name a settings file with --config, or a running server with --url"
        )
    found = RemoteTenants(url, key) if url else StoredTenants(load_settings(config or Path()))
    with closing(found):
        yield found


def _show(key: str) -> None:
    console.print("The key, valid within 5 s. It is shown only this once:", highlight=False)
    sys.stdout.write(key + "\n")
