"""`octet plan`: plan which replicas share which cards, and what that costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cluster import packing
from cluster.cards import CARDS
from cluster.footprint import text_encoders_gib
from cluster.serving_options import PlanTerms
from cluster.structure import TRANSFORMERS

from ..settings.file import load_settings
from . import plan_inputs as planning
from . import plan_report
from .exit_codes import FAULT, UsageError
from .ray_cluster import nodes_of_cluster
from .terminal import ConfigOption, complain, existing


def plan(
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            help="Cards to plan for, as CARD:COUNT; repeat the option for several kinds. Known "
            f"cards: {', '.join(CARDS)}."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model to serve, as MODEL or MODEL=SHARE, where SHARE is its part of all images; "
            f"repeat the option for several. Known models: {', '.join(TRANSFORMERS)}."
        ),
    ] = None,
    config: ConfigOption = None,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster; the plan is for its nodes.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Size of the images to plan for; default: 1024x1024.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, max=1000, help="Steps of the images to plan for; default: the model card's."
        ),
    ] = None,
    latency_s: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Longest time in seconds that an image may take while all slots of its model are "
            "taken; default: 4 × its time alone.",
        ),
    ] = None,
    reserve_gib: Annotated[
        float, typer.Option(min=0, help="GiB of each card to leave free for other programs.")
    ] = 0.0,
    adaln_8_bit: Annotated[
        bool,
        typer.Option("--adaln-8-bit", help="Store the AdaLN layers of FP8 models in 8 bit too."),
    ] = False,
    encoders_on_cpu: Annotated[
        bool, typer.Option("--encoders-on-cpu", help="Run the text encoders on CPUs.")
    ] = False,
    prices: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with the price of each card in $ per hour.", callback=existing
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    as_settings: Annotated[
        bool,
        typer.Option(
            "--settings",
            help="Print the plan as settings: those of CONFIG with the planned pools, or the pools "
            "alone.",
        ),
    ] = False,
) -> None:
    """Plan which replicas share which cards, how many images they generate and at what cost.

    Needs neither a GPU nor Ray. If the models do not fit, the exit code is 1 and the reason is
    printed.
    """
    groups, notes = planning.parse_gpus(gpu or [], reserve_gib), list[str]()
    for one, other, example in (
        ((gpu, "--gpu"), (ray, "--ray"), "--gpu h100:8"),
        ((model, "--model"), (config, "--config"), "--model sd3.5-large"),
    ):
        if bool(one[0]) == bool(other[0]):
            how = "only one of" if one[0] else "one of"
            raise UsageError(f"give {how} {one[1]} and {other[1]}, such as {example}")
    if config and (size or steps):
        raise UsageError("--size and --steps go with --model: CONFIG has its own")
    if as_json and as_settings:
        raise UsageError("give --json or --settings, not both")
    settings = load_settings(config) if config else None
    planned_models = (
        planning.planned_models_of(settings)
        if settings
        else planning.parse_models(model or [], size or "1024x1024", steps)
    )
    if ray:
        groups, notes = planning.cards_of(nodes_of_cluster(ray), reserve_gib)
    if encoders_on_cpu:
        notes += planning.cpu_encoder_notes(planned_models)
    if prices:
        groups = planning.with_prices(groups, prices)
    encoder_gib = text_encoders_gib()
    if settings:
        encoder_gib = planning.encoder_gib(planning.only_encoder(settings), settings)
    try:
        found = packing.plan(
            groups,
            planned_models,
            terms=PlanTerms(latency_s, adaln_8_bit),
            encoder_gib=None if encoders_on_cpu else encoder_gib,
        )
    except packing.DoesNotFit as error:
        if as_json:
            typer.echo(json.dumps({"reason": str(error), "notes": notes}))
        else:
            complain("\n".join([*notes, str(error)]))
        raise typer.Exit(FAULT) from None
    if as_json:
        typer.echo(json.dumps(plan_report.as_json(found, notes), indent=2))
    elif as_settings:
        base = settings.model_dump(mode="json", exclude_unset=True) if settings else None
        for note in (*notes, *(plan_report.left_out(found, base) if base else ())):
            complain(note)
        typer.echo(plan_report.as_settings(found, base), nl=False)
    else:
        plan_report.print_plan(found, notes)
