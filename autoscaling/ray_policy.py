"""How many replicas Ray Serve should run of each pool.

Every pool asks for its full size from the start, whether nodes are there or not: replicas that
wait for a node tell Ray's autoscaler to add one, and do not hold up the application, because the
pool's minimum is zero. Load does not count yet.
"""

from __future__ import annotations

from typing import Any


def full_size(context: Any) -> tuple[int, dict[str, Any]]:
    """Ray Serve's autoscaling policy interface: replicas wanted, and state for the next call."""
    return int(context.capacity_adjusted_max_replicas), {}
