"""The options for serving a model on a card: how many replicas, and how many slots each.

Each replica holds its own copy of the weights; the slots of a replica share one copy. Replicas and
slots both fill the gaps in which the card waits for its host. Slots also share the reading of the
weights. A card that runs this model alone generates, in images/s:

    min(kept / g, replicas / (g + h))

g is the time that the card works for one image, and h is the time that the host works for it, both
in seconds. `kept` is 1 for one replica, and `KEPT` for several. An option is allowed only if images
are finished within the latency target while all slots are taken. By Little's law an image then
takes replicas · slots ÷ images/s.

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

MAX_REPLICAS = 8  # of one model on one card
SLOTS = 1, 2, 4, 8  # with guidance, they fill the numbers of rows that the engine has code for
FRACTIONS = 10_000  # Ray counts GPUs in ten-thousandths
# The part of a card's time that is left when several replicas of a model take turns on it. This is
# an assumption, the goal of packing; `bench.gpu.packing` measures it.
KEPT = 0.9
MIN_SPEEDUP = 1.02  # an option that takes more memory must be faster by more than this
# Where no latency target is given, an image may take this many times its time alone on the card.
DEFAULT_LATENCY_FACTOR = 4.0


@dataclass(frozen=True, slots=True)
class CardGroup:
    """`count` equal cards.

    `reserved_gib`: memory of each card that is left to other programs. The rest of the memory is
    counted in parts; a part is a ten-thousandth of it, because Ray counts GPUs in ten-thousandths.
    `encoder_gib`: memory of each card that a text encoder takes.
    """

    card: Card
    count: int
    reserved_gib: float = 0.0
    encoder_gib: float = 0.0

    @property
    def total_gib(self) -> float:
        """GiB of a card that Octet may use."""
        return max(self.card.memory_gib - self.reserved_gib, 0.0)

    @property
    def free_parts(self) -> int:
        """The parts of a card that are left for models.

        One part stays unused, because Ray Serve adds up fractions in floating point, which is not
        exact.
        """
        return FRACTIONS - 1 - self.parts(self.encoder_gib)

    @property
    def free_gib(self) -> float:
        """GiB of a card that are left for models."""
        return max(self.total_gib - self.encoder_gib, 0.0)

    def parts(self, gib: float) -> int:
        """Convert GiB to parts of a card, rounded up.

        If Octet may use no memory of the card, the result is more parts than a card has.
        """
        if not gib:
            return 0
        return math.ceil(FRACTIONS * gib / self.total_gib) if self.total_gib else 2 * FRACTIONS


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model to serve.

    `shape`: the image for which its speed is planned. `max_pixels`: the area of the largest image
    that may be requested. `share`: how many of all images are this model's, relative to the shares
    of the other models.
    """

    model: str
    structure: Structure
    shape: ImageShape
    max_pixels: int
    share: float = 1.0


class ServingOption(NamedTuple):
    """A way to serve a model on a card.

    `gib` and `parts` are one replica's memory. `images_s` is the rate of all replicas on the card,
    in images/s, if the card runs this model alone.
    """

    model: str
    recipe: str
    replicas: int
    slots: int
    gib: float
    parts: int
    images_s: float
    estimated: bool  # `images_s` follows from arithmetic, not from a measurement

    @property
    def total_parts(self) -> int:
        """The parts of a card that all replicas take together."""
        return self.replicas * self.parts

    @property
    def latency_s(self) -> float:
        """Seconds of an image while all slots are taken and the card runs no other model."""
        return self.replicas * self.slots / self.images_s


@dataclass(frozen=True, slots=True)
class PlanTerms:
    """The terms of a plan, for every card.

    `latency_s`: the latency target; None: `DEFAULT_LATENCY_FACTOR` times an image's time alone.
    `adaln_8_bit`: whether FP8 replicas store AdaLN's weights in 8 bit.
    """

    latency_s: float | None = None
    adaln_8_bit: bool = False

    def allowed_s(self, planned: PlannedModel, card: Card) -> float:
        """The seconds that an image of this model may take on this card."""
        alone_s = sum(times(planned, recipe_on(card, adaln_8_bit=self.adaln_8_bit), card, 1))
        return self.latency_s or DEFAULT_LATENCY_FACTOR * alone_s


def recipe_on(card: Card, *, adaln_8_bit: bool = False) -> str:
    """The recipe that a card runs: FP8 if it has FP8 tensor cores, else 16 bit."""
    if card.has_fp8:
        return "fp8-adaln8" if adaln_8_bit else "fp8"
    return "bf16" if card.compute_capability >= BF16_SINCE else "fp16"


def times(planned: PlannedModel, recipe: str, card: Card, slots: int) -> tuple[float, float]:
    """Seconds of the card and seconds of its host that one image takes.

    `slots`: the number of images that run together and share these times. The rows of the images
    are padded to a power of two.
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
    """All options for a model on a card that meet the latency target.

    Options that take more memory than the card has are among them.
    """
    card = cards.card
    recipe = recipe_on(card, adaln_8_bit=terms.adaln_8_bit)
    estimated = (planned.structure, recipe, card.id) not in REFERENCES
    found = []
    for slots in SLOTS:
        tokens = planned.shape.text_tokens
        gib = footprint(planned.structure, recipe, slots, planned.max_pixels, tokens).total
        card_s, host_s = times(planned, recipe, card, slots)
        for replicas in range(1, MAX_REPLICAS + 1):
            kept = KEPT if replicas > 1 else 1.0
            images_s = min(kept / card_s, replicas / (card_s + host_s))
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
    """The options that fit into the card, from little to much memory.

    An option that takes more memory than another one is left out unless it is faster by more than
    the factor `MIN_SPEEDUP`.
    """
    fitting = [
        option
        for option in all_options(planned, cards, terms)
        if option.total_parts <= cards.free_parts
    ]
    kept: list[ServingOption] = []
    for option in sorted(fitting, key=lambda each: (each.total_parts, -each.images_s)):
        if not kept or option.images_s > MIN_SPEEDUP * kept[-1].images_s:
            kept.append(option)
    return kept
