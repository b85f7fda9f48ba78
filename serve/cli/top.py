"""`octet top`: show a server's pools, slots and queue in the terminal, once per second."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape

from ..errors import SettingsError
from .operator_client import OperatorKey, ServerUrl, call
from .terminal import Debug, readable_errors
from .top_table import overview_table

STATE = "/v1/state"


def top(
    url: ServerUrl = "http://127.0.0.1:8000",
    key: OperatorKey = "",
    once: Annotated[bool, typer.Option("--once", help="Print the tables once, then exit.")] = False,
    debug: Debug = False,
) -> None:
    """Show a server's pools and slots and each tenant's queue, updated every second."""
    with readable_errors(debug):
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
