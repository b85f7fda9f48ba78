"""Inputs of `octet plan`: cards, models and prices, from options, settings and Ray clusters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from cluster.cards import CARDS, Card, cards_named
from cluster.cost import PROMPT_CORE_S, ImageShape
from cluster.footprint import (
    CONTEXT_GIB,
    ENCODER_PEAK_GIB,
    GIB,
    TEXT_TOKENS,
    WORKSPACE_GIB,
    text_encoders_gib,
)
from cluster.placement import Node
from cluster.serving_options import CardGroup, PlannedModel
from cluster.structure import TRANSFORMERS, USUAL_IMAGES, structure

from ..errors import SettingsError, did_you_mean
from ..models.checkpoints import node_folder, size_bytes
from ..models.reference_work import CLIP_TOKENS
from ..models.structures import structure_of
from ..settings.application import Settings
from ..settings.models import Encoder, Model
from .exit_codes import UsageError

SD35_TEXT_WIDTH = 4096


def parse_gpus(given: Iterable[str], reserved_gib: float) -> list[CardGroup]:
    """Parse `CARD:COUNT` texts, such as `h100:8`; counts of the same card add up.

    `reserved_gib`: GiB of each card that stay free. Raises `SettingsError` for an unknown card, or
    for a count that is not a number from 1 to 999999.
    """
    counts: dict[Card, int] = {}
    for text in given:
        name, _, count = text.partition(":")
        meant = cards_named(name)
        if len(meant) != 1:
            known = [card.id for card in meant] or list(CARDS)
            hint = f"name one of {', '.join(known)}" if meant else did_you_mean(name, known)
            raise UsageError(f"--gpu '{text}': card '{name}': {hint}")
        (card,) = meant
        if not re.fullmatch(r"[1-9]\d{0,5}", count or "1"):
            raise UsageError(
                f"--gpu '{text}': '{count}' must be a number of cards from 1 to 999999"
            )
        counts[card] = counts.get(card, 0) + int(count or 1)
    return [CardGroup(card, count, reserved_gib) for card, count in counts.items()]


def cards_of(nodes: Iterable[Node], reserved_gib: float) -> tuple[list[CardGroup], list[str]]:
    """The cards of a cluster's nodes, and a note for each node that is left out of the plan."""
    counts: dict[Card, int] = {}
    left_out = []
    for node in nodes:
        card, name = node.card, f"node {node.id[:8]}"
        if not node.num_gpus:
            continue
        if card is None:
            left_out.append(f"{name}: {node.num_gpus:g} GPUs of an unknown card are left out")
        elif card.has_fp8 and not node.has_fp8(card):
            left_out.append(f"{name}: {card.id} is labelled for 16 bit and left out")
        else:
            counts[card] = counts.get(card, 0) + int(node.num_gpus)
    return [CardGroup(card, count, reserved_gib) for card, count in counts.items()], left_out


def cpu_encoder_notes(planned_models: Iterable[PlannedModel]) -> list[str]:
    """A note about what a new prompt costs if CPUs encode it, for models that use SD3.5's T5."""
    if not any(m.structure.text_width == SD35_TEXT_WIDTH for m in planned_models):
        return []
    times = ", ".join(f"{PROMPT_CORE_S / cores:.0f} s on {cores} cores" for cores in (2, 8, 32))
    return [
        f"Text encoders on CPUs: a new prompt takes about {times} in t5-fp8 (measured on 2 slow "
        "cores, the others by proportion; `python -m bench.t5` measures yours). Prompts that were "
        "encoded before, and warm_prompts, cost nothing."
    ]


def parse_models(given: Iterable[str], size: str, steps: int | None) -> list[PlannedModel]:
    """Parse `MODEL` or `MODEL=SHARE` texts, such as `sd3.5-large=2`.

    `size` and `steps`: those of the images to plan for. Raises `SettingsError` for an unknown or
    repeated model, and for a share or size that is not valid.
    """
    planned_models = []
    for text in given:
        model, _, share = text.partition("=")
        model = model.rpartition("/")[2].replace("stable-diffusion-", "sd")  # a name on the hub
        if model not in TRANSFORMERS:
            raise UsageError(f"--model '{text}': {did_you_mean(model, TRANSFORMERS)}")
        usual_steps, rows = USUAL_IMAGES[model]
        width, height = _size(size)
        shape = ImageShape(width, height, TEXT_TOKENS, rows, steps or usual_steps)
        planned_models.append(
            PlannedModel(model, structure(model), shape, shape.pixels, _share(text, share))
        )
    return _without_repeats(planned_models)


def planned_models_of(settings: Settings) -> list[PlannedModel]:
    """The models of a settings file, as models to plan for.

    The plan is for a model's default image, with memory for the largest image that its limits
    allow. Raises `SettingsError` for a model whose structure is not known on this node.
    """
    return [
        PlannedModel(
            model.id,
            structure_of(model, settings.models_folder),
            ImageShape(
                model.defaults.width,
                model.defaults.height,
                CLIP_TOKENS + model.max_sequence_length,
                2 if model.defaults.guidance_scale > 1 else 1,
                model.defaults.num_inference_steps,
            ),
            most_pixels(model),
        )
        for model in settings.models
    ]


def most_pixels(model: Model) -> int:
    """Pixels of the largest image that a model's limits allow."""
    return min(model.limits.max_pixels, model.limits.max_size_px**2)


def only_encoder(settings: Settings) -> Encoder:
    """The one set of text encoders of the settings.

    Raises `SettingsError` if there are several, because a plan is for one set.
    """
    if len(settings.text_encoders) > 1:
        raise SettingsError(
            "a plan is for one set of text encoders: plan each set with settings of its own"
        )
    return settings.text_encoders[0]


def encoder_gib(encoder: Encoder, settings: Settings) -> float:
    """GiB of one replica of the text encoders.

    The encoders of SD3.5 have a known size; the size of others is computed from their files. Raises
    `SettingsError` if the structure of a model that uses them is not known.
    """
    readers = [m for m in settings.models if m.text_encoder == encoder.id]
    if any(structure_of(m, settings.models_folder).text_width == SD35_TEXT_WIDTH for m in readers):
        weights_gib = text_encoders_gib(t5_in_fp8=encoder.precision.startswith("t5-"))
        return weights_gib * (2 if encoder.precision == "fp32" else 1)
    folder = node_folder(encoder.source, settings.models_folder)
    parts = [part.name for part in folder.glob("text_encoder*")]
    files_gib = sum(size_bytes(folder, part) for part in parts) / GIB
    return files_gib + ENCODER_PEAK_GIB + CONTEXT_GIB + WORKSPACE_GIB


def _size(text: str) -> tuple[int, int]:
    if not (match := re.fullmatch(r"([1-9]\d{1,4})x([1-9]\d{1,4})", text)):
        raise UsageError(f"--size '{text}': expected WIDTHxHEIGHT in pixels")
    width, height = map(int, match.groups())
    if width % 16 or height % 16:
        raise UsageError(f"--size '{text}': width and height must be multiples of 16")
    return width, height


def _share(text: str, share: str) -> float:
    try:
        value = float(share or 1)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise UsageError(
            f"--model '{text}': '{share}' must be a share of the images: a number above 0"
        )
    return value


def _without_repeats(planned_models: list[PlannedModel]) -> list[PlannedModel]:
    for planned in planned_models:
        if sum(other.model == planned.model for other in planned_models) > 1:
            raise UsageError(f"--model '{planned.model}' is given twice")
    return planned_models


def with_prices(groups: Sequence[CardGroup], file: Path) -> list[CardGroup]:
    """The cards with prices in $ per hour from a YAML file.

    A line is `h100: 2.50` (on demand) or `h100: {on_demand: 2.50, spot: 1.10}`. Cards that the file
    does not name keep their prices. Raises `SettingsError` if the file cannot be read, names an
    unknown card, or states something that is not a price.
    """
    try:
        prices = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{file}: {' '.join(str(error).split())}") from None
    if not isinstance(prices, dict):
        raise SettingsError(f"{file}: expected lines of cards and prices, such as h100: 2.50")
    for card in prices:
        if card not in CARDS:
            raise SettingsError(f"{file}: card '{card}': {did_you_mean(str(card), CARDS)}")
    return [
        replace(group, card=_priced(group.card, prices[group.card.id], file))
        if group.card.id in prices
        else group
        for group in groups
    ]


def _priced(card: Card, price: Any, file: Path) -> Card:
    given = price if isinstance(price, dict) else {"on_demand": price}
    known = {"on_demand": card.on_demand_usd_h, "spot": card.spot_usd_h}
    for key, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key not in known or not number or not 0 < value < 1e6:
            raise SettingsError(
                f"{file}: {card.id}: '{key}: {value}' is no price: expected {' or '.join(known)} "
                "and a number of $ per hour above 0"
            )
    known.update(given)
    return replace(card, on_demand_usd_h=known["on_demand"], spot_usd_h=known["spot"])
