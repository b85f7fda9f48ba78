"""Tables of `octet top`: the state of a server, and the files that it could not read."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

SHOWN = 30  # tenants in the table: those with the most running and queued images


def overview_table(state: dict[str, Any]) -> Group:
    """Tables of pools, tenants and nodes; `state` is the answer of `GET /v1/state`."""
    head = f"{state['calls']} requests open, {state['queued']} images queued"
    pools = Table(title=head + (" · draining" if state["draining"] else ""), title_justify="left")
    for name in ("pool", "ready / wanted", "slots used", "work left", "speed"):
        pools.add_column(name, justify="left" if name == "pool" else "right")
    for name, pool in state["pools"].items():
        used = f"{pool['running']} / {pool['slots']}"
        missing = "" if pool["replicas"] or pool["placeable"] else " (no node)"
        replicas = f"{pool['replicas']} / {pool['wanted']}"
        row = replicas, used, f"{pool['running_work_s']:.1f}", f"{pool['speed']:.2f}"
        pools.add_row(name + missing, *row)
    tenants = Table()
    for name in ("tenant", "weight", "requests", "running", "queued", "queued work", "this month"):
        tenants.add_column(name, justify="left" if name == "tenant" else "right")
    for row in state["tenants"][:SHOWN]:
        budget = row["monthly_work"]
        tenants.add_row(
            row["tenant"],
            f"{row['weight']:g}",
            *(str(row[name]) for name in ("calls", "running", "queued")),
            f"{row['queued_work']:.1f}",
            f"{row['spent']:.1f}" + ("" if budget is None else f" / {budget:g}"),
        )
    reasons = [
        f"[dim]{escape(name + ': ' + pool['reason'])}[/]"
        for name, pool in state["pools"].items()
        if pool["reason"]
    ]
    more = len(state["tenants"]) - SHOWN
    faults = [f"[red]{escape(f'{name}: {fault}')}[/]" for name, fault in state["faults"].items()]
    quarantined = [
        f"[yellow]{escape(r['tenant'])}: request {r['request_id']} has killed replicas and is "
        f"refused; DELETE /v1/quarantine/{r['id']} lets it pass again[/]"
        for r in state["quarantined"]
    ]
    nodes = Table()
    for name in ("node", "card", "replicas", "state"):
        nodes.add_column(name, justify="right" if name == "replicas" else "left")
    for row in state["nodes"]:
        draining = "draining" if row["draining"] else ""
        cordoned = f"[red]cordoned: {escape(row['cordoned'])}[/]" if row["cordoned"] else draining
        nodes.add_row(row["node"][:12], row["card"], str(row["replicas"]), cordoned)
    here = {row["node"] for row in state["nodes"]}
    gone = [
        f"[red]{escape(one['node'][:12])}, which is gone, is cordoned: {escape(one['reason'])}[/]"
        for one in state["cordoned"]
        if one["node"] not in here
    ]
    extra = f"and {more} more" if more > 0 else ""
    return Group(pools, *reasons, tenants, extra, nodes, *gone, *faults, *quarantined)
