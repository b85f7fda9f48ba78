"""What the database costs: usage records a second, and 10,000 tenants.

    python -m bench.store [--url postgresql://…]

Each append waits until its records are on disk. The kinds of database take turns, so that a change
of the machine's speed meets all of them.
"""

from __future__ import annotations

import itertools
import pickle
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated

import typer

from serve.settings.application import sqlite_url
from serve.store.database import Database
from serve.tenants.administration import Administration
from serve.tenants.keys import TenantDirectory, digest
from serve.tenants.registry import TenantRegistry
from serve.tenants.tenant import Tenant
from serve.usage.ledger import UsageLedger
from serve.usage.record import UsageRecord

from .machine import machine

ROUNDS, APPENDS, TOGETHER = 7, 40, (1, 64)
TENANTS, CHANGES = 10_000, 20


def fresh_records() -> Iterator[UsageRecord]:
    """Records that no ledger has."""
    run = f"{time.time_ns():x}"
    for number in itertools.count():
        yield UsageRecord(
            f"{run}-{number}", 0, f"t{number % 50}", "r", "m", "fp8", "1024x1024", 28, 1.0
        )


def appended_per_s(ledger: UsageLedger, records: Iterator[UsageRecord], together: int) -> float:
    """Records a second over `APPENDS` appends of `together` records."""
    parts = [list(itertools.islice(records, together)) for _ in range(APPENDS)]
    began = time.perf_counter()
    for part in parts:
        ledger.append(part, time.time())
    return APPENDS * together / (time.perf_counter() - began)


def measure_usage(urls: dict[str, str]) -> None:
    """Print the medians of records a second."""
    records = fresh_records()
    found: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as cleanup:
        ledgers = {
            kind: UsageLedger(cleanup.enter_context(closing(Database(url))), time.time())
            for kind, url in urls.items()
        }
        for _ in range(ROUNDS):
            for together in TOGETHER:
                for kind, ledger in ledgers.items():
                    rate = appended_per_s(ledger, records, together)
                    found.setdefault((kind, together), []).append(rate)
    print("| records/s | " + " | ".join(f"{n} an append" for n in TOGETHER) + " |")
    print("|---|" + "---|" * len(TOGETHER))
    for kind in urls:
        cells = (f"{statistics.median(found[kind, n]):.0f}" for n in TOGETHER)
        print(f"| {kind} | " + " | ".join(cells) + " |")


def measure_tenants(urls: dict[str, str]) -> None:
    """Print what 10,000 tenants with a key each cost at a start, and what a change costs."""
    names = [f"tenant-{i:05}" for i in range(TENANTS)]
    tenants = {name: Tenant(weight=2, requests_per_s=5, monthly_work=1000) for name in names}
    keys = {name: [{"sha256": digest(name), "created": "2026"}] for name in names}
    print(f"\n| {TENANTS} tenants | files applied | start | a change | memory | first message |")
    print("|---|---|---|---|---|---|")
    for kind, url in urls.items():
        with closing(Database(url)) as one, closing(Database(url)) as other:
            admin = Administration(one, time.time)
            began = time.perf_counter()
            admin.apply("bench", tenants, keys)
            applied_s = time.perf_counter() - began
            began = time.perf_counter()
            registry, directory = TenantRegistry(other), TenantDirectory()
            directory.change(registry.whole)
            start_s = time.perf_counter() - began
            changes_s = []
            for name in names[:CHANGES]:
                began = time.perf_counter()
                admin.revoke_key("bench", digest(name)[:12])
                if changes := registry.read():
                    directory.change(changes)
                changes_s.append(time.perf_counter() - began)
            tracemalloc.start()
            kept = TenantRegistry(other)
            kept_mib = tracemalloc.get_traced_memory()[0] / 2**20
            tracemalloc.stop()
            message_mib = len(pickle.dumps(kept.whole)) / 2**20
            admin.apply("bench", {}, {})
        print(
            f"| {kind} | {applied_s:.2f} s | {start_s:.2f} s "
            f"| {statistics.median(changes_s) * 1000:.0f} ms | {kept_mib:.0f} MiB "
            f"| {message_mib:.1f} MiB |"
        )


def main(
    url: Annotated[str | None, typer.Option(help="A PostgreSQL that may be written to.")] = None,
) -> None:
    """Print both tables."""
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory() as folder:
        urls = {"SQLite": sqlite_url(Path(folder))} | ({"PostgreSQL": url} if url else {})
        measure_usage(urls)
        measure_tenants(urls)


if __name__ == "__main__":
    typer.run(main)
