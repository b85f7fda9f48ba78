"""Autoscaling policies in the simulator: `make bench-autoscaling`.

Each workload is played under our policy with the settings that ship, and under the others with
every setting of a grid. Of each grid two are shown. "At our cost": the one with the fewest
violations among those that cost no more than ours, or the cheapest if all cost more. "At any cost":
the one with the fewest violations. A violation is a request that is not answered within five times
what its image takes alone. The first quarter of an hour is not counted, so that nobody is judged by
an empty start.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from functools import cache
from itertools import product
from multiprocessing import Pool
from pathlib import Path
from typing import Any, NamedTuple

from autoscaling import workloads
from autoscaling.fleet import Machine
from autoscaling.load import Pool as PoolLimits
from autoscaling.load import Tuning
from autoscaling.plot import draw
from autoscaling.simulator import Site, image_of
from autoscaling.workloads import DAY_S, HOUR_S, Workload
from cluster.cards import CARDS
from cluster.structure import structure
from serve.cli_simulate import as_dict
from serve.cost import Coefficients, reference
from serve.simulation import Scene, scene_of_card

OUT = Path("build/bench")
WARM_UP_S = 900.0
NODE_S, START_S = 60.0, 30.0
RAY_TARGETS = (0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
RAY_DELAYS = ((0.0, 60.0), (0.0, 300.0), (10.0, 120.0), (30.0, 600.0))  # the last is Ray's own
KEDA_TARGETS = (1.0, 1.5, 2.0, 3.0, 4.0)
ORACLE_SPARES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
ORACLE_WINDOWS_S = (30.0, 120.0)
STATIC = (4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64)
ATTAINED = 0.99


class Job(NamedTuple):
    workload: str
    policy: str
    numbers: tuple[tuple[str, float], ...]
    quick: bool
    timeline: bool = False


@cache
def cases(quick: bool) -> dict[str, tuple[Workload, Scene]]:
    """Workloads, each with the fleet that serves it."""
    part = 0.25 if quick else 1.0
    large = scene_of_card("sd3.5-large", "h100", 4, 0, 64, NODE_S, START_S)
    return {
        "poisson": (workloads.poisson(4, 6 * HOUR_S * part), large),
        "diurnal": (workloads.diurnal(10, DAY_S * part), large),
        "spikes": (workloads.spikes(1, 12 * HOUR_S * part), large),
        "on-off": (workloads.on_off(2, 12 * HOUR_S * part), large),
        "heavy-tailed": (workloads.heavy_tailed(15, 4 * HOUR_S * part), large),
        "sparse": (workloads.sparse(2, 12 * HOUR_S * part), large),
        "mixed": (workloads.diurnal(8, 12 * HOUR_S * part), mixed()),
    }


def mixed() -> Scene:
    """FP8 on spot H100, of which there are 16, then 16 bit on A100; replicas die now and then."""
    fp8 = reference(structure("sd3.5-large"), "fp8", CARDS["h100"])
    bf16 = reference(structure("sd3.5-large"), "bf16", CARDS["a100-80"])
    start_s = NODE_S + START_S
    h100 = Machine(
        "h100",
        CARDS["h100"].spot_usd_h or 0.0,
        node_s=NODE_S,
        start_s=START_S,
        replica_fails_s=12 * HOUR_S,
        node_taken_s=6 * HOUR_S,
    )
    a100 = Machine(
        "a100-80", CARDS["a100-80"].on_demand_usd_h or 0.0, node_s=NODE_S, start_s=START_S
    )
    speed = _work_s(fp8) / _work_s(bf16)
    sites = {
        "fp8": Site(PoolLimits("m", 0, 16, 4, 1.0, start_s, h100.usd_h), h100, fp8),
        "fp16": Site(PoolLimits("m", 0, 48, 1, speed, start_s, a100.usd_h), a100, bf16),
    }
    return Scene(sites, fp8, Tuning())


def _work_s(costs: Coefficients) -> float:
    return costs.work_s(image_of(workloads.USUAL[0][0]))


def play(job: Job) -> tuple[Job, dict[str, Any], list[Any]]:
    workload, scene = cases(job.quick)[job.workload]
    outcome = scene.run(workload, job.policy, 1, WARM_UP_S, **dict(job.numbers))
    return job, as_dict(outcome), outcome.timeline if job.timeline else []


def grid(quick: bool) -> list[tuple[str, dict[str, float]]]:
    ray_targets = RAY_TARGETS[::2] if quick else RAY_TARGETS
    ray_delays = RAY_DELAYS[::3] if quick else RAY_DELAYS
    return [
        ("queued-work", {}),
        *(
            (
                "ray-serve",
                {
                    "target_ongoing_requests": target,
                    "upscale_delay_s": up,
                    "downscale_delay_s": down,
                },
            )
            for target, (up, down) in product(ray_targets, ray_delays)
        ),
        *(("keda", {"target": t}) for t in (KEDA_TARGETS[1:4] if quick else KEDA_TARGETS)),
        *(("static", {"replicas": float(n)}) for n in (STATIC[::2] if quick else STATIC)),
        *(
            ("oracle", {"spare": spare, "window_s": window_s})
            for spare, window_s in product(
                ORACLE_SPARES[1:5] if quick else ORACLE_SPARES, ORACLE_WINDOWS_S
            )
        ),
    ]


Played = dict[str, Any]  # what `as_dict` has, and "numbers"


def at_our_cost(ours: Played, others: Sequence[Played]) -> Played:
    affordable = [one for one in others if one["usd"] <= ours["usd"]]
    if affordable:
        return min(affordable, key=lambda one: one["violations"])
    return min(others, key=lambda one: one["usd"])


def at_any_cost(others: Sequence[Played]) -> Played:
    return min(others, key=lambda one: (one["violations"], one["usd"]))


def cheapest_attaining(others: Sequence[Played]) -> Played:
    """Of those that answer `ATTAINED` in time; the one that answers most if none does."""
    enough = [one for one in others if one["attainment"] >= ATTAINED]
    return min(enough, key=lambda one: one["usd"]) if enough else at_any_cost(others)


def ratio(a: float, b: float) -> float | None:
    return round(a / b, 4) if b else (1.0 if not a else None)


def compared(found: dict[str, list[Played]]) -> dict[str, Any]:
    """A workload's rows, and how ours compares."""
    (ours,) = found["queued-work"]
    ray, keda = (at_our_cost(ours, found[name]) for name in ("ray-serve", "keda"))
    most, oracle = at_any_cost(found["ray-serve"]), cheapest_attaining(found["oracle"])
    static = cheapest_attaining(found["static"])
    return {
        "policies": {
            "queued-work": ours,
            "ray-serve, at our cost": ray,
            "ray-serve, at any cost": most,
            "keda, at our cost": keda,
            "keda, at any cost": at_any_cost(found["keda"]),
            "static": static,
            "oracle": oracle,
        },
        "violations_vs_ray": ratio(ours["violations"], ray["violations"]),
        "cost_vs_ray": ratio(ours["usd"], ray["usd"]),
        "violations_vs_ray_at_any_cost": ratio(ours["violations"], most["violations"]),
        "cost_vs_ray_at_any_cost": ratio(ours["usd"], most["usd"]),
        "cost_vs_oracle": ratio(ours["usd"], oracle["usd"]),
        "ray_grid": found["ray-serve"],
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        "| workload | policy | $ | violations | answered in time | wait p99 s | ups, downs |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        for policy, one in result["policies"].items():
            numbers = ", ".join(f"{value:g}" for value in one["numbers"].values())
            lines.append(
                f"| {name} | {policy}{f' ({numbers})' if numbers else ''} | {one['usd']:.1f} "
                f"| {one['violations']} | {one['attainment']:.2%} | {one['wait_p99_s']:.1f} "
                f"| {one['ups']}, {one['downs']} |"
            )
    lines += [
        "",
        "| workload | `violations_vs_ray` | `cost_vs_ray` | at any cost | | `cost_vs_oracle` |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        cells = [
            result[key]
            for key in (
                "violations_vs_ray",
                "cost_vs_ray",
                "violations_vs_ray_at_any_cost",
                "cost_vs_ray_at_any_cost",
                "cost_vs_oracle",
            )
        ]
        shown = (f"{cell:.2f}" if cell is not None else "–" for cell in cells)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def scale(quick: bool) -> dict[str, Any]:
    """The simulator's own speed, and 1,000 cards."""
    day = workloads.poisson(50, DAY_S / (24 if quick else 1))
    large = scene_of_card("sd3.5-large", "h100", 4, 0, 1000, NODE_S, START_S)
    began = time.perf_counter()
    at_50 = large.run(day, "queued-work", 1, WARM_UP_S)
    took_s = time.perf_counter() - began
    wave = workloads.diurnal(330, HOUR_S * (0.5 if quick else 2), trough=0.3)
    began = time.perf_counter()
    thousand = large.run(wave, "queued-work", 1, WARM_UP_S)
    most = max(point.ready for point in thousand.timeline)
    return {
        "simulated_h": day.seconds / HOUR_S,
        "requests": at_50.requests,
        "took_s": round(took_s, 1),
        "at_50_per_s": as_dict(at_50),
        "cards": most,
        "cards_took_s": round(time.perf_counter() - began, 1),
        "at_1000_cards": as_dict(thousand),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    began = time.perf_counter()
    jobs = [
        Job(name, policy, tuple(numbers.items()), quick, policy == "queued-work")
        for name in cases(quick)
        for policy, numbers in grid(quick)
    ]
    found: dict[str, dict[str, list[Played]]] = {name: {} for name in cases(quick)}
    with Pool() as pool:
        for job, numbers, _ in pool.imap(play, jobs):
            one = numbers | {"numbers": dict(job.numbers)}
            found[job.workload].setdefault(job.policy, []).append(one)
        results = {name: compared(of) for name, of in found.items()}
        shown = [
            Job(name, policy.partition(",")[0], tuple(one["numbers"].items()), quick, True)
            for name in ("diurnal", "spikes")
            for policy, one in results[name]["policies"].items()
            if policy in ("queued-work", "ray-serve, at any cost", "oracle")
        ]
        timelines: dict[str, dict[str, Any]] = {}
        for job, _, timeline in pool.imap(play, shown):
            timelines.setdefault(job.workload, {})[job.policy] = timeline
    OUT.mkdir(parents=True, exist_ok=True)
    for name, lines in timelines.items():
        draw(lines, name, OUT / f"autoscaling-{name}.png")
    report = {
        "machine": platform.machine(),
        "quick": quick,
        "workloads": results,
        "scale": scale(quick),
        "took_s": round(time.perf_counter() - began, 1),
    }
    file = OUT / "autoscaling.json"
    file.write_text(json.dumps(report, indent=1))
    print(table(results))
    print()
    print(json.dumps(report["scale"], indent=1))
    print(f"\n{file}, {OUT}/autoscaling-*.png; {report['took_s']} s")


if __name__ == "__main__":
    main()
