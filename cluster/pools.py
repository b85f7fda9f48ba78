"""A packing plan in Ray's terms: pools whose replicas take fractions of a GPU.

Ray adds up the fractions on a card and knows nothing of memory. With its packing strategy Ray fills
one card before it takes the next. Fractions are rounded up to the ten-thousandths in which Ray
counts, so whatever Ray puts on a card fits into the card's memory.

If every card of a kind holds the same number of replicas, and an equal part of the card is enough
for each of them, all get this equal part. Then Ray cannot put more replicas on a card than planned,
and in every order of placement all replicas find a place next to one text encoder. Otherwise Ray
may place replicas in such a way that the last ones find no place. `PlannedPool.even` says which of
the two cases holds.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from dataclasses import dataclass

from .packing import Plan
from .serving_options import FRACTIONS, ServingOption


@dataclass(frozen=True, slots=True)
class PlannedPool:
    """Equal replicas on cards of one kind.

    `model` is None for text encoders. Each replica takes the fraction `num_gpus` of a card and is
    promised `memory_gib` of its memory. `even`: whether all replicas find a place in every order in
    which Ray may place them.
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
    """The pools of a plan: those of the models, then those of the text encoders."""
    counted: dict[tuple[str, ServingOption], int] = {}
    for packed in plan.packed_cards:
        card = packed.cards.card.id
        for option in packed.options:
            key = card, option._replace(replicas=0, images_s=0.0)
            counted[key] = counted.get(key, 0) + packed.cards.count * option.replicas
    kinds = {packed.cards.card.id: packed.cards for packed in plan.packed_cards}
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
    for packed in plan.packed_cards:
        cards = packed.cards
        if cards.encoder_gib and all(pool.model for pool in pools):
            num_gpus = cards.parts(cards.encoder_gib) / FRACTIONS
            replicas, gib = plan.encoders(cards.card), num_gpus * cards.total_gib
            pools.append(PlannedPool(None, "", cards.card.id, replicas, 1, num_gpus, gib))
    return pools
