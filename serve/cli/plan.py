"""The commands of `octet` that look at cards."""

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

from ..errors import SettingsError
from ..settings.file import load_settings
from . import plan_inputs as planning
from . import plan_report
from .plan_inputs import nodes_of_cluster
from .terminal import ConfigOption, Debug, complain, readable_errors


def plan(
    gpu: Annotated[
        list[str] | None, typer.Option(help=f"CARD:COUNT, repeatable. Cards: {', '.join(CARDS)}.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="MODEL or MODEL=SHARE of the images, repeatable. Models: "
            f"{', '.join(TRANSFORMERS)}."
        ),
    ] = None,
    config: ConfigOption = None,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster whose nodes are planned for.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Of images that are planned for; default: 1024x1024.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Of them; default: the model card's.")
    ] = None,
    latency_s: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Of an image while its model's slots are taken; default: 4 × its own time.",
        ),
    ] = None,
    reserve_gib: Annotated[float, typer.Option(min=0, help="Of each card, for others.")] = 0.0,
    adaln_8_bit: Annotated[
        bool, typer.Option("--adaln-8-bit", help="Store more of FP8 models in 8 bit.")
    ] = False,
    encoders_on_cpu: Annotated[bool, typer.Option("--encoders-on-cpu")] = False,
    prices: Annotated[Path | None, typer.Option(help="YAML: card to $ an hour.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    as_settings: Annotated[
        bool, typer.Option("--settings", help="Print it as settings: CONFIG's, or their part.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Plan which replicas share which cards, what they draw and what an image costs.

    Needs neither a GPU nor Ray. What does not fit is explained, with exit code 2.
    """
    with readable_errors(debug):
        if bool(model) == bool(config) or bool(gpu) == bool(ray):
            raise SettingsError("wanted: --gpu or --ray, and --model or --config")
        if config and (size or steps):
            raise SettingsError("--size and --steps are for --model: CONFIG has its own")
        if as_json and as_settings:
            raise SettingsError("--json or --settings, not both")
        settings = load_settings(config) if config else None
        planned_models = (
            planning.planned_models_of(settings)
            if settings
            else planning.parse_models(model or [], size or "1024x1024", steps)
        )
        groups, notes = planning.parse_gpus(gpu or [], reserve_gib), list[str]()
        if ray:
            groups, notes = planning.cards_of(nodes_of_cluster(ray), reserve_gib)
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
            raise typer.Exit(2) from None
        if as_json:
            typer.echo(json.dumps(plan_report.as_json(found, notes), indent=2))
        elif as_settings:
            if notes:
                complain("\n".join(notes))
            base = settings.model_dump(mode="json", exclude_unset=True) if settings else None
            typer.echo(plan_report.as_settings(found, base), nl=False)
        else:
            plan_report.print_plan(found, notes)
