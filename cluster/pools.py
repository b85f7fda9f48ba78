"""A packing plan in Ray's terms: pools with fractions of a GPU.

Ray adds up fractions and knows nothing of memory, and with its packing strategy it fills a card
before it takes the next. Fractions are rounded up to the ten-thousandths in which Ray counts, so
whatever Ray puts on a card fits into its memory. Where every card of a kind has the same number of
replicas and an equal part is enough for each, they all get that part: then no card can get more of
them than planned, and whichever Ray puts where, all find a place beside one text encoder. Otherwise
Ray may place them so that the last ones find none: `PlannedPool.even` says which it is.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from dataclasses import dataclass

from .packing import Plan
from .serving_options import FRACTIONS, ServingOption


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
    counted: dict[tuple[str, ServingOption], int] = {}
    for stack in plan.stacks:
        card = stack.cards.card.id
        for option in stack.options:
            key = card, option._replace(replicas=0, images_s=0.0)
            counted[key] = counted.get(key, 0) + stack.cards.count * option.replicas
    kinds = {stack.cards.card.id: stack.cards for stack in plan.stacks}
    pools = []
    for (card, option), replicas in counted.items():
        cards = kinds[card]
        parts = plan.even_parts(cards.card)
        num_gpus = (parts or option.parts) / FRACTIONS
        pools.append(
            PlannedPool(
                option.model,
                option.recipe,
                card,
                replicas,
                option.slots,
                num_gpus,
                num_gpus * cards.total_gib,
                even=parts is not None and plan.encoders(cards.card) <= 1,
            )
        )
    order = {planned.model: i for i, planned in enumerate(plan.planned_models)}
    pools.sort(key=lambda pool: order[pool.model or ""])
    for stack in plan.stacks:
        cards = stack.cards
        if cards.encoder_gib and all(pool.model for pool in pools):
            num_gpus = cards.parts(cards.encoder_gib) / FRACTIONS
            replicas, gib = plan.encoders(cards.card), num_gpus * cards.total_gib
            pools.append(PlannedPool(None, "", cards.card.id, replicas, 1, num_gpus, gib))
    return pools
