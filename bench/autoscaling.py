"""Compare autoscaling policies in the simulator: `make bench-autoscaling`.

Each workload is simulated under every policy, with all combinations of the policy's parameters (its
grid). The table has these rows for each workload:

- "queued-work, as shipped": Octet's policy with its default parameters.
- "POLICY, 99 %": the cheapest parameters that answer 99 % of the requests in time. If none do, the
  parameters that answer most.
- "ray-serve, best": the parameters with the fewest violations, at any cost.
- "queued-work for no more": the parameters of Octet's policy with the fewest violations that cost
  no more than "ray-serve, 99 %".
- "queued-work for no more than that": the same, compared with "ray-serve, best".

A request is in time if it takes at most five times as long as its image takes alone; otherwise it
is a violation. The first quarter of an hour is not counted, so that no policy is judged by its
empty start. Parameters are chosen with one seed, and the chosen ones are simulated again with
others.
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

from autoscaling.load import PolicyTuning, PoolBounds
from autoscaling.simulation import workloads
from autoscaling.simulation.fleet import NodeType
from autoscaling.simulation.plot import plot_timelines
from autoscaling.simulation.simulator import SimulatedPool, image_of
from autoscaling.simulation.workloads import DAY_S, HOUR_S, Workload
from cluster.cards import CARDS
from cluster.cost import CostCoefficients, reference
from cluster.structure import structure
from serve.cli.simulate import as_dict
from serve.cli.simulate_scenario import Scenario, scenario_of_card

OUT = Path("build/bench")
WARM_UP_S = 900.0
NODE_S, START_S = 60.0, 30.0
SPARES, HOLDS_S = (1.0, 3.0, 6.0, 12.0, 2.0, 4.0, 16.0), (300.0, 120.0, 600.0, 1800.0)
UTILISATIONS = 0.8, 0.9
RAY_TARGETS = (0.6, 0.7, 0.8, 1.0, 1.5, 3.0)
RAY_UP_S, RAY_DOWN_S = (0.0, 30.0), (60.0, 300.0, 600.0, 1800.0)  # Ray's defaults: 30 and 600
KEDA_TARGETS = (0.4, 0.6, 0.8, 1.0, 1.5, 2.0)
KEDA_STABILISATION_S = (60.0, 300.0, 1800.0)  # Kubernetes' default: 300
TUNING_SEED, SEEDS = 1, (2, 3, 4)
ORACLE_SPARES = (0.5, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 32.0)
STATIC = (8, 12, 16, 20, 24, 32, 48, 64, 96, 128)
ATTAINED = 0.99
PLOTTED = ("queued-work, as shipped", "ray-serve, 99 %", "oracle, 99 %")


class Job(NamedTuple):
    """A simulation to run.

    `workload`: a name in `cases`. `numbers`: names and values of the policy's parameters.
    `timeline`: whether `run_job` returns the timeline too.
    """

    workload: str
    policy: str
    numbers: tuple[tuple[str, float], ...]
    quick: bool
    seed: int = TUNING_SEED
    timeline: bool = False


@cache
def cases(quick: bool) -> dict[str, tuple[Workload, Scenario]]:
    """Each workload with the scenario that serves it, by the workload's name."""
    part = 0.5 if quick else 1.0
    large, larger = (
        scenario_of_card("sd3.5-large", "h100", 4, 0, most, NODE_S, START_S) for most in (64, 128)
    )
    return {
        "poisson": (workloads.poisson(4, 3 * HOUR_S * part), large),
        "diurnal": (workloads.diurnal(10, 8 * HOUR_S * part), large),
        "spikes": (workloads.spikes(1, 6 * HOUR_S * part), large),
        "on-off": (workloads.on_off(2, 6 * HOUR_S * part), large),
        "heavy-tailed": (workloads.heavy_tailed(15, 2 * HOUR_S * part), larger),
        "sparse": (workloads.sparse(2, 6 * HOUR_S * part), large),
        "mixed": (workloads.diurnal(7, 6 * HOUR_S * part), mixed()),
    }


def mixed() -> Scenario:
    """The scenario of a model with an FP8 pool on spot L40S cards and a 16-bit pool on A100 cards.

    The FP8 pool has up to 32 replicas. The provider takes a spot node back after 6 h on average.
    """
    fp8 = reference(structure("sd3.5-large"), "fp8", CARDS["l40s"])
    bf16 = reference(structure("sd3.5-large"), "bf16", CARDS["a100-80"])
    start_s = NODE_S + START_S
    l40s = NodeType(
        "l40s",
        CARDS["l40s"].spot_usd_h or 0.0,
        node_s=NODE_S,
        start_s=START_S,
        replica_fails_s=12 * HOUR_S,
        node_taken_s=6 * HOUR_S,
    )
    a100 = NodeType(
        "a100-80", CARDS["a100-80"].on_demand_usd_h or 0.0, node_s=NODE_S, start_s=START_S
    )
    speed = _work_s(fp8) / _work_s(bf16)
    pools = {
        "fp8": SimulatedPool(PoolBounds("m", 0, 32, 2, 1.0, start_s, l40s.usd_h), l40s, fp8),
        "fp16": SimulatedPool(PoolBounds("m", 0, 48, 1, speed, start_s, a100.usd_h), a100, bf16),
    }
    return Scenario(pools, fp8, PolicyTuning())


def _work_s(costs: CostCoefficients) -> float:
    """Predicted seconds of an image with the most usual shape, the first of `workloads.USUAL`."""
    return costs.work_s(image_of(workloads.USUAL[0][0]))


def run_job(job: Job) -> tuple[Job, dict[str, Any], list[Any]]:
    """Run a simulation; return the job, the result, and the timeline (empty unless asked for)."""
    workload, scenario = cases(job.quick)[job.workload]
    result = scenario.run(workload, job.policy, job.seed, WARM_UP_S, dict(job.numbers))
    return job, as_dict(result), result.timeline if job.timeline else []


def grid(quick: bool) -> list[tuple[str, dict[str, float]]]:
    """All policies with the parameters to try; the first is Octet's policy with its defaults."""
    step = 2 if quick else 1
    queued_work = (
        product(SPARES[:4], HOLDS_S[:1], UTILISATIONS[:1])
        if quick
        else product(SPARES, HOLDS_S, UTILISATIONS)
    )
    ray = product(RAY_TARGETS[::step], RAY_UP_S[::step], RAY_DOWN_S[::step])
    keda = product(KEDA_TARGETS[::step], KEDA_STABILISATION_S[::step])
    return [
        ("queued-work", {}),
        *(
            ("queued-work", {"spare": spare, "hold_s": hold_s, "utilisation": utilisation})
            for spare, hold_s, utilisation in queued_work
        ),
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
        *(("oracle", {"spare": spare, "window_s": 30.0}) for spare in ORACLE_SPARES[::step]),
    ]


Row = dict[str, Any]  # a result as `as_dict` returns it, with the policy's "numbers"


def fewest_violations(rows: Sequence[Row]) -> Row:
    return min(rows, key=lambda row: (row["violations"], row["usd"]))


def cheapest_attaining(rows: Sequence[Row]) -> Row:
    """The cheapest row with at least the fraction `ATTAINED` of its requests answered in time.

    If there is none, this is the row with the fewest violations.
    """
    attaining = [row for row in rows if row["attainment"] >= ATTAINED]
    return min(attaining, key=lambda row: row["usd"]) if attaining else fewest_violations(rows)


def no_dearer(rows: Sequence[Row], than: Row) -> Row:
    """The row with the fewest violations that costs no more than `than`.

    If all rows cost more, this is the cheapest.
    """
    affordable = [row for row in rows if row["usd"] <= than["usd"]]
    if affordable:
        return fewest_violations(affordable)
    return min(rows, key=lambda row: row["usd"])


def ratio(a: float, b: float) -> float | None:
    """a ÷ b, where 0 ÷ 0 is 1; None if only `b` is 0."""
    return round(a / b, 4) if b else (1.0 if not a else None)


def chosen(grids: dict[str, list[Row]]) -> dict[str, tuple[str, Row]]:
    """The rows of the table for one workload: for each label, the policy and its row.

    `grids`: all rows of the workload, by policy.
    """
    queued_work, ray = grids["queued-work"], grids["ray-serve"]
    shipped = next(row for row in queued_work if not row["numbers"])
    tuned, best = cheapest_attaining(ray), fewest_violations(ray)
    return {
        "queued-work, as shipped": ("queued-work", shipped),
        "queued-work, 99 %": ("queued-work", cheapest_attaining(queued_work)),
        "ray-serve, 99 %": ("ray-serve", tuned),
        "queued-work for no more": ("queued-work", no_dearer(queued_work, tuned)),
        "ray-serve, best": ("ray-serve", best),
        "queued-work for no more than that": ("queued-work", no_dearer(queued_work, best)),
        "keda, 99 %": ("keda", cheapest_attaining(grids["keda"])),
        "static, 99 %": ("static", cheapest_attaining(grids["static"])),
        "oracle, 99 %": ("oracle", cheapest_attaining(grids["oracle"])),
    }


def key(policy: str, row: Row) -> tuple[Any, ...]:
    """The policy and parameters of a row, equal to the fields `policy` and `numbers` of its job."""
    return policy, tuple(row["numbers"].items())


def combined(rows: Sequence[Row]) -> Row:
    """The results of several seeds as one row: their sums, and the largest p99 of the waits."""
    summed = {
        key: sum(row[key] for row in rows)
        for key in ("requests", "violations", "usd", "replica_h", "ups", "downs", "starts")
    }
    return {
        **summed,
        "usd": round(summed["usd"], 2),
        "attainment": round(1 - summed["violations"] / summed["requests"], 5),
        "attainment_each": [row["attainment"] for row in rows],
        "wait_p99_s": max(row["wait_p99_s"] for row in rows),
    }


RATIOS = {  # name of the ratio: (field, row that is divided, row that divides)
    "violations_vs_ray": ("violations", "queued-work for no more", "ray-serve, 99 %"),
    "cost_vs_ray": ("usd", "queued-work for no more", "ray-serve, 99 %"),
    "violations_vs_ray_best": (
        "violations",
        "queued-work for no more than that",
        "ray-serve, best",
    ),
    "cost_vs_ray_best": ("usd", "queued-work for no more than that", "ray-serve, best"),
    "shipped_violations_vs_ray": ("violations", "queued-work, as shipped", "ray-serve, 99 %"),
    "shipped_cost_vs_ray": ("usd", "queued-work, as shipped", "ray-serve, 99 %"),
    "cost_vs_oracle": ("usd", "queued-work, as shipped", "oracle, 99 %"),
}


def compared(rows: dict[str, Row]) -> dict[str, Any]:
    """The rows of a workload, with the ratios of Octet's policy to the others."""
    ratios = {name: ratio(rows[a][of], rows[b][of]) for name, (of, a, b) in RATIOS.items()}
    shipped, oracle = rows["queued-work, as shipped"], rows["oracle, 99 %"]
    if min(shipped["attainment"], oracle["attainment"]) < ATTAINED:
        ratios["cost_vs_oracle"] = None  # costs are comparable only if both are in time
    return {"policies": rows, **ratios}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown tables, as bench/README.md shows them."""
    lines = [
        "| workload | policy | $ | violations | answered in time | wait p99 s | ups, downs |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        for policy, row in result["policies"].items():
            numbers = ", ".join(f"{value:g}" for value in row["numbers"].values())
            lines.append(
                f"| {name} | {policy}{f' ({numbers})' if numbers else ''} | {row['usd']:.1f} "
                f"| {row['violations']} | {row['attainment']:.2%} | {row['wait_p99_s']:.1f} "
                f"| {row['ups']}, {row['downs']} |"
            )
    lines += ["", f"| workload | {' | '.join(f'`{name}`' for name in RATIOS)} |"]
    lines.append("|---" * (1 + len(RATIOS)) + "|")
    for name, result in results.items():
        shown = (f"{result[key]:.2f}" if result[key] is not None else "–" for key in RATIOS)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def scale(quick: bool) -> dict[str, Any]:
    """Measure the simulator's speed on a day of 50 requests/s, and on up to 1,000 cards."""
    day = workloads.poisson(50, DAY_S / (24 if quick else 1))
    large = scenario_of_card("sd3.5-large", "h100", 4, 0, 1000, NODE_S, START_S)
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
    parser.add_argument("--quick", action="store_true", help="less than 3 minutes")
    quick = parser.parse_args().quick
    began = time.perf_counter()
    jobs = [
        Job(name, policy, tuple(numbers.items()), quick)
        for name in cases(quick)
        for policy, numbers in grid(quick)
    ]
    grids: dict[str, dict[str, list[Row]]] = {name: {} for name in cases(quick)}
    results: dict[str, Any] = {}
    timelines: dict[str, dict[str, Any]] = {}
    seeds = SEEDS[:1] if quick else SEEDS
    with Pool() as pool:
        for job, result, _ in pool.imap(run_job, jobs):
            row = result | {"numbers": dict(job.numbers)}
            grids[job.workload].setdefault(job.policy, []).append(row)
        for name, by_policy in grids.items():
            rows = chosen(by_policy)
            again = dict.fromkeys(
                Job(name, policy, tuple(row["numbers"].items()), quick, seed, seed == seeds[0])
                for policy, row in rows.values()
                for seed in seeds
            )
            repeated = list(pool.imap(run_job, again))
            results[name] = compared(
                {
                    label: combined([r for job, r, _ in repeated if job[1:3] == key(policy, row)])
                    | {"numbers": row["numbers"]}
                    for label, (policy, row) in rows.items()
                }
            )
            lines = {job[1:3]: line for job, _, line in repeated if line}
            timelines[name] = {label: lines[key(*rows[label])] for label in PLOTTED}
    OUT.mkdir(parents=True, exist_ok=True)
    for name, timeline in timelines.items():
        plot_timelines(timeline, name, OUT / f"autoscaling-{name}.png")
    report = {
        "machine": platform.machine(),
        "quick": quick,
        "seeds": seeds,
        "workloads": results,
        "grids": grids,
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
