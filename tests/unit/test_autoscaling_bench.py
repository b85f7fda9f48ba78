"""Tests of how `bench.autoscaling` tunes policies and chooses among their parameters."""

from __future__ import annotations

from typing import Any

import pytest

from autoscaling.simulation import workloads
from bench import autoscaling
from bench.autoscaling import Bar, cheapest_attaining, chosen, no_dearer, tuned
from serve.cli.simulate_scenario import scenario_of_card


class InThisProcess:
    """The part of a process pool that `tuned` uses."""

    imap = staticmethod(map)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a workload of five minutes, which stands for all, with few parameters to try."""
    large = scenario_of_card("sd3.5-large", "h100", 4, 0, 64, autoscaling.NODES)
    workload = workloads.poisson(1, 300.0)
    tried = {
        "queued-work": [{}, {"late_part": 0.01, "spare": 1.0, "hold_s": 120.0}],
        "ray-serve": [{"target_ongoing_requests": t, "min_replicas": 5.0} for t in (0.6, 1.5)],
        "keda": [{"min_replicas": least} for least in (5.0, 0.0)],
        "static": [{"replicas": number} for number in (8.0, 5.0, 2.0)],
        "oracle": [{"spare": spare} for spare in (8.0, 1.0)],
    }
    monkeypatch.setattr(autoscaling, "cases", lambda part: {"short": (workload, large)})
    monkeypatch.setattr(autoscaling, "grid", lambda coarse: tried)
    monkeypatch.setattr(autoscaling, "WARM_UP_S", 120.0)
    return "short"


@pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field")  # Ray's
def test_simulations_that_end_early_change_no_choice(
    short: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> tuple[dict[str, Any], int]:
        tables = tuned(InThisProcess(), short, quick=True)
        rows = sum(len(rows) for table in tables.values() for rows in table.values())
        return {name: chosen(table) for name, table in tables.items()}, rows

    early, few = found()
    monkeypatch.setattr(Bar, "check", lambda *_: None)
    whole, all_rows = found()
    assert early == whole
    assert few < all_rows


def row(usd: float, violations: int, requests: int = 1000) -> dict[str, Any]:
    attainment = 1 - violations / requests
    return {"usd": usd, "violations": violations, "requests": requests, "attainment": attainment}


def test_the_cheapest_row_in_time_is_chosen_or_the_one_with_the_fewest_violations() -> None:
    assert cheapest_attaining([row(3, 1), row(2, 10), row(1, 11)])["usd"] == 2
    assert cheapest_attaining([row(3, 20), row(2, 30), row(1, 40)])["usd"] == 3


def test_the_fewest_violations_no_dearer_than_another_row_are_chosen() -> None:
    rows = [row(3, 1), row(2, 5), row(1, 11)]
    assert no_dearer(rows, row(2.5, 0))["usd"] == 2
    assert no_dearer(rows, row(0.5, 0))["usd"] == 2  # all cost more: the cheapest in time


def test_the_bar_falls_to_the_cheapest_row_in_time() -> None:
    bar = Bar()
    bar.check(usd=1e9, violations=10**9)
    bar.lower(row(5, 100))  # not in time
    bar.check(usd=1e9, violations=10**9)
    bar.lower(row(5, 10))
    bar.lower(row(7, 0))
    bar.check(usd=5, violations=10)
    for usd, violations in ((5.1, 0), (0, 11)):
        with pytest.raises(autoscaling.Outdone):
            bar.check(usd, violations)
