"""The nodes of the Ray cluster that this process belongs to."""

from __future__ import annotations

import ray
from ray._private.state import state

from .placement import Node


def living_nodes() -> list[Node]:
    """Blocks for two calls to Ray's control store. Raises Ray's errors."""
    draining = state.get_draining_nodes()  # Ray has no public call for it
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
