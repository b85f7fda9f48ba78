"""`octet node`: cordon a node of a running server, so that it gets no new work."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

import typer

from .exit_codes import UsageError
from .operator_client import OperatorKey, call
from .terminal import console, examples

app = typer.Typer(help="Take nodes with failing cards out of service.", no_args_is_help=True)

Node = Annotated[
    str,
    typer.Argument(metavar="NODE", help="Id of the node, or its beginning, as octet top shows it."),
]
Url = Annotated[str, typer.Option(help="Address of the server.")]
HERE = "http://127.0.0.1:8000"


@app.command(
    epilog=examples(
        "octet node cordon 3f9ac2",
        'octet node cordon 3f9ac2 --url https://images.example --reason "fan is loud"',
    )
)
def cordon(
    node: Node,
    url: Url = HERE,
    key: OperatorKey = "",
    reason: Annotated[str, typer.Option(help="Shown by octet top.")] = "by an operator",
) -> None:
    """Give a node no new work; its images are finished, and its replicas move elsewhere.

    Ray cannot undo this for the node itself: after uncordon, its successor gets work.
    """
    answer = call(url, key, _path(node), "PUT", {"reason": reason})
    console.print(f"{answer['node']} is cordoned", highlight=False, soft_wrap=True)


@app.command(
    epilog=examples(
        "octet node uncordon 3f9ac2", "octet node uncordon 3f9ac2 --url https://images.example"
    )
)
def uncordon(node: Node, url: Url = HERE, key: OperatorKey = "") -> None:
    """Let a node get work again, and new nodes with the same cards."""
    answer = call(url, key, _path(node), "DELETE")
    text = f"{answer['node']} is no longer cordoned; restart it if Ray has drained it"
    console.print(text, highlight=False, soft_wrap=True)


def _path(node: str) -> str:
    if not node:
        raise UsageError("NODE is empty: octet top shows the ids of the nodes")
    return f"/v1/nodes/{quote(node, safe='')}/cordon"
