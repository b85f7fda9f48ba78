"""`octet store`: back up the database of the settings, and import usage from files into it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SettingsError
from ..settings.application import Settings
from ..settings.file import load_settings
from ..usage.json_lines import usage_files
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
        typer.Option(help="Folder with the usage records; default: usage in data_folder."),
    ] = None,
) -> None:
    """Copy usage records that an earlier release kept in files into the database of CONFIG.

    They keep their times. It may be repeated: records that are there already are left alone.
    """
    settings = load_settings(config)
    source = folder
    if source is None and settings.data_folder:
        source = Path(settings.data_folder).expanduser() / "usage"
    if source is None or not usage_files(source):
        raise SettingsError(f"{source or config}: there are no files of usage records: --folder")
    from ..store.database import Database
    from ..usage.ledger import import_folder

    database = Database(**_store(config, settings))
    try:
        with working(f"importing {source}"):
            count = import_folder(database, source)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    finally:
        database.close()
    console.print(f"{count} records imported into {database.name}", highlight=False)


def _store(config: Path, settings: Settings) -> dict[str, Any]:
    """The arguments of the database. Raises `SettingsError` if the settings name none."""
    if settings.database is None:
        raise SettingsError(f"{config}: it names no database: set data_folder, or store: url")
    return settings.database
