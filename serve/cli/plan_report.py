"""Reports of `octet plan`: a packing plan as a table with bars, as JSON and as settings."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import yaml
from rich import box
from rich.console import Console, Group
from rich.table import Column, Table
from rich.text import Text

from cluster.packing import PackedCards, Plan
from cluster.pools import PlannedPool, planned_pools
from cluster.serving_options import PlannedModel, ServingOption

COLOURS = "cyan", "green", "magenta", "yellow", "blue", "red"
# The settings of a pool that say where its replicas run; the plan decides them.
PLACEMENT_KEYS = "card", "replicas", "num_gpus", "memory_gib"
WIDTH = 112  # characters that the table needs
BAR = 44  # characters of the bar for a card's memory


def usd_per_1000(usd_h: float | None, images_s: float) -> float | None:
    """The price in $ of 1,000 images on a card that costs `usd_h` per hour."""
    return None if usd_h is None else usd_h / 3.6 / images_s


def as_json(plan: Plan, notes: Iterable[str] = ()) -> dict[str, Any]:
    """The plan as plain data, ready for JSON.

    The images/s of a card are those of one model, while the card generates no other model's images.
    """
    return {
        "models": {
            planned.model: {
                "images_s": plan.images_s[planned.model],
                "share": planned.share,
                "size": f"{planned.shape.width_px}x{planned.shape.height_px}",
                "steps": planned.shape.steps,
            }
            for planned in plan.planned_models
        },
        "mixed_images_s": plan.mixed_images_s,
        "cards": [
            {
                "card": packed.cards.card.id,
                "count": packed.cards.count,
                "text_encoder_gib": packed.cards.encoder_gib,
                "free_gib": _free_gib(packed),
                "replicas": [_option_as_json(packed, option) for option in packed.options],
            }
            for packed in plan.packed_cards
        ],
        "pools": [asdict(pool) for pool in planned_pools(plan)],
        "notes": [*notes],
    }


def _option_as_json(packed: PackedCards, option: ServingOption) -> dict[str, Any]:
    card = packed.cards.card
    return {
        **option._asdict(),
        "latency_s": option.latency_s,
        "usd_per_1000_on_demand": usd_per_1000(card.on_demand_usd_h, option.images_s),
        "usd_per_1000_spot": usd_per_1000(card.spot_usd_h, option.images_s),
    }


def _free_gib(packed: PackedCards) -> float:
    """GiB of a card that no replica takes."""
    return packed.cards.free_gib - sum(option.replicas * option.gib for option in packed.options)


def as_settings(plan: Plan, base: Mapping[str, Any] | None = None) -> str:
    """The plan as settings in YAML.

    With `base`, the data of a settings file, the result is `base` with the planned pools. Otherwise
    it holds the text encoders and models of the plan alone.
    """
    pools = planned_pools(plan)
    data: dict[str, Any] = dict(base or {"text_encoders": [{"id": "sd35"}]})
    encoders = [_placement(pool) for pool in pools if pool.model is None] or [{"num_gpus": 0.0}]
    data["text_encoders"] = [
        {**_kept(encoder, PLACEMENT_KEYS, encoders[0].get("replicas", 1)), **encoders[0]}
        for encoder in data["text_encoders"]
    ]
    given = {model["id"]: model for model in data.get("models", [])}
    data["models"] = [
        {
            "id": planned.model,
            **given.get(planned.model, {"limits": {"max_pixels": planned.max_pixels}}),
            "pools": [
                _pool(pool, planned, given.get(planned.model, {}).get("pools", []))
                for pool in pools
                if pool.model == planned.model
            ],
        }
        for planned in plan.planned_models
    ]
    return yaml.safe_dump(data, sort_keys=False, width=120, default_flow_style=None)


def _placement(pool: PlannedPool) -> dict[str, Any]:
    return {
        "card": pool.card,
        "replicas": pool.replicas,
        "num_gpus": pool.num_gpus,
        "memory_gib": round(pool.memory_gib, 3),
    }


def _kept(settings: Mapping[str, Any], keys: Container[str], replicas: int) -> dict[str, Any]:
    """The settings without `keys`.

    `replicas`: the planned number; a larger `min_replicas` is lowered to it.
    """
    kept = {key: value for key, value in settings.items() if key not in keys}
    if kept.get("min_replicas") is not None:
        kept["min_replicas"] = min(kept["min_replicas"], replicas)
    return kept


def _pool(
    pool: PlannedPool, planned: PlannedModel, before: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Settings of a planned pool.

    The plan decides the placement, the slots and `adaln_8_bit`. All other settings are taken from
    a pool of the same precision in `before`, the model's pools so far: from the one for this card,
    else from one for any card, else from the first.
    """
    precision = _precision(pool)
    alike = [p for p in before if p["precision"] == precision]
    order = {pool.card: 0, None: 1}
    same = min(alike, key=lambda p: order.get(p.get("card"), 2), default={})
    size = f"{planned.shape.width_px}x{planned.shape.height_px}"
    placement = {"precision": precision, **_placement(pool), "slots": pool.slots}
    adaln = {"adaln_8_bit": True} if pool.recipe == "fp8-adaln8" else {}
    kept = _kept(same, (*PLACEMENT_KEYS, "slots", "adaln_8_bit"), pool.replicas)
    return {"warm_sizes": [size], **kept, **placement, **adaln}


def _precision(pool: PlannedPool) -> str:
    return "fp8" if pool.recipe.startswith("fp8") else "fp16"


def left_out(plan: Plan, settings: Mapping[str, Any]) -> list[str]:
    """A line for each pool of the settings that has no successor in the plan.

    A successor is a pool of the same model, precision and card; without a `card`, on any card.
    """
    there = {(p.model, _precision(p), card) for p in planned_pools(plan) for card in (p.card, None)}
    return [
        f"left out: pool {pool['precision']}{f' on {card}' if card else ''} of {model['id']}"
        for model in settings["models"]
        for pool in model["pools"]
        if (model["id"], pool["precision"], card := pool.get("card")) not in there
    ]


def as_text(plan: Plan, notes: Iterable[str] = ()) -> Group:
    """The plan for a terminal: a table, bars of the cards' memory, totals and notes."""
    return Group(_table(plan), Text(), *_bars(plan), Text(), *_totals(plan, notes))


def _table(plan: Plan) -> Table:
    right = ("rep × slots", "GiB", "GPU", "images/s", "s full", "$/1,000", "spot $")
    table = Table(
        Column("cards", no_wrap=True),
        Column("model", no_wrap=True),
        Column("runs", no_wrap=True),
        *(Column(name, justify="right", no_wrap=True) for name in right),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    fractions = {(p.model, p.card, p.slots): p.num_gpus for p in planned_pools(plan)}
    for packed in plan.packed_cards:
        card, name = packed.cards.card, f"{packed.cards.count} × {packed.cards.card.id}"
        for option in packed.options:
            table.add_row(
                name,
                option.model,
                option.recipe,
                f"{option.replicas} × {option.slots}",
                f"{option.gib:.1f}",
                f"{fractions[option.model, card.id, option.slots]:.4f}",
                f"{option.images_s:.3g}",
                f"{option.latency_s:.1f}",
                _usd(usd_per_1000(card.on_demand_usd_h, option.images_s)),
                _usd(usd_per_1000(card.spot_usd_h, option.images_s)),
            )
            name = ""
        if not packed.options:
            table.add_row(name, "–")
        if packed.cards.encoder_gib:
            gpu = fractions[None, card.id, 1]
            table.add_row(
                "", "text encoders", "", "1", f"{packed.cards.encoder_gib:.1f}", f"{gpu:.4f}"
            )
    return table


def _usd(usd: float | None) -> str:
    return "–" if usd is None else f"{usd:.2f}"


def _bars(plan: Plan) -> Iterable[Text]:
    """A bar for each kind of card and packing that shows, to scale, what takes the memory."""
    colours = {
        planned.model: COLOURS[i % len(COLOURS)] for i, planned in enumerate(plan.planned_models)
    }
    for packed in plan.packed_cards:
        parts = [
            (option.gib, f"{option.model} {option.gib:.0f}", f"black on {colours[option.model]}")
            for option in packed.options
            for _ in range(option.replicas)
        ]
        if packed.cards.encoder_gib:
            parts.append((packed.cards.encoder_gib, "text", "black on white"))
        if packed.cards.reserved_gib:
            parts.append((packed.cards.reserved_gib, "reserved", "white on bright_black"))
        total_gib = packed.cards.card.memory_gib
        bar = Text(f"{packed.cards.count:>4} × {packed.cards.card.id:<8} |")
        for gib, label, style in parts:
            width = max(1, round(BAR * gib / total_gib))
            bar.append(label[: width - 1].ljust(width - 1) + "|", style)
        bar.append(f" {max(0.0, _free_gib(packed)):.0f} of {total_gib:.0f} GiB free")
        yield bar


def _totals(plan: Plan, notes: Iterable[str]) -> Iterable[Text]:
    options = [option for packed in plan.packed_cards for option in packed.options]
    for planned in plan.planned_models:
        size = f"{planned.shape.width_px}x{planned.shape.height_px}"
        yield Text(
            f"{planned.model}: {plan.images_s[planned.model]:.3g} images/s of {size}, "
            f"{planned.shape.steps} steps, if no other model is requested"
        )
    if len(plan.planned_models) > 1:
        yield Text(
            f"all models together: {plan.mixed_images_s:.3g} images/s, each model by its share"
        )
    yield Text("runs: the precision. rep × slots: replicas on a card × images at a time in each.")
    yield Text("GiB, GPU: of one replica. images/s, $: of a card that generates this model alone.")
    yield Text("s full: seconds of an image while all slots of its model are taken.")
    yield Text("$/1,000, spot $: of 1,000 images, on demand and on spot nodes.")
    yield Text(
        "Bars: the memory of one card, to scale. Each box is a replica of a model or of the text "
        "encoders.",
        end="\n\n",
    )
    if estimated := {option.model for option in options if option.estimated}:
        yield Text(
            f"Estimated from arithmetic, not measured: images/s of {', '.join(sorted(estimated))}.",
            "yellow",
        )
    if not any(option.recipe in ("bf16", "fp16") for option in options):
        yield Text(
            "No 16-bit pool: requests for `precision: fp16` are refused, and an image with "
            "non-finite numbers is not generated again. Cards without FP8 would run such a pool.",
            "yellow",
        )
    if not all(pool.even for pool in planned_pools(plan)):
        yield Text(
            "Replicas on one kind of card differ in size: Ray may place them elsewhere than "
            "planned, and then the last ones do not fit. No card's memory is ever exceeded.",
            "yellow",
        )
    yield from (Text(note, "yellow") for note in notes)


def print_plan(plan: Plan, notes: Iterable[str] = ()) -> None:
    """Print the plan; a narrow terminal wraps the lines, so that no number is cut off."""
    console = Console()
    Console(width=max(console.width, WIDTH)).print(as_text(plan, notes))
