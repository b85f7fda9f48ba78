"""`octet store`: back up the database of the settings, and import usage from files into it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SettingsError
from ..settings.application import Settings
from ..settings.file import load_settings
from ..usage.ledger import read_usage
from .terminal import ConfigFile, console, examples, working

app = typer.Typer(help="Back up the database, and import usage into it.", no_args_is_help=True)


@app.command(
    epilog=examples(
        "octet store backup octet.yaml backup.db", "octet store backup octet.yaml /mnt/nas/today.db"
    )
)
def backup(
    config: ConfigFile,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to create.")],
) -> None:
    """Copy the SQLite database of CONFIG to FILE while it is used. To restore, copy it back.

    PostgreSQL has tools of its own: pg_dump, or a continuous archive.
    """
    settings = load_settings(config)
    from ..store.database import Database

    with working("copying the database"):
        database = Database(**_store(config, settings))
        database.backup(file)
        database.close()
    console.print(f"{file}: written", highlight=False)


@app.command(
    "import",
    epilog=examples(
        "octet store import octet.yaml", "octet store import octet.yaml --folder old/usage"
    ),
)
def import_usage(
    config: ConfigFile,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder with the usage records; default: usage_folder of CONFIG."),
    ] = None,
) -> None:
    """Copy the usage records of a folder into the database of CONFIG, with their times.

    It may be repeated: records that are there already are left alone.
    """
    settings = load_settings(config)
    source = folder or (Path(settings.usage_path).expanduser() if settings.usage_path else None)
    if source is None or not source.is_dir():
        raise SettingsError(f"{source or config}: there is no folder of usage records: --folder")
    from ..store.database import Database
    from ..usage.sql_ledger import import_records

    database = Database(**_store(config, settings))
    try:
        with working(f"importing {source}"):
            count = import_records(database, read_usage(source))
    except ValueError as error:
        raise SettingsError(str(error)) from None
    finally:
        database.close()
    console.print(f"{count} records imported into {database.name}", highlight=False)


def _store(config: Path, settings: Settings) -> dict[str, Any]:
    """The arguments of the database. Raises `SettingsError` if the settings name none."""
    if settings.store is None:
        raise SettingsError(f"{config}: it names no database: set store (docs/tenants.md)")
    return settings.store.model_dump()
