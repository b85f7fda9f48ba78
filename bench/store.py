"""How many usage records a second the ledger writes, to SQLite and to PostgreSQL by URL.

    python -m bench.store [--url postgresql://…]

Each append waits until its records are on disk. The kinds take turns, so that a change of the
machine's speed meets all of them.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from serve.settings.application import sqlite_url
from serve.store.database import Database
from serve.usage.ledger import UsageLedger
from serve.usage.record import UsageRecord

from .machine import machine

ROUNDS, APPENDS, TOGETHER = 7, 40, (1, 64)


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


def main(
    url: Annotated[str | None, typer.Option(help="A PostgreSQL that may be written to.")] = None,
) -> None:
    """Print the medians of records a second."""
    now, records = time.time(), fresh_records()
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        ledgers = {"SQLite": UsageLedger(Database(sqlite_url(folder)), now)}
        if url:
            ledgers["PostgreSQL"] = UsageLedger(Database(url), now)
        found: dict[tuple[str, int], list[float]] = {}
        for _ in range(ROUNDS):
            for together in TOGETHER:
                for kind, ledger in ledgers.items():
                    rate = appended_per_s(ledger, records, together)
                    found.setdefault((kind, together), []).append(rate)
        for ledger in ledgers.values():
            ledger.close()
    print(f"{machine()}\n")
    print("| records/s | " + " | ".join(f"{n} an append" for n in TOGETHER) + " |")
    print("|---|" + "---|" * len(TOGETHER))
    for kind in ledgers:
        cells = (f"{statistics.median(found[kind, n]):.0f}" for n in TOGETHER)
        print(f"| {kind} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    typer.run(main)
