"""`octet k8s`: render the manifests for KubeRay, and take a node out of its Ray cluster."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Annotated

import typer

from k8s.render import Images, read_nodes, rendered, too_few

from ..launch import LaunchError
from ..settings.file import load_settings
from .ray_cluster import check_listening
from .terminal import ConfigFile, complain, console, examples, existing

LOOK_S = 1.0
HANG_S = 30

app = typer.Typer(help="Run Octet on Kubernetes; see docs/runbook.md.", no_args_is_help=True)


@app.command(
    epilog=examples(
        "octet k8s render octet.yaml --overlay k8s/overlays/single-gpu",
        "octet k8s render octet.yaml --overlay production --require-digests",
    )
)
def render(
    config: ConfigFile,
    overlay: Annotated[
        Path,
        typer.Option(
            help="Folder of a Kustomize overlay with a nodes.yaml; see k8s/overlays/.",
            callback=existing,
        ),
    ],
    image: Annotated[
        str | None,
        typer.Option(help="Container image of pods with cards; default: the kustomization's."),
    ] = None,
    cpu_image: Annotated[
        str | None,
        typer.Option(help="Container image of the head and of pods without a card."),
    ] = None,
    require_digests: Annotated[
        bool, typer.Option("--require-digests", help="Refuse images that are not given by digest.")
    ] = False,
) -> None:
    """Write the manifests for CONFIG into OVERLAY/rendered; then run kubectl apply -k OVERLAY."""
    settings, kinds = load_settings(config), read_nodes(overlay / "nodes.yaml")
    images = Images(image, cpu_image)
    if require_digests:
        images.check_digests(kinds)
    files = rendered(settings, kinds, images)
    folder = overlay / "rendered"
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
        console.print(f"written: {folder / name}", highlight=False, soft_wrap=True)
    for shortage in too_few(settings, kinds):
        complain(shortage)


@app.command(
    epilog=examples(
        "octet k8s leave 200", "RAY_ADDRESS=10.0.0.5:6379 octet k8s leave 200 --node 3f9ac2"
    )
)
def leave(
    patience_s: Annotated[
        int,
        typer.Argument(
            metavar="PATIENCE_S", min=1, help="Seconds to wait for the node's work to end."
        ),
    ],
    node: Annotated[
        str | None, typer.Option(help="Ray id of the node; default: the node that this runs on.")
    ] = None,
) -> None:
    """Drain a node of a Ray cluster, and return when nothing is served on it any more.

    Pods run this as their preStop hook: running images are finished, then the pod may end.
    PATIENCE_S must be more than drain_timeout_s, or Ray Serve stops the replicas at once.
    """
    address = os.environ.get("RAY_ADDRESS", "127.0.0.1:6379")
    check_listening(address)
    signal.alarm(patience_s + HANG_S)  # Ray's calls wait for minutes if the head node is gone
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # and ignore Ctrl-C meanwhile
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
        raise LaunchError(f"the node cannot leave the cluster: {error}") from None
    finally:
        ray.shutdown()
        signal.alarm(0)
    console.print(
        f"still running on the node: {', '.join(left)}"
        if left
        else "nothing is served there any more"
    )
