"""`octet top`: show a server's pools, slots and queue in the terminal, once per second."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape

from ..errors import SettingsError
from .operator_client import OperatorKey, ServerUrl, call
from .top_table import overview_table

STATE = "/v1/state"


def top(
    url: ServerUrl = "http://127.0.0.1:8000",
    key: OperatorKey = "",
    once: Annotated[bool, typer.Option("--once", help="Print the tables once, then exit.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answer of /v1/state as JSON once, then exit.")
    ] = False,
) -> None:
    """Show a server's pools and slots and each tenant's queue, updated every second."""
    if as_json:
        typer.echo(json.dumps(call(url, key, STATE), indent=1))
        return
    if once:
        Console().print(overview_table(call(url, key, STATE)))
        return
    shown = overview_table(call(url, key, STATE))
    with Live(shown, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)
            try:
                shown = overview_table(call(url, key, STATE))
            except SettingsError as error:  # the server may be restarting: go on
                live.update(Group(shown, f"[red]{escape(str(error))}[/]"), refresh=True)
            else:
                live.update(shown, refresh=True)
