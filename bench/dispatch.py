"""Compare what the Dispatcher does per second with what an earlier version did, in one run.

    python -m bench.dispatch [--quick] [--against COMMIT]

Both versions run `bench/dispatch_load.py` in turn, each in a process of its own and on one core.
The rows are medians. `requests/s`: requests that are admitted, granted and ended per second of CPU,
heartbeats included. `heartbeats`: the part of one core that the heartbeats of 3,000 replicas would
take, one each second. Network and Ray are left out: they cost the same for both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from .machine import machine

ROOT = Path(__file__).parent.parent
OUT = ROOT / "build" / "bench"
BEFORE = "824f663"  # the last commit whose Dispatcher granted pools instead of replicas
CASES = (100, 10), (1000, 10), (100, 1000), (1000, 1000)  # replicas and tenants
BEATING = 3000  # replicas whose heartbeats are to take little


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """The tree of a commit, in a folder that is deleted afterwards."""
    folder = ROOT / "build" / f"before-{os.getpid()}"
    folder.parent.mkdir(exist_ok=True)
    git = ["git", "-C", str(ROOT), "worktree"]
    add = [*git, "add", "--force", "--detach", str(folder), commit]
    subprocess.run(add, check=True, capture_output=True)  # noqa: S603 - our own repository
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", folder], check=True)  # noqa: S603 - as above


def measure(tree: Path, replicas: int, tenants: int, seconds: float) -> dict[str, float]:
    """Run the load with the code of a tree; return what it counted."""
    done = subprocess.run(  # noqa: S603 - our own script
        [
            *(sys.executable, "-P", "-W", "ignore", ROOT / "bench" / "dispatch_load.py"),
            *map(str, (replicas, tenants, seconds)),
        ],
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(before: Path, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each case: requests per second before and now, and the heartbeats' part."""
    rows = []
    for replicas, tenants in CASES:
        runs: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
        for _ in range(rounds):
            runs["before"].append(measure(before, replicas, tenants, seconds))
            runs["now"].append(measure(ROOT, replicas, tenants, seconds))
        rate = {of: median(run["requests_per_s"] for run in found) for of, found in runs.items()}
        beat_us = {of: median(run["heartbeat_us"] for run in found) for of, found in runs.items()}
        rows.append(
            {
                "replicas": replicas,
                "tenants": tenants,
                "before": round(rate["before"]),
                "now": round(rate["now"]),
                "ratio": round(rate["now"] / rate["before"], 2),
                "heartbeats_before": round(BEATING * beat_us["before"] / 1e6, 3),
                "heartbeats_now": round(BEATING * beat_us["now"] / 1e6, 3),
            }
        )
        print(f"{replicas} replicas, {tenants} tenants: {rows[-1]}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="about a minute, one round")
    parser.add_argument("--against", default=BEFORE, help="the earlier commit")
    given = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core, for both
    with checkout(given.against) as before:
        rows = compared(before, 1 if given.quick else 5, 2.0 if given.quick else 5.0)
    OUT.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "quick": given.quick, "against": given.against, "rows": rows}
    (OUT / "dispatch.json").write_text(json.dumps(report, indent=1))
    print(f"\n{machine()}; before: {given.against}\n")
    print("| replicas | tenants | requests/s before | now | ratio | heartbeats before | now |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        beats = f"{row['heartbeats_before']:.1%} | {row['heartbeats_now']:.1%}"
        print(
            f"| {row['replicas']} | {row['tenants']} | {row['before']} | {row['now']} "
            f"| {row['ratio']:.2f} | {beats} |"
        )
    print(f"\n{OUT / 'dispatch.json'}")


if __name__ == "__main__":
    main()
