"""Overviews of tenants and nodes, as rows for people and metrics.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TypedDict

from cluster.placement import Node

from .admission import Admission
from .cordons import Cordons
from .grants import Grants


class TenantRow(TypedDict):
    """One tenant; work is in seconds of a reference replica."""

    tenant: str
    weight: float
    calls: int
    queued: int
    queued_work: float
    running: int
    spent: float  # work charged this month
    monthly_work: float | None


def overview(admission: Admission, grants: Grants) -> list[TenantRow]:
    """A row for every tenant that has called, sorted by queued and then by running images."""
    running = grants.running_by_tenant()
    rows: list[TenantRow] = []
    for name, account, calls in admission.accounts():
        queued, queued_work = grants.queue.waiting(name)
        rows.append(
            {
                "tenant": name,
                "weight": grants.queue.weight(name),
                "calls": calls,
                "queued": queued,
                "queued_work": queued_work,
                "running": running.get(name, 0),
                "spent": account.spent,
                "monthly_work": account.tenant.monthly_work,
            }
        )
    return sorted(rows, key=lambda row: (-row["queued"], -row["running"], row["tenant"]))


class NodeRow(TypedDict):
    """One living node; `cordoned`: why the node gets no new work, empty if it does."""

    node: str
    card: str
    replicas: int
    draining: bool
    cordoned: str


def nodes_overview(nodes: Iterable[Node], grants: Grants, cordons: Cordons) -> list[NodeRow]:
    """A row for every living node, with the number of its Generators."""
    replicas = Counter(r.node for pool in grants.pools for r in grants.replicas(pool))
    return [
        {
            "node": node.id,
            "card": node.card.id if node.card else "",
            "replicas": replicas[node.id],
            "draining": node.id in grants.draining,
            "cordoned": cordons.cordoned[node.id].reason if node.id in cordons.cordoned else "",
        }
        for node in nodes
    ]
