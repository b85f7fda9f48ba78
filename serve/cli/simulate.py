"""`octet simulate`: what a workload costs and how long its requests wait, before it comes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from autoscaling.simulation.simulator import IN_TIME_SLOWDOWN, SimulationResult

from ..errors import SettingsError
from ..settings.file import load_settings
from .simulate_scenario import (
    NUMBERS,
    WORKLOADS,
    policy_of,
    scenario_of_card,
    scenario_of_settings,
    workload_of,
)
from .terminal import ConfigOption, Debug, console, readable_errors


def simulate(
    workload: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(WORKLOADS)}; or a CSV file with the columns time, tenant, width, "
            "height, steps, guidance."
        ),
    ] = "diurnal",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Repeatable: "
            + ", ".join(f"{name}[:{','.join(n)}]" if n else name for name, n in NUMBERS.items())
        ),
    ] = None,
    rate: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=10_000,
            help="Requests a second: of diurnal at its peak, of spikes between them (they are ten "
            "times as high), of sparse while it is not idle, else the mean.",
        ),
    ] = 4.0,
    hours: Annotated[
        float, typer.Option(min=0.05, max=24 * 31, help="Diurnal is one day, however long.")
    ] = 24.0,
    config: ConfigOption = None,
    model: Annotated[
        str | None, typer.Option(help="Default: sd3.5-large, or the first of --config.")
    ] = None,
    card: Annotated[str, typer.Option(help="Without --config: of each replica.")] = "h100",
    slots: Annotated[int, typer.Option(min=1, max=16)] = 4,
    least: Annotated[int, typer.Option("--min-replicas", min=0)] = 0,
    most: Annotated[int, typer.Option("--replicas", min=1, help="At most.")] = 64,
    node_s: Annotated[float, typer.Option(min=0, help="Until an added node is there.")] = 60.0,
    start_s: Annotated[float, typer.Option(min=0, help="Of a replica on a node.")] = 30.0,
    seed: int = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw load, replicas and queue.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    debug: Debug = False,
) -> None:
    """Simulate a workload under autoscaling policies: cost, answers in time, waits, replicas.

    Times of images are those of `serve/cost.py`: arithmetic, where nothing was measured.
    """
    with readable_errors(debug):
        if config:
            scene = scenario_of_settings(load_settings(config), model, node_s, start_s)
        else:
            scene = scenario_of_card(
                model or "sd3.5-large", card, slots, least, most, node_s, start_s
            )
        requests = workload_of(workload, rate, hours)
        outcomes: dict[str, SimulationResult] = {}
        policies = {text: policy_of(text) for text in policy or ["queued-work"]}
        for text, (name, numbers) in policies.items():
            with console.status(text):
                outcomes[text] = scene.run(requests, name, seed, **numbers)
        if as_json:
            found = {text: as_dict(outcome) for text, outcome in outcomes.items()}
            typer.echo(json.dumps(found, indent=1))
        else:
            Console().print(_table(outcomes))
        if plot:
            _plot({text: o.timeline for text, o in outcomes.items()}, requests.name, plot)


def as_dict(outcome: SimulationResult) -> dict[str, Any]:
    """What came of it, in numbers; waits in seconds."""
    return {
        "requests": outcome.requests,
        "violations": outcome.violations,
        "attainment": round(outcome.attainment, 5),
        "wait_p50_s": round(outcome.wait_s(0.5), 3),
        "wait_p99_s": round(outcome.wait_s(0.99), 3),
        "usd": round(outcome.usd, 2),
        "usd_by_card": {card: round(usd, 2) for card, usd in outcome.usd_by_card.items()},
        "replica_h": round(outcome.replica_h, 2),
        "ups": outcome.ups,
        "downs": outcome.downs,
        "starts": outcome.starts,
        "retried": outcome.retried,
    }


def _table(outcomes: dict[str, SimulationResult]) -> Table:
    some = next(iter(outcomes.values()))
    title = (
        f"{some.requests} requests; in time: within {IN_TIME_SLOWDOWN:g} × what each takes alone"
    )
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
    for text, o in outcomes.items():
        table.add_row(
            text,
            f"{o.usd:.2f}",
            f"{o.replica_h:.1f}",
            f"{o.attainment:.2%}",
            f"{o.wait_s(0.5):.2f}",
            f"{o.wait_s(0.99):.2f}",
            str(o.ups),
            str(o.downs),
            str(o.starts),
        )
    return table


def _plot(timelines: dict[str, Any], title: str, out: Path) -> None:
    from autoscaling.simulation.plot import plot_timelines

    try:
        plot_timelines(timelines, title, out)
    except ImportError:
        raise SettingsError("--plot needs matplotlib: pip install 'octet[bench]'") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"--plot {out}: {error}") from None
    console.print(f"{out}: drawn", highlight=False)
