"""Overview of tenants: their open work and their usage, as rows for people and metrics.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from typing import TypedDict

from .admission import Admission
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
