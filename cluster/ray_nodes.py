"""The nodes of the Ray cluster that this process belongs to."""

from __future__ import annotations

import time

import ray
from ray._private.state import actors, state

from .placement import Node

FOR_GOOD_S = 10 * 365 * 24 * 3600.0


def cluster_id() -> str:
    """The id of this Ray cluster, which no other cluster has; it survives a restart of the head."""
    return str(ray._private.worker.global_worker.gcs_client.cluster_id.hex())


def living_nodes() -> list[Node]:
    """The living nodes.

    Blocks for two calls to Ray's control store. Raises Ray's errors if the store does not answer.
    """
    draining = state.get_draining_nodes()  # Ray has no public call for this
    return [
        Node(
            id=node["NodeID"],
            labels=node["Labels"],
            num_cpus=node["Resources"].get("CPU", 0.0),
            num_gpus=node["Resources"].get("GPU", 0.0),
            draining=node["NodeID"] in draining,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def drain(node_id: str, seconds: float) -> None:
    """Drain a node: Ray places nothing new on it, and expects the node to end after `seconds`.

    Ray Serve starts replacements of the node's replicas elsewhere, then ends each replica of the
    node when it is idle. A replica that stays busy is told to end earlier than `seconds`, by the
    time that it has for shutting down. Raises `RuntimeError` if Ray refuses.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
    from ray.core.generated import autoscaler_pb2

    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, why = gcs.drain_node(
        node_id,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "the pod ends",
        int((time.time() + seconds) * 1000),
    )
    if not accepted:
        raise RuntimeError(f"node {node_id[:8]}: Ray refuses to drain it: {why}")


def drain_for_good(node_id: str) -> None:
    """Drain a node without a time at which it ends. Ray cannot undo this.

    Raises `RuntimeError` if Ray refuses.
    """
    drain(node_id, FOR_GOOD_S)


def actors_on(node_id: str) -> list[str]:
    """The names of the living named actors on a node: Ray Serve's replicas and proxy."""
    return [
        actor["Name"]
        for actor in actors().values()
        if actor["State"] == "ALIVE" and actor["Address"]["NodeID"] == node_id and actor["Name"]
    ]
