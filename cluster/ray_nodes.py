"""The nodes of the Ray cluster that this process belongs to."""

from __future__ import annotations

import ray

from .placement import Node


def living_nodes() -> list[Node]:
    """Blocks for a call to Ray's control store. Raises Ray's errors."""
    return [
        Node(
            id=node["NodeID"],
            labels=node["Labels"],
            num_cpus=node["Resources"].get("CPU", 0.0),
            num_gpus=node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
