"""Compare Octet's autoscaling policy with others, in the simulator of `autoscaling.simulation`.

    python -m bench.autoscaling [--quick] [--workload NAME ...]

Each policy is tuned for each workload by a grid of parameters, on one seed and half of the
workload's length; Ray Serve's and KEDA's grids have a minimum number of replicas too. The chosen
parameters are simulated again with other seeds and the whole length, which nothing was tuned on.
There are two comparisons:

- "policy alone": requests find their replica as Octet's Dispatcher chooses it, for all policies.
- "system": for Ray Serve, KEDA and fixed fleets requests find their replica as in plain Ray Serve:
  in order of arrival, at the emptier of two random replicas.

The rows of a workload:

- "octet, as shipped": Octet's policy with its default parameters, which has seen no jump yet.
- "octet, second day": the same, but it begins with what it remembers of the workload that is used
  for tuning.
- "octet": the parameters of Octet's policy with the fewest violations that cost no more than "ray".
  If all cost more, they are chosen as for "ray". It begins with what it remembers, too, because the
  others are tuned on the same workload. While it is tuned, the requests are those it remembers.
- "ray", "keda": the cheapest parameters that answer 99 % of the requests in time; if none do, those
  that answer most.
- "fixed": the fixed fleet that is chosen in the same way.
- "oracle": the cheapest oracle that answers 99 % in time.

A request is in time if it takes at most five times as long as its image takes alone; otherwise it
is a violation. The first quarter of an hour is not counted, so that no policy is judged by its
empty start. The defaults of Octet's policy were chosen by looking at poisson, diurnal, spikes,
on-off, heavy-tailed, sparse and mixed, with the seeds 2 to 4; `HELD_OUT` was not looked at.

Costs and violations only grow while a simulation runs. So a simulation for tuning ends early as
soon as it is worse than one that has ended, and can no longer be chosen.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from itertools import product
from multiprocessing import Pool
from multiprocessing.sharedctypes import RawValue
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
FILE = OUT / "autoscaling.json"
WARM_UP_S = 900.0
NODE_S, START_S = 60.0, 30.0
NODES = NodeType("", 0.0, node_s=NODE_S, start_s=START_S)
# Nodes that start as in a cluster: what they copy and compile takes longer than loading weights.
COLD_NODES = NodeType(
    "",
    0.0,
    node_s=120.0,
    start_s=START_S,
    idle_s=660.0,
    weights_gib=9.0,
    volume_gib_s=0.5,
    compile_s=150.0,
)
STORM_S = 1800.0
TUNING_SEED, SEEDS = 1, (5, 6, 7)
TUNING_PART, QUICK_PART = 0.5, 0.5  # of a workload's length
COARSE = ("daily-crowd",)  # days are long, so fewer parameters are tried
HELD_OUT = "cloud-clients", "storms"
ATTAINED = 0.99
ROUNDING_USD = 0.01  # rows have rounded costs
OCTET_LATE_PARTS, OCTET_SPARES, OCTET_HOLDS_S = (
    (1.0, 0.01, 0.001, 0.0001),
    (1.0, 3.0, 6.0),
    (120.0, 300.0),
)
DEFAULTS = {name: getattr(PolicyTuning(), name) for name in ("late_part", "spare", "hold_s")}
LEAST = (0.0, 4.0, 7.0, 14.0, 28.0, 48.0)  # replicas that Ray Serve and KEDA always keep
RAY_TARGETS, RAY_DOWN_S = (0.6, 0.8, 1.0, 1.5), (60.0, 600.0)  # Ray's defaults: 2 and 600
RAY_LOOK_BACK_S, RAY_FACTORS = (5.0, 30.0), (0.5, 1.0, 2.0)  # Ray's defaults: 30 and 1
KEDA_TARGETS, KEDA_STABILISATION_S = (0.6, 1.0, 2.0), (60.0, 300.0)  # Kubernetes: 300
ORACLE_SPARES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
FIXED = (4, 6, 7, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128)
PLOTTED = ("octet, as shipped", "ray", "oracle")
PLAIN = "ray-serve", "keda", "static"  # that have a dispatch of their own in the system's table


Numbers = dict[str, float]
Row = dict[str, Any]  # a result as `as_dict` returns it, with the policy's "numbers"


class Outdone(Exception):
    """A simulation costs more, or has more violations, than one that would be chosen before it."""


class Bar:
    """The cost and the violations above which a simulation cannot be chosen any more.

    The main process sets it, all others read it. At first nothing is above it.
    """

    def __init__(self) -> None:
        self._usd, self._violations = RawValue("d", math.inf), RawValue("d", math.inf)

    def reset(self, usd: float = math.inf) -> None:
        self._usd.value, self._violations.value = usd, math.inf

    def lower(self, row: Row) -> None:
        """Lower the bar to a row that is in time: to its cost, and to the violations allowed."""
        if row["attainment"] >= ATTAINED:
            self._usd.value = min(self._usd.value, row["usd"])
            self._violations.value = (1 - ATTAINED) * row["requests"]

    def check(self, usd: float, violations: int) -> None:
        """Raise `Outdone` if a simulation is above the bar."""
        if usd > self._usd.value + ROUNDING_USD or violations > self._violations.value:
            raise Outdone


bar = Bar()


def share(shared: Bar) -> None:
    """Use the bar of the process that started this one."""
    global bar
    bar = shared


class Job(NamedTuple):
    """A simulation to run.

    `workload`: a name in `cases`. `numbers`: names and values of the policy's parameters.
    `timeline`: whether `run_job` returns the timeline too. `plain`: whether requests find their
    replica as in plain Ray Serve. `part`: of the workload's length. `judged`: whether the
    simulation ends early once it is above the bar.
    """

    workload: str
    policy: str
    numbers: tuple[tuple[str, float], ...]
    part: float
    plain: bool = False
    seed: int = TUNING_SEED
    timeline: bool = False
    judged: bool = False


@cache
def cases(part: float) -> dict[str, tuple[Workload, Scenario]]:
    """Each workload, `part` of its length, with the scenario that serves it, by its name."""
    large, larger, cold = (
        scenario_of_card("sd3.5-large", "h100", 4, 0, most, nodes)
        for most, nodes in ((64, NODES), (128, NODES), (64, COLD_NODES))
    )
    found = {
        "poisson": (workloads.poisson(4, 3 * HOUR_S * part), large),
        "diurnal": (workloads.diurnal(10, 8 * HOUR_S * part), large),
        "spikes": (workloads.spikes(1, 6 * HOUR_S * part), large),
        "on-off": (workloads.on_off(2, 6 * HOUR_S * part), large),
        "heavy-tailed": (workloads.heavy_tailed(15, 2 * HOUR_S * part), larger),
        "sparse": (workloads.sparse(2, 6 * HOUR_S * part), large),
        "mixed": (workloads.diurnal(7, 6 * HOUR_S * part), mixed()),
        "daily-crowd": (workloads.daily_crowd(0.5, 96 * HOUR_S * part), large),
        "cloud-clients": (workloads.cloud_clients(4, 8 * HOUR_S * part), large),
        "storms": (workloads.diurnal(5, 6 * HOUR_S * part), stormy(large)),
        "cold-nodes": (workloads.on_off(2, 6 * HOUR_S * part), cold),
    }
    return {name: (remembered(workload), scenario) for name, (workload, scenario) in found.items()}


def remembered(workload: Workload) -> Workload:
    """The workload; the requests of the last seed are kept, because many simulations need them."""
    arrivals = lru_cache(maxsize=1)(lambda seed: tuple(workload.arrivals(seed)))
    return replace(workload, arrivals=arrivals)


def stormy(scenario: Scenario) -> Scenario:
    """The scenario on spot nodes, of which the provider takes half every half hour on average."""
    pools = {
        name: replace(pool, node_type=replace(pool.node_type, storm_s=STORM_S))
        for name, pool in scenario.pools.items()
    }
    return replace(scenario, pools=pools)


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


@lru_cache(maxsize=1)
def learnt(name: str, numbers: tuple[tuple[str, float], ...], part: float) -> Scenario:
    """The scenario of a workload once Octet's policy has served it, as it is used for tuning."""
    workload, scenario = cases(part)[name]
    return scenario.after(workload, TUNING_SEED, dict(numbers))


def run_job(job: Job) -> tuple[Job, dict[str, Any], list[Any]]:
    """Run a simulation; return the job, the result, and the timeline (empty unless asked for).

    The result is empty if the simulation has ended early.
    """
    workload, scenario = cases(job.part)[job.workload]
    if job.policy == "queued-work" and job.numbers:
        tuned_on = job.part if job.seed == TUNING_SEED else job.part * TUNING_PART
        scenario = learnt(job.workload, job.numbers, tuned_on)
    try:
        result = scenario.run(
            workload,
            job.policy,
            job.seed,
            WARM_UP_S,
            dict(job.numbers),
            plain_dispatch=job.plain,
            watch=bar.check if job.judged else None,
        )
    except Outdone:
        return job, {}, []
    return job, as_dict(result), result.timeline if job.timeline else []


def grid(quick: bool) -> dict[str, list[Numbers]]:
    """The parameters to try first, by policy; those come first that are more likely in time.

    The first ones of Octet's policy are its defaults.
    """
    step = 3 if quick else 1
    octet = product(OCTET_LATE_PARTS[::step], OCTET_SPARES[::step], OCTET_HOLDS_S[::step])
    ray = product(LEAST[::step][::-1], RAY_TARGETS[::step], RAY_DOWN_S[::step])
    keda = product(LEAST[:: max(step, 2)][::-1], KEDA_TARGETS[::step], KEDA_STABILISATION_S[::step])
    return {
        "queued-work": [
            {},
            *(
                {"late_part": late_part, "spare": spare, "hold_s": hold_s}
                for late_part, spare, hold_s in octet
            ),
        ],
        "ray-serve": [
            *(
                {
                    "target_ongoing_requests": target,
                    "upscale_delay_s": 0.0,
                    "downscale_delay_s": down,
                    "min_replicas": least,
                }
                for least, target, down in ray
            ),
            {},
        ],
        "keda": [
            {"target": target, "stabilisation_s": s, "min_replicas": least}
            for least, target, s in keda
        ],
        "static": [{"replicas": float(n)} for n in FIXED[::step][::-1]],
        "oracle": [{"spare": spare, "window_s": 30.0} for spare in ORACLE_SPARES[::step][::-1]],
    }


def variations(numbers: Numbers) -> list[Numbers]:
    """What Ray's policy could still gain from: shorter means, and other factors up and down."""
    return [
        {
            **numbers,
            "look_back_period_s": look_back_s,
            "upscaling_factor": up,
            "downscaling_factor": down,
        }
        for look_back_s in RAY_LOOK_BACK_S
        for up, down in product(RAY_FACTORS[1:], RAY_FACTORS)
    ]


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

    If all rows cost more, it is chosen as others are.
    """
    affordable = [row for row in rows if row["usd"] <= than["usd"]]
    return fewest_violations(affordable) if affordable else cheapest_attaining(rows)


def ratio(a: float, b: float) -> float | None:
    """a ÷ b, where 0 ÷ 0 is 1; None if only `b` is 0."""
    return round(a / b, 4) if b else (1.0 if not a else None)


def chosen(grids: dict[str, list[Row]]) -> dict[str, tuple[str, Row]]:
    """The rows of the table for one workload: for each label, the policy and its row.

    `grids`: all rows of the workload, by policy.
    """
    octet, ray = grids["queued-work"], cheapest_attaining(grids["ray-serve"])
    shipped = next(row for row in octet if not row["numbers"])
    return {
        "octet, as shipped": ("queued-work", shipped),
        "octet, second day": ("queued-work", {"numbers": DEFAULTS}),
        "octet": ("queued-work", no_dearer([row for row in octet if row["numbers"]] or octet, ray)),
        "ray": ("ray-serve", ray),
        "keda": ("keda", cheapest_attaining(grids["keda"])),
        "fixed": ("static", cheapest_attaining(grids["static"])),
        "oracle": ("oracle", cheapest_attaining(grids["oracle"])),
    }


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
    "violations_vs_ray": ("violations", "octet", "ray"),
    "cost_vs_ray": ("usd", "octet", "ray"),
    "shipped_violations_vs_ray": ("violations", "octet, as shipped", "ray"),
    "shipped_cost_vs_ray": ("usd", "octet, as shipped", "ray"),
    "shipped_violations_vs_fixed": ("violations", "octet, as shipped", "fixed"),
    "shipped_cost_vs_fixed": ("usd", "octet, as shipped", "fixed"),
    "shipped_cost_vs_oracle": ("usd", "octet, as shipped", "oracle"),
    "second_day_violations_vs_ray": ("violations", "octet, second day", "ray"),
    "second_day_cost_vs_ray": ("usd", "octet, second day", "ray"),
}


def compared(rows: dict[str, Row]) -> dict[str, Any]:
    """The rows of a workload, with the ratios of Octet's policy to the others."""
    ratios = {name: ratio(rows[a][of], rows[b][of]) for name, (of, a, b) in RATIOS.items()}
    shipped, oracle = rows["octet, as shipped"], rows["oracle"]
    if min(shipped["attainment"], oracle["attainment"]) < ATTAINED:
        ratios["shipped_cost_vs_oracle"] = None  # comparable only if both are in time
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
    large = scenario_of_card("sd3.5-large", "h100", 4, 0, 1000, NODES)
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


def tuned(pool: Any, name: str, quick: bool) -> dict[str, dict[str, list[Row]]]:
    """The rows of a workload that ran to their end, on the seed for tuning, by table and policy.

    Around the best row of Ray's policy further parameters are tried.
    """
    part = TUNING_PART * (QUICK_PART if quick else 1.0)
    coarse = quick or name in COARSE
    tried = grid(coarse)

    def rows(
        policy: str, numbers: Iterable[Numbers], *, plain: bool = False, lower: bool = True
    ) -> list[Row]:
        found = []
        jobs = [Job(name, policy, tuple(n.items()), part, plain, judged=True) for n in numbers]
        for job, result, _ in pool.imap(run_job, jobs):
            if result:
                found.append(result | {"numbers": dict(job.numbers)})
                if lower:
                    bar.lower(result)
        return found

    def others(policies: Iterable[str], *, plain: bool) -> dict[str, list[Row]]:
        found = {}
        for policy in policies:
            bar.reset()
            found[policy] = rows(policy, tried[policy], plain=plain)
            if policy == "ray-serve":
                further = variations(cheapest_attaining(found[policy])["numbers"])
                found[policy] += rows(policy, further[:: 3 if coarse else 1], plain=plain)
        return found

    alone = others(("ray-serve", "keda", "static", "oracle"), plain=False)
    system = alone | others(PLAIN, plain=True)
    limits = [cheapest_attaining(of["ray-serve"])["usd"] for of in (alone, system)]
    shipped, *further = tried["queued-work"]
    bar.reset()
    octet = rows("queued-work", [shipped], lower=False)
    bar.reset(max(limits))
    octet += rows("queued-work", further, lower=False)
    if not any(row["usd"] <= min(limits) for row in octet):
        bar.reset()
        octet += rows("queued-work", further)
    return {
        "policy alone": alone | {"queued-work": octet},
        "system": system | {"queued-work": octet},
    }


def measured(
    pool: Any, name: str, quick: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, list[Any]]]:
    """Tune the policies for a workload, and simulate it whole, with other seeds.

    Returns its results by table, and the timelines to plot, by row.
    """
    part, seeds = measured_with(quick)
    ended: dict[Job, tuple[dict[str, Any], list[Any]]] = {}
    results, timelines = {}, {}
    for of, found in tuned(pool, name, quick).items():
        rows = chosen(found)
        jobs = {
            label: [
                Job(
                    name,
                    policy,
                    tuple(row["numbers"].items()),
                    part,
                    plain=of == "system" and policy in PLAIN,
                    seed=seed,
                    timeline=seed == seeds[0],
                )
                for seed in seeds
            ]
            for label, (policy, row) in rows.items()
        }
        new = {job for repeated in jobs.values() for job in repeated} - ended.keys()
        for job, result, timeline in pool.imap(run_job, sorted(new)):
            ended[job] = result, timeline
        results[of] = compared(
            {
                label: combined([ended[job][0] for job in jobs[label]])
                | {"numbers": row["numbers"]}
                for label, (_, row) in rows.items()
            }
        )
        timelines = {label: ended[jobs[label][0]][1] for label in PLOTTED}
    return results, timelines


def measured_with(quick: bool) -> tuple[float, tuple[int, ...]]:
    """The part of a workload's length, and the seeds, with which it is measured."""
    return (QUICK_PART, SEEDS[:1]) if quick else (1.0, SEEDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less than 8 minutes, one seed")
    parser.add_argument(
        "--workload",
        action="append",
        default=[],
        choices=cases(1.0),
        help="only this one; the file keeps others",
    )
    options = parser.parse_args()
    quick, began = options.quick, time.perf_counter()
    part, seeds = measured_with(quick)
    all_names = [name for name in cases(part) if not (quick and name == "daily-crowd")]
    report: dict[str, Any] = {
        "machine": platform.machine(),
        "quick": quick,
        "seeds": seeds,
        "tables": {"policy alone": {}, "system": {}},
    }
    if options.workload and FILE.exists():
        before = json.loads(FILE.read_text())
        if before["quick"] != quick:
            parser.error(f"{FILE} has results of another length: move it away, or change --quick")
        report["tables"] = before["tables"]
    OUT.mkdir(parents=True, exist_ok=True)
    with Pool(initializer=share, initargs=(bar,)) as pool:
        for name in options.workload or all_names:
            results, timelines = measured(pool, name, quick)
            for of, result in results.items():
                report["tables"][of][name] = result
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
            plot_timelines(timelines, name, OUT / f"autoscaling-{name}.png")
            FILE.write_text(json.dumps(report, indent=1))
    if not options.workload:
        report["scale"] = scale(quick)
        FILE.write_text(json.dumps(report, indent=1))
    for of, results in report["tables"].items():
        print(f"\n{of}\n\n{table(results)}")
    if "scale" in report:
        print(f"\n{json.dumps(report['scale'], indent=1)}")
    print(f"\n{FILE}, {OUT}/autoscaling-*.png; {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
