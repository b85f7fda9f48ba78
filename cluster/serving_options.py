"""The ways to serve a model on a card: how many replicas, and how many slots each.

Replicas copy the weights, slots share them; both fill the gaps in which the card waits for its
host, and slots also share the reading of the weights. Images/s of a card that draws this model
alone:

    min(1 / g, replicas / (g + h)),    g: seconds of the card for an image, h: of its host

A way is allowed only if all images under way at once are still finished within the latency target
(Little's law: replicas · slots ÷ images/s).

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from .cards import BF16_SINCE, Card
from .cost import EFFICIENCY, REFERENCES, ImageShape, reference
from .footprint import footprint, padded, transformer_bytes
from .structure import Structure

MAX_REPLICAS = 8  # of a model on a card
SLOTS = 1, 2, 4, 8  # with guidance they fill the numbers of rows that the engine has code for
FRACTIONS = 10_000  # Ray counts GPUs in ten-thousandths
WORTH = 1.02  # a way that takes more memory is so much faster, or not considered
DEFAULT_LATENCY_FACTOR = (
    4.0  # the latency target, where none is given: × the image's own time on that card
)


@dataclass(frozen=True, slots=True)
class CardGroup:
    """`count` equal cards. Each keeps `reserved_gib` for others; the rest is counted in parts.

    A part is a ten-thousandth, as Ray counts. `encoder_gib`: of a text encoder on each of them.
    """

    card: Card
    count: int
    reserved_gib: float = 0.0
    encoder_gib: float = 0.0

    @property
    def total_gib(self) -> float:
        return max(self.card.memory_gib - self.reserved_gib, 0.0)

    @property
    def free_parts(self) -> int:
        """For models; not the last one, because Ray Serve adds up in floating point."""
        return FRACTIONS - 1 - self.parts(self.encoder_gib)

    @property
    def free_gib(self) -> float:
        return max(self.total_gib - self.encoder_gib, 0.0)

    def parts(self, gib: float) -> int:
        """Rounded up; more than there are if nothing is left."""
        if not gib:
            return 0
        return math.ceil(FRACTIONS * gib / self.total_gib) if self.total_gib else 2 * FRACTIONS


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model, the image that it is planned for, and the largest one that it may be asked for.

    `share`: of all images, relative to the other models'.
    """

    model: str
    structure: Structure
    shape: ImageShape
    max_pixels: int
    share: float = 1.0


class ServingOption(NamedTuple):
    """How a card serves a model: `gib` and `parts` are one replica's, `images_s` the card's."""

    model: str
    recipe: str
    replicas: int
    slots: int
    gib: float
    parts: int
    images_s: float
    estimated: bool  # from arithmetic, not measured

    @property
    def total_parts(self) -> int:
        return self.replicas * self.parts

    @property
    def latency_s(self) -> float:
        """Of an image while all slots of the way are taken, and the card draws nothing else."""
        return self.replicas * self.slots / self.images_s


@dataclass(frozen=True, slots=True)
class PlanTerms:
    """What holds for every card; see `plan`."""

    latency_s: float | None = None
    adaln_8_bit: bool = False

    def allowed_s(self, planned: PlannedModel, card: Card) -> float:
        alone_s = sum(times(planned, recipe_on(card, adaln_8_bit=self.adaln_8_bit), card, 1))
        return self.latency_s or DEFAULT_LATENCY_FACTOR * alone_s


def recipe_on(card: Card, *, adaln_8_bit: bool = False) -> str:
    """What a card runs: FP8 where it can."""
    if card.has_fp8:
        return "fp8-adaln8" if adaln_8_bit else "fp8"
    return "bf16" if card.compute_capability >= BF16_SINCE else "fp16"


def times(planned: PlannedModel, recipe: str, card: Card, slots: int) -> tuple[float, float]:
    """Seconds of the card and of its host for one image, of `slots` that are drawn together.

    Their rows are padded to a power of two.
    """
    costs, shape = reference(planned.structure, recipe, card), planned.shape
    n = shape.tokens
    compute = padded(slots * shape.rows) * (costs.token * n + costs.token2 * n * n)
    reading = transformer_bytes(planned.structure, recipe) / (
        1e9 * card.bandwidth_gb_s * EFFICIENCY
    )
    card_s = shape.steps * max(compute, reading) / slots + costs.pixel * shape.pixels
    return card_s, costs.constant + shape.steps * costs.step / slots


@lru_cache(10_000)
def all_options(planned: PlannedModel, cards: CardGroup, terms: PlanTerms) -> list[ServingOption]:
    """The ways to serve a model on a card that keep its images in time, whatever they take."""
    card = cards.card
    recipe = recipe_on(card, adaln_8_bit=terms.adaln_8_bit)
    estimated = (planned.structure, recipe, card.id) not in REFERENCES
    found = []
    for slots in SLOTS:
        tokens = planned.shape.text_tokens
        gib = footprint(planned.structure, recipe, slots, planned.max_pixels, tokens).total
        card_s, host_s = times(planned, recipe, card, slots)
        for replicas in range(1, MAX_REPLICAS + 1):
            images_s = min(1 / card_s, replicas / (card_s + host_s))
            option = ServingOption(
                planned.model, recipe, replicas, slots, gib, cards.parts(gib), images_s, estimated
            )
            if option.latency_s <= terms.allowed_s(planned, card):
                found.append(option)
    return found


@lru_cache(10_000)
def fitting_options(
    planned: PlannedModel, cards: CardGroup, terms: PlanTerms
) -> list[ServingOption]:
    """Those that fit, by memory, each worth what it takes."""
    found = [
        option
        for option in all_options(planned, cards, terms)
        if option.total_parts <= cards.free_parts
    ]
    worth: list[ServingOption] = []
    for option in sorted(found, key=lambda w: (w.total_parts, -w.images_s)):
        if not worth or option.images_s > WORTH * worth[-1].images_s:
            worth.append(option)
    return worth
