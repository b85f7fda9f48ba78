"""What `octet plan` reads: cards, models and prices, from options, settings and clusters."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from cluster.cards import CARDS, Card
from cluster.footprint import TEXT_TOKENS
from cluster.packing import Cards
from cluster.placement import Node
from cluster.structure import TRANSFORMERS, Structure, structure
from cluster.ways import Want

from .cost import ImageShape
from .engine.checkpoint import node_folder
from .errors import did_you_mean
from .settings import Model, Settings, SettingsError

CLIP_TOKENS = 77
# Steps, and rows of an image, as the model cards have them; Medium's as diffusers' documentation.
USUAL = {"sd3.5-large": (40, 2), "sd3.5-large-turbo": (4, 1), "sd3.5-medium": (28, 2)}


def parse_gpus(given: Iterable[str], reserved_gib: float) -> list[Cards]:
    """`h100:8`, each kind once. Raises `SettingsError`."""
    counts: dict[Card, int] = {}
    for text in given:
        name, _, count = text.partition(":")
        card = CARDS.get(name)
        if card is None:
            raise SettingsError(f"--gpu '{text}': card '{name}': {did_you_mean(name, CARDS)}")
        if not re.fullmatch(r"[1-9]\d{0,5}", count or "1"):
            raise SettingsError(f"--gpu '{text}': '{count}' is no number of cards")
        counts[card] = counts.get(card, 0) + int(count or 1)
    return [Cards(card, count, reserved_gib) for card, count in counts.items()]


def cards_of(nodes: Iterable[Node], reserved_gib: float) -> tuple[list[Cards], list[str]]:
    """The cards of a cluster, and in words which nodes have cards that are not known."""
    counts: dict[Card, int] = {}
    unknown = []
    for node in nodes:
        if node.num_gpus and node.card:
            counts[node.card] = counts.get(node.card, 0) + int(node.num_gpus)
        elif node.num_gpus:
            unknown.append(f"node {node.id[:8]}: {node.num_gpus:g} GPUs of an unknown card")
    return [Cards(card, count, reserved_gib) for card, count in counts.items()], unknown


def parse_models(given: Iterable[str], size: str, steps: int | None) -> list[Want]:
    """`sd3.5-large` or `sd3.5-large=SHARE`. Raises `SettingsError`."""
    wants = []
    for text in given:
        model, _, share = text.partition("=")
        if model not in TRANSFORMERS:
            raise SettingsError(f"--model '{text}': {did_you_mean(model, TRANSFORMERS)}")
        usual_steps, rows = USUAL[model]
        width, height = _size(size)
        shape = ImageShape(width, height, TEXT_TOKENS, rows, steps or usual_steps)
        wants.append(Want(model, structure(model), shape, shape.pixels, _share(text, share)))
    return _each_once(wants)


def wants_of(settings: Settings) -> list[Want]:
    """What a settings file serves: its default images, and the largest that it allows.

    Raises `SettingsError` for a model whose structure is not known here.
    """
    return [
        Want(
            model.id,
            structure_of(model, settings),
            ImageShape(
                model.defaults.width,
                model.defaults.height,
                CLIP_TOKENS + model.max_sequence_length,
                2 if model.defaults.guidance_scale > 1 else 1,
                model.defaults.num_inference_steps,
            ),
            model.limits.max_pixels,
        )
        for model in settings.models
    ]


def structure_of(model: Model, settings: Settings) -> Structure:
    """From the model's own files if they are here, else by the hub's name of it.

    Raises `SettingsError` if neither says it.
    """
    config = node_folder(model.source, settings.models_folder) / "transformer" / "config.json"
    if config.is_file():
        return Structure.of(json.loads(config.read_text(encoding="utf-8")))
    name = model.source.location.rpartition("/")[2].replace("stable-diffusion-", "sd")
    if name not in TRANSFORMERS:
        raise SettingsError(
            f"model '{model.id}': its structure is not known before `octet pull`; "
            f"known are {', '.join(TRANSFORMERS)}"
        )
    return structure(name)


def _size(text: str) -> tuple[int, int]:
    if not (match := re.fullmatch(r"(\d{2,5})x(\d{2,5})", text)):
        raise SettingsError(f"--size '{text}': WIDTHxHEIGHT in pixels is wanted")
    width, height = map(int, match.groups())
    if width % 16 or height % 16:
        raise SettingsError(f"--size '{text}': both must be multiples of 16")
    return width, height


def _share(text: str, share: str) -> float:
    try:
        value = float(share or 1)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise SettingsError(f"--model '{text}': '{share}' is no share of the images")
    return value


def _each_once(wants: list[Want]) -> list[Want]:
    for want in wants:
        if sum(w.model == want.model for w in wants) > 1:
            raise SettingsError(f"--model '{want.model}' is given twice")
    return wants


def with_prices(groups: Sequence[Cards], file: Path) -> list[Cards]:
    """Prices from a YAML file: `h100: 2.50`, or `h100: {on_demand: 2.50, spot: 1.10}`, $ an hour.

    Raises `SettingsError`.
    """
    try:
        prices = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{file}: {' '.join(str(error).split())}") from None
    if not isinstance(prices, dict):
        raise SettingsError(f"{file}: expected cards and prices")
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
        if key not in known or not isinstance(value, int | float) or value <= 0:
            raise SettingsError(
                f"{file}: {card.id}: '{key}: {value}' is no price; known: {[*known]}"
            )
    known.update(given)
    return replace(card, on_demand_usd_h=known["on_demand"], spot_usd_h=known["spot"])
