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
RAY_UP_S, RAY_DOWN_S = (0.0, 30.0), (60.0, 300.0, 600.0)  # the last of each are Ray's own
KEDA_TARGETS = (1.0, 1.5, 2.0, 3.0, 4.0)
KEDA_STABILISATION_S = (0.0, 60.0, 300.0)  # the last is Kubernetes' own
SEEDS = (1, 2, 3)  # grids are chosen from by the first, and what was chosen is played with all
ORACLE_SPARES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
ORACLE_WINDOWS_S = (30.0, 120.0)
STATIC = (4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64)
ATTAINED = 0.99


class Job(NamedTuple):
    workload: str
    policy: str
    numbers: tuple[tuple[str, float], ...]
    quick: bool
    seed: int = SEEDS[0]
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
    outcome = scene.run(workload, job.policy, job.seed, WARM_UP_S, **dict(job.numbers))
    return job, as_dict(outcome), outcome.timeline if job.timeline else []


def grid(quick: bool) -> list[tuple[str, dict[str, float]]]:
    step = 2 if quick else 1
    ray = product(RAY_TARGETS[::step], RAY_UP_S[::step], RAY_DOWN_S[::step])
    keda = product(KEDA_TARGETS[::step], KEDA_STABILISATION_S[::step])
    oracle = product(ORACLE_SPARES[::step], ORACLE_WINDOWS_S)
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
            for target, up, down in ray
        ),
        *(("keda", {"target": target, "stabilisation_s": s}) for target, s in keda),
        *(("static", {"replicas": float(n)}) for n in STATIC[::step]),
        *(("oracle", {"spare": spare, "window_s": window_s}) for spare, window_s in oracle),
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


def as_good_as(ours: Played, others: Sequence[Played]) -> Played:
    """The cheapest of those with no more violations; the one with the fewest if none has."""
    enough = [one for one in others if one["violations"] <= ours["violations"]]
    return min(enough, key=lambda one: one["usd"]) if enough else at_any_cost(others)


def chosen(found: dict[str, list[Played]]) -> dict[str, tuple[str, Played]]:
    """Of a workload's grids: the rows that are shown, and their policies."""
    (ours,) = found["queued-work"]
    return {
        "queued-work": ("queued-work", ours),
        "ray-serve, at our cost": ("ray-serve", at_our_cost(ours, found["ray-serve"])),
        "ray-serve, at any cost": ("ray-serve", at_any_cost(found["ray-serve"])),
        "keda, at our cost": ("keda", at_our_cost(ours, found["keda"])),
        "keda, at any cost": ("keda", at_any_cost(found["keda"])),
        "static": ("static", cheapest_attaining(found["static"])),
        "oracle, 99 %": ("oracle", cheapest_attaining(found["oracle"])),
        "oracle, as good as ours": ("oracle", as_good_as(ours, found["oracle"])),
    }


def key(policy: str, one: Played) -> tuple[Any, ...]:
    return policy, tuple(one["numbers"].items())


def together(one: Sequence[Played]) -> Played:
    """The same policy with several seeds: sums, and the worst wait."""
    summed = {
        key: sum(played[key] for played in one)
        for key in ("requests", "violations", "usd", "replica_h", "ups", "downs", "starts")
    }
    return {
        **summed,
        "usd": round(summed["usd"], 2),
        "attainment": round(1 - summed["violations"] / summed["requests"], 5),
        "attainment_each": [played["attainment"] for played in one],
        "wait_p99_s": max(played["wait_p99_s"] for played in one),
    }


def compared(rows: dict[str, Played]) -> dict[str, Any]:
    """How ours compares."""
    ours, ray = rows["queued-work"], rows["ray-serve, at our cost"]
    most, oracle = rows["ray-serve, at any cost"], rows["oracle, 99 %"]
    same = rows["oracle, as good as ours"]
    return {
        "policies": rows,
        "violations_vs_ray": ratio(ours["violations"], ray["violations"]),
        "cost_vs_ray": ratio(ours["usd"], ray["usd"]),
        "violations_vs_ray_at_any_cost": ratio(ours["violations"], most["violations"]),
        "cost_vs_ray_at_any_cost": ratio(ours["usd"], most["usd"]),
        "cost_vs_oracle": ratio(ours["usd"], oracle["usd"]),
        "cost_vs_oracle_as_good": ratio(ours["usd"], same["usd"]),
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
        "| workload | `violations_vs_ray` | `cost_vs_ray` | at any cost | | `cost_vs_oracle` "
        "| as good as ours |",
        "|---|---|---|---|---|---|---|",
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
                "cost_vs_oracle_as_good",
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
        Job(name, policy, tuple(numbers.items()), quick)
        for name in cases(quick)
        for policy, numbers in grid(quick)
    ]
    found: dict[str, dict[str, list[Played]]] = {name: {} for name in cases(quick)}
    results: dict[str, Any] = {}
    timelines: dict[str, dict[str, Any]] = {}
    seeds = SEEDS[:1] if quick else SEEDS
    with Pool() as pool:
        for job, played, _ in pool.imap(play, jobs):
            one = played | {"numbers": dict(job.numbers)}
            found[job.workload].setdefault(job.policy, []).append(one)
        for name, of in found.items():
            rows = chosen(of)
            again = dict.fromkeys(
                Job(name, policy, tuple(one["numbers"].items()), quick, seed, seed == SEEDS[0])
                for policy, one in rows.values()
                for seed in seeds
            )
            played_again = list(pool.imap(play, again))
            results[name] = compared(
                {
                    row: together([p for job, p, _ in played_again if job[1:3] == key(policy, one)])
                    | {"numbers": one["numbers"]}
                    for row, (policy, one) in rows.items()
                }
            )
            timelines[name] = {job.policy: line for job, _, line in played_again if line}
    OUT.mkdir(parents=True, exist_ok=True)
    for name, lines in timelines.items():
        shown = {policy: lines[policy] for policy in ("queued-work", "ray-serve", "oracle")}
        draw(shown, name, OUT / f"autoscaling-{name}.png")
    report = {
        "machine": platform.machine(),
        "quick": quick,
        "seeds": seeds,
        "workloads": results,
        "grids": found,
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
