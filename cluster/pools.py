"""A packing plan in Ray's terms: pools with fractions of a GPU.

Ray adds up fractions and knows nothing of memory, and with its packing strategy it fills a card
before it takes the next. Fractions are rounded up to the ten-thousandths in which Ray counts, so
whatever Ray puts on a card fits into its memory. Where every card of a kind has the same number of
replicas and an equal part is enough for each, they all get that part: then no card can get more of
them than planned, and whichever Ray puts where, all find a place. Otherwise Ray may place them so
that the last ones find none: `Pool.even` says which it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .footprint import text_encoders_gib
from .packing import Plan
from .ways import Way

FRACTIONS = 10_000


@dataclass(frozen=True, slots=True)
class PlannedPool:
    """Equal replicas on cards of one kind; each takes `num_gpus` and is promised `memory_gib`.

    `model` is None for text encoders.
    """

    model: str | None
    recipe: str
    card: str
    replicas: int
    slots: int
    num_gpus: float
    memory_gib: float
    even: bool = True


def planned_pools(plan: Plan) -> list[PlannedPool]:
    """The models' pools, then those of the text encoders."""
    counted: dict[tuple[str, Way], int] = {}
    encoders: dict[str, int] = {}
    for stack in plan.stacks:
        card = stack.cards.card.id
        encoders[card] = encoders.get(card, 0) + stack.cards.count * stack.cards.encoders
        for way in stack.ways:
            key = card, way._replace(replicas=0, images_s=0.0)
            counted[key] = counted.get(key, 0) + stack.cards.count * way.replicas
    kinds = {stack.cards.card.id: stack.cards for stack in plan.stacks}
    pools = []
    for (card, way), replicas in counted.items():
        cards = kinds[card]
        even_gib = plan.even_gib(cards.card)
        num_gpus = fraction(even_gib or way.gib, cards.for_replicas_gib, down=even_gib is not None)
        gib = num_gpus * cards.for_replicas_gib
        pools.append(
            PlannedPool(
                way.model, way.recipe, card, replicas, way.slots, num_gpus, gib, even_gib is not None
            )
        )
    order = {want.model: i for i, want in enumerate(plan.wants)}
    pools.sort(key=lambda pool: order[pool.model or ""])
    for card, replicas in encoders.items():
        if replicas:
            total_gib = kinds[card].for_replicas_gib
            num_gpus = fraction(text_encoders_gib(), total_gib)
            pools.append(
                PlannedPool(None, "t5-quanto", card, replicas, 1, num_gpus, num_gpus * total_gib)
            )
    return pools


def fraction(gib: float, of_gib: float, *, down: bool = False) -> float:
    """In ten-thousandths, as Ray counts them; up, unless what it is rounded from has slack."""
    exact = FRACTIONS * gib / of_gib
    return (math.floor(exact) if down else math.ceil(exact)) / FRACTIONS
