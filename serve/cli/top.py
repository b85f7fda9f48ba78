"""`octet top`: show a server's pools, slots and queue in the terminal, once per second."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape

from ..errors import SettingsError
from .terminal import Debug, readable_errors
from .top_table import overview_table

ANSWER_S = 5.0


def top(
    url: Annotated[str, typer.Argument(help="Address of the server.")] = "http://127.0.0.1:8000",
    key: Annotated[
        str, typer.Option(envvar="OCTET_KEY", help="API key of an operator.", show_default=False)
    ] = "",
    once: Annotated[bool, typer.Option("--once", help="Print the tables once, then exit.")] = False,
    debug: Debug = False,
) -> None:
    """Show a server's pools and slots and each tenant's queue, updated every second."""
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
                except SettingsError as error:  # the server may be restarting: go on
                    live.update(Group(shown, f"[red]{escape(str(error))}[/]"), refresh=True)
                else:
                    live.update(shown, refresh=True)


def _state(url: str, key: str) -> dict[str, Any]:
    """The answer of `GET /v1/state`.

    Raises `SettingsError` if the server does not answer, refuses the key, or is not Octet's.
    """
    if not url.startswith(("http://", "https://")):
        raise SettingsError(f"'{url}' is no http address: expected http://HOST:PORT")
    headers = {"authorization": f"Bearer {key.strip()}"} if key else {}
    request = urllib.request.Request(url.rstrip("/") + "/v1/state", headers=headers)  # noqa: S310 - checked
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=ANSWER_S) as answer:
            state: dict[str, Any] = json.load(answer)
            return state
    except urllib.error.HTTPError as error:
        reasons = {401: "the key is missing or wrong", 404: "the key is not an operator's"}
        raise SettingsError(f"{url}: {reasons.get(error.code, error.reason)}") from None
    except OSError as error:
        raise SettingsError(f"{url}: {getattr(error, 'reason', error)}") from None
    except (ValueError, http.client.HTTPException) as error:  # the error's text may hold the key
        raise SettingsError(f"{url}: the answer is not Octet's ({type(error).__name__})") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, so that the key is sent to one server only."""

    def redirect_request(self, *_: Any) -> None:
        return None
