"""The packing plan: which models share a card, and in which way each is served there.

An *arrangement* has at most one way for each model (`cluster.serving_options`) and fits into the card. The
plan gives every card an arrangement such that the mean of the models' capacities (images/s if only
that model is asked for), geometric and weighted by their shares, is greatest. So a model that has
no place weighs more than any speed, and models share cards as far as their memory allows. Cards of
a kind are interchangeable: with few possibilities all are tried, else it climbs.

Memory that is left gives slots, which let images overtake each other. Memory is counted in
ten-thousandths of a card, as Ray counts GPUs: what is planned is what Ray can place.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import le

from .cards import CARDS, Card
from .cost import EFFICIENCY
from .footprint import footprint
from .packing_search import Search
from .serving_options import (
    FRACTIONS,
    CardGroup,
    PlannedModel,
    PlanTerms,
    ServingOption,
    all_options,
    fitting_options,
    recipe_on,
    times,
)

ENCODER_FLOPS = 2.5e12  # of a prompt of 256 tokens: 2 × parameters × tokens
ENCODER_LOAD = 0.7  # how busy text encoders may be


USUAL = PlanTerms()


class DoesNotFit(Exception):
    """No plan; the message says for each model why, and what would do."""


Arrangement = tuple[ServingOption | None, ...]  # one for each model wanted


@dataclass(frozen=True, slots=True)
class PackedCards:
    """Equal cards with equal arrangements."""

    cards: CardGroup
    options: tuple[ServingOption, ...]


@dataclass(frozen=True)
class Plan:
    planned_models: tuple[PlannedModel, ...]
    stacks: tuple[PackedCards, ...]

    def even_parts(self, card: Card) -> int | None:
        """What each replica on such cards gets if all get the same, and as many on every card.

        None where that is not possible.
        """
        stacks = [stack for stack in self.stacks if stack.cards.card == card]
        replicas = {sum(option.replicas for option in stack.options) for stack in stacks}
        if len(replicas) > 1 or not max(replicas):
            return None
        parts = min(stack.cards.free_parts for stack in stacks) // replicas.pop()
        fit = all(option.parts <= parts for stack in stacks for option in stack.options)
        return parts if fit else None

    def encoders(self, card: Card) -> int:
        """Text encoder replicas on all such cards."""
        return sum(
            stack.cards.count
            for stack in self.stacks
            if stack.cards.card == card and stack.cards.encoder_gib
        )

    @cached_property
    def images_s(self) -> dict[str, float]:
        """Of each model, if only that one is asked for."""
        return {
            planned.model: sum(
                stack.cards.count * option.images_s
                for stack in self.stacks
                for option in stack.options
                if option.model == planned.model
            )
            for planned in self.planned_models
        }

    @property
    def mean_images_s(self) -> float:
        """What the plan maximises: the geometric mean, weighted by share."""
        total = sum(planned.share for planned in self.planned_models)
        return math.exp(
            sum(w.share / total * math.log(self.images_s[w.model]) for w in self.planned_models)
        )

    @property
    def mixed_images_s(self) -> float:
        """Of all models together, each asked for by its share."""
        return sum(w.share for w in self.planned_models) / sum(
            w.share / self.images_s[w.model] for w in self.planned_models
        )


def plan(
    groups: Sequence[CardGroup],
    planned_models: Sequence[PlannedModel],
    *,
    terms: PlanTerms = USUAL,
    encoder_gib: float | None = None,
) -> Plan:
    """Where everything goes. Raises `DoesNotFit`; `ValueError` for a kind of card given twice.

    `encoder_gib`: of a text encoder replica that takes a card's memory; None: they run on CPUs.
    """
    if len({group.card.id for group in groups}) < len(groups):
        raise ValueError("each kind of card once")
    without = _placed(groups, planned_models, terms)
    if without is None:
        raise DoesNotFit(why_not(groups, planned_models, terms))
    if encoder_gib is None:
        return _with_more_slots(without, terms)
    plans, too_few = [], []
    for i, group in enumerate(groups):
        needed = encoders_needed(without.mixed_images_s, group.card)
        home = replace(group, count=needed, encoder_gib=encoder_gib)
        if needed > group.count:
            too_few.append(f"{needed} × {group.card.id}")
        elif home.free_parts >= 0:
            rest = replace(group, count=group.count - needed)
            plans.append(
                _placed([*groups[:i], rest, home, *groups[i + 1 :]], planned_models, terms)
            )
    if not any(plans):
        raise DoesNotFit(
            f"text encoders need {encoder_gib:.1f} GiB of a card, and no card has that left beside "
            "the models"
            + (f"; for so many prompts they need {' or '.join(too_few)}" if too_few else "")
            + ": add a card, or run them on CPUs (--encoders-on-cpu)"
        )
    best = max((p for p in plans if p), key=lambda p: p.mean_images_s)
    return _with_more_slots(best, terms)


def encoders_needed(images_s: float, card: Card) -> int:
    """Text encoder replicas for so many prompts a second; estimated from arithmetic."""
    prompts_s = 1e12 * card.tflops * EFFICIENCY / ENCODER_FLOPS
    return math.ceil(images_s / (ENCODER_LOAD * prompts_s))


# -- the search -----------------------------------------------------------------------------------


def arrangements(choices: Sequence[Sequence[ServingOption]], free_parts: int) -> list[Arrangement]:
    """What fits on a card, without what another beats for every model; `choices`: by model."""
    kept: list[tuple[int, Arrangement]] = [(0, ())]
    for models_ways in choices:
        kept = [
            (parts + (option.total_parts if option else 0), (*before, option))
            for parts, before in kept
            for option in (None, *models_ways)
            if option is None or parts + option.total_parts <= free_parts
        ]
    kept.sort(key=lambda each: (-sum(_rates(each[1])), each[0]))
    best: dict[Arrangement, tuple[float, ...]] = {}
    for _, arrangement in kept:
        rates = _rates(arrangement)
        if not any(all(map(le, rates, others)) for others in best.values()):
            best[arrangement] = rates
    return list(best)


def _rates(arrangement: Arrangement) -> tuple[float, ...]:
    return tuple(option.images_s if option else 0.0 for option in arrangement)


def _placed(
    groups: Sequence[CardGroup], planned_models: Sequence[PlannedModel], terms: PlanTerms
) -> Plan | None:
    """The best plan, or None if a model has no place in any."""
    arranged_groups = [
        arrangements(
            [fitting_options(planned, group, terms) for planned in planned_models], group.free_parts
        )
        for group in groups
    ]
    counts = Search(
        [g.count for g in groups],
        [[_rates(a) for a in arranged] for arranged in arranged_groups],
        [planned.share for planned in planned_models],
    ).best()
    if counts is None:
        return None
    stacks = [
        PackedCards(replace(group, count=n), tuple(option for option in arrangement if option))
        for group, arranged, ns in zip(groups, arranged_groups, counts, strict=True)
        for arrangement, n in zip(arranged, ns, strict=True)
        if n
    ]
    return Plan(tuple(planned_models), tuple(stacks))


def _with_more_slots(plan: Plan, terms: PlanTerms) -> Plan:
    """What memory is left gives slots, in turns, as far as the latency target allows."""
    stacks = []
    for stack in plan.stacks:
        chosen, grown = list(stack.options), True
        most_parts = plan.even_parts(stack.cards.card) or FRACTIONS
        while grown:
            grown = False
            for i, option in enumerate(chosen):
                spare = stack.cards.free_parts - sum(w.total_parts for w in chosen)
                (planned,) = [w for w in plan.planned_models if w.model == option.model]
                for more in all_options(planned, stack.cards, terms):
                    if (
                        (more.replicas, more.slots) == (option.replicas, 2 * option.slots)
                        and more.total_parts - option.total_parts <= spare
                        and more.parts <= most_parts
                    ):
                        chosen[i], grown = more, True
        stacks.append(replace(stack, options=tuple(chosen)))
    return replace(plan, stacks=tuple(stacks))


# -- in words -------------------------------------------------------------------------------------


def why_not(
    groups: Sequence[CardGroup], planned_models: Sequence[PlannedModel], terms: PlanTerms
) -> str:
    """Of each model that fits nowhere why, and what would do; else that not all fit at once."""
    if not groups:
        return "there are no cards"
    homeless = [
        w for w in planned_models if not any(fitting_options(w, group, terms) for group in groups)
    ]
    if homeless:
        return "\n".join(line for planned in homeless for line in _reasons(planned, groups, terms))
    least = ", ".join(
        f"{w.model} {min(_least_gib(w, g.card, terms) for g in groups):.1f} GiB"
        for w in planned_models
    )
    return f"each model fits alone, but not all of them at once ({least}): add a card"


def _reasons(planned: PlannedModel, groups: Sequence[CardGroup], terms: PlanTerms) -> Iterator[str]:
    for group in groups:
        card = group.card
        recipe = recipe_on(card, adaln_8_bit=terms.adaln_8_bit)
        if (gib := _least_gib(planned, card, terms)) > group.free_gib:
            why = f"needs {gib:.1f} GiB in {recipe}, and there are {group.free_gib:.1f}"
        else:
            alone_s = sum(times(planned, recipe, card, 1))
            why = f"an image takes {alone_s:.1f} s in {recipe}, and {terms.latency_s:g} are allowed"
        yield f"{planned.model} on {card.id}: {why}"
    would = []
    in_8_bit = replace(terms, adaln_8_bit=True)
    if any(fitting_options(planned, group, in_8_bit) for group in groups):
        would.append("AdaLN stored in 8 bit (--adaln-8-bit)")
    width_px, height_px = (
        side // 32 * 16 for side in (planned.shape.width_px, planned.shape.height_px)
    )
    small = replace(planned.shape, width_px=width_px, height_px=height_px)
    smaller = replace(planned, shape=small, max_pixels=planned.max_pixels // 4)
    if small.pixels and any(fitting_options(smaller, group, terms) for group in groups):
        would.append(f"images of {small.width_px}x{small.height_px}")
    reserved_gib = max(group.reserved_gib for group in groups)
    others = [CardGroup(card, 1, reserved_gib) for card in CARDS.values()]
    if enough := [cards.card.id for cards in others if fitting_options(planned, cards, terms)]:
        would.append(f"another card: {', '.join(enough)}")
    yield f"{planned.model}: what would do: " + (
        "; or ".join(would) or "no card that is known here"
    )


def _least_gib(planned: PlannedModel, card: Card, terms: PlanTerms) -> float:
    """Of one replica with one slot."""
    recipe = recipe_on(card, adaln_8_bit=terms.adaln_8_bit)
    return footprint(
        planned.structure, recipe, 1, planned.max_pixels, planned.shape.text_tokens
    ).total
