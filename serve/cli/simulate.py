"""`octet simulate`: predict the cost and the waiting times of a workload by simulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from autoscaling.simulation.fleet import NodeType
from autoscaling.simulation.simulator import IN_TIME_SLOWDOWN, SimulationResult

from ..errors import SettingsError
from ..settings.file import load_settings
from .plots import check_plot
from .simulate_scenario import (
    NUMBERS,
    WORKLOADS,
    policy_of,
    scenario_of_card,
    scenario_of_settings,
    workload_of,
)
from .terminal import ConfigOption, complain, console, working


def simulate(
    workload: Annotated[
        str,
        typer.Option(
            help=f"Workload to simulate: {', '.join(WORKLOADS)}; or a CSV file with the columns "
            "time, tenant, width, height, steps, guidance."
        ),
    ] = "diurnal",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Policy, as NAME or NAME:NUMBER,NUMBER; repeat the option to compare several. The "
            "numbers are, for "
            + "; ".join(f"{name}: {', '.join(numbers)}" for name, numbers in NUMBERS.items())
            + "."
        ),
    ] = None,
    rate: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=10_000,
            help="Mean requests per second. For diurnal: the rate at its peak. For spikes: the "
            "rate between the spikes, which are ten times as high. For sparse: the rate while it "
            "is not idle.",
        ),
    ] = 4.0,
    hours: Annotated[
        float,
        typer.Option(
            min=0.05,
            max=24 * 31,
            help="Length of the workload in hours. Diurnal stretches its one day to this length.",
        ),
    ] = 24.0,
    config: ConfigOption = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model to serve; default: sd3.5-large, or the first of --config."),
    ] = None,
    card: Annotated[
        str, typer.Option(help="Card of each replica; ignored with --config.")
    ] = "h100",
    slots: Annotated[
        int,
        typer.Option(
            min=1,
            max=16,
            help="Images that a replica generates at the same time; ignored with --config.",
        ),
    ] = 4,
    least: Annotated[
        int,
        typer.Option("--min-replicas", min=0, help="Fewest replicas; ignored with --config."),
    ] = 0,
    most: Annotated[
        int, typer.Option("--replicas", min=1, help="Most replicas; ignored with --config.")
    ] = 64,
    node_s: Annotated[
        float,
        typer.Option(min=0, help="Seconds until a new node is up and has the container image."),
    ] = 60.0,
    idle_s: Annotated[
        float,
        typer.Option("--node-idle-s", min=0, help="Seconds after which an empty node is removed."),
    ] = 60.0,
    start_s: Annotated[
        float,
        typer.Option(min=0, help="Seconds of a replica's start on a node that has the weights."),
    ] = 30.0,
    weights_gib: Annotated[
        float, typer.Option(min=0, help="GiB of weights that a new node copies from a volume.")
    ] = 0.0,
    volume_gib_s: Annotated[
        float,
        typer.Option(min=1e-3, help="GiB per second of that volume, for all nodes together."),
    ] = 1.0,
    compile_s: Annotated[
        float, typer.Option(min=0, help="Seconds that a new node compiles before its first start.")
    ] = 0.0,
    taken_s: Annotated[
        float | None,
        typer.Option(
            "--spot-s",
            min=1,
            help="Mean seconds from when a spot node is up until the provider gives notice that it "
            "takes the node away. [default: never]",
        ),
    ] = None,
    notice_s: Annotated[
        float,
        typer.Option(min=0, help="Seconds between the provider's notice and the end of a node."),
    ] = 120.0,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Image file for a plot of load, replicas and queue.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON, not as a table.")
    ] = False,
) -> None:
    """Simulate a workload under autoscaling policies and compare costs and waiting times.

    The time that an image takes comes from measurements where there are any, and is computed
    otherwise (cluster/cost.py).
    """
    check_plot(plot)
    nodes = NodeType(
        card,
        usd_h=0.0,
        node_s=node_s,
        idle_s=idle_s,
        start_s=start_s,
        weights_gib=weights_gib,
        volume_gib_s=volume_gib_s,
        compile_s=compile_s,
        node_taken_s=taken_s,
        notice_s=notice_s,
    )
    if config:
        scenario = scenario_of_settings(load_settings(config), model, nodes)
    else:
        scenario = scenario_of_card(model or "sd3.5-large", card, slots, least, most, nodes)
    requests = workload_of(workload, rate, hours)
    results: dict[str, SimulationResult] = {}
    policies = {text: policy_of(text) for text in policy or ["queued-work"]}
    for text, (name, numbers) in policies.items():
        with working(f"simulating {text}"):
            results[text] = scenario.run(requests, name, seed, numbers=numbers)
    if as_json:
        found = {text: as_dict(result) for text, result in results.items()}
        typer.echo(json.dumps(found, indent=1))
    else:
        Console().print(_table(results))
        for note in scenario.notes(requests, seed):
            complain(note)
    if plot:
        _plot({text: result.timeline for text, result in results.items()}, requests.name, plot)


def as_dict(result: SimulationResult) -> dict[str, Any]:
    """The result of a simulation in numbers; waits are in seconds, costs in $."""
    return {
        "requests": result.requests,
        "violations": result.violations,
        "attainment": round(result.attainment, 5),
        "wait_p50_s": round(result.wait_s(0.5), 3),
        "wait_p99_s": round(result.wait_s(0.99), 3),
        "usd": round(result.usd, 2),
        "usd_by_card": {card: round(usd, 2) for card, usd in result.usd_by_card.items()},
        "replica_h": round(result.replica_h, 2),
        "ups": result.ups,
        "downs": result.downs,
        "starts": result.starts,
        "retried": result.retried,
    }


def _table(results: dict[str, SimulationResult]) -> Table:
    requests = next(iter(results.values())).requests
    limit = f"{IN_TIME_SLOWDOWN:g} × the time that each takes alone"
    title = f"{requests} requests; in time: within {limit}"
    table = Table(Column("policy", overflow="fold"), title=title, title_justify="left")
    for name in (
        "$",
        "replica hours",
        "in time",
        "wait p50 s",
        "p99 s",
        "ups",
        "downs",
        "starts",
    ):
        table.add_column(name, justify="right")
    for text, result in results.items():
        table.add_row(
            text,
            f"{result.usd:.2f}",
            f"{result.replica_h:.1f}",
            f"{result.attainment:.2%}",
            f"{result.wait_s(0.5):.2f}",
            f"{result.wait_s(0.99):.2f}",
            str(result.ups),
            str(result.downs),
            str(result.starts),
        )
    return table


def _plot(timelines: dict[str, Any], title: str, out: Path) -> None:
    from autoscaling.simulation.plot import plot_timelines

    try:
        plot_timelines(timelines, title, out)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--plot {out}: {error}") from None
    console.print(f"{out}: plotted", highlight=False)
