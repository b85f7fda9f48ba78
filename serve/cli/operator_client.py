"""Calls of a running server by commands of an operator."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Annotated, Any

import typer

from ..errors import SettingsError
from .exit_codes import UsageError

ANSWER_S = 5.0
ServerUrl = Annotated[str, typer.Argument(metavar="URL", help="Address of the server.")]
OperatorKey = Annotated[
    str, typer.Option(envvar="OCTET_KEY", help="API key of an operator.", show_default=False)
]


def call(
    url: str, key: str, path: str, method: str = "GET", body: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The answer of a server to an operator's request; an empty `key` is not sent.

    Raises `SettingsError` if the server does not answer, refuses the request, or is not Octet's.
    """
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"'{url}' is no http address: expected http://HOST:PORT")
    headers = {"authorization": f"Bearer {key.strip()}"} if key else {}
    request = urllib.request.Request(  # noqa: S310 - checked above
        server_root(url) + path,
        headers={**headers, "content-type": "application/json"},
        method=method,
        data=None if body is None else json.dumps(body).encode(),
    )
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=ANSWER_S) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        raise SettingsError(f"{url}: {_reason(error)}") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        reason = getattr(reason, "strerror", None) or reason
        raise SettingsError(f"{url}: {reason}: is the server running?") from None
    except (ValueError, http.client.HTTPException) as error:  # the error's text may hold the key
        raise SettingsError(f"{url}: the answer is not Octet's ({type(error).__name__})") from None


def _reason(error: urllib.error.HTTPError) -> str:
    """Why the server refused a request, in words."""
    if error.code == 401:
        return "the key is missing or wrong"
    try:
        message = str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return str(error.reason)
    if ": Not Found" in message:
        return "the key is not an operator's, or the address is not that of the server itself"
    return message


def server_root(url: str) -> str:
    """The address of a server, also if OpenAI's base URL of it is given, which ends in /v1."""
    return url.rstrip("/").removesuffix("/v1")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, so that the key is sent to one server only."""

    def redirect_request(self, *_: Any) -> None:
        return None
