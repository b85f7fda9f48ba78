"""`octet k8s`: the application on KubeRay."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Annotated

import typer

from k8s.render import read_nodes, rendered, too_few

from ..launch import LaunchError
from ..settings.file import load_settings
from .terminal import ConfigFile, Debug, complain, console, readable_errors

LOOK_S = 1.0
ANSWER_S = 5.0
HANG_S = 30

app = typer.Typer(help="The application on Kubernetes: docs/runbook.md.", no_args_is_help=True)


@app.command()
def render(
    config: ConfigFile,
    overlay: Annotated[
        Path, typer.Option(help="Kustomize overlay with a nodes.yaml; see k8s/overlays/.")
    ],
    debug: Debug = False,
) -> None:
    """Write what CONFIG means for KubeRay into OVERLAY/rendered, for kubectl apply -k OVERLAY."""
    with readable_errors(debug):
        settings, kinds = load_settings(config), read_nodes(overlay / "nodes.yaml")
        files = rendered(settings, kinds)
        folder = overlay / "rendered"
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
            console.print(f"written: {folder / name}", highlight=False, soft_wrap=True)
        for shortage in too_few(settings, kinds):
            complain(shortage)


@app.command()
def leave(
    patience_s: Annotated[int, typer.Argument(min=1, help="How long it may take.")],
    node: Annotated[str | None, typer.Option(help="Ray's id of it; default: this one.")] = None,
    debug: Debug = False,
) -> None:
    """Take a node out of its Ray cluster gently; returns when nothing is served there any more.

    The pods' preStop hook: what is drawn there is finished, then the pod may end. PATIENCE_S is
    more than drain_timeout_s, or Ray Serve ends replicas at once.
    """
    with readable_errors(debug):
        address = os.environ.get("RAY_ADDRESS", "127.0.0.1:6379")
        _check_answers(address)
        signal.alarm(patience_s + HANG_S)  # Ray's calls wait for minutes for a head that is gone
        import ray
        from ray.exceptions import RayError

        from cluster.ray_nodes import actors_on, drain

        try:
            ray.init(address=address, log_to_driver=False, logging_level="error")
            node = node or ray.get_runtime_context().get_node_id()
            until = time.monotonic() + patience_s
            drain(node, patience_s)
            while (left := actors_on(node)) and time.monotonic() < until:
                time.sleep(LOOK_S)
        except (ConnectionError, ValueError, RuntimeError, RayError) as error:
            raise LaunchError(f"cannot leave: {error}") from None
        finally:
            ray.shutdown()
            signal.alarm(0)
    console.print(f"still there: {', '.join(left)}" if left else "nothing is served there any more")


def _check_answers(address: str) -> None:
    """Raises `LaunchError` if there is no Ray: its client would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), ANSWER_S).close()
    except (OSError, ValueError) as error:
        raise LaunchError(f"no Ray at {address}: {error}") from None
