"""The packing plan: which models share a card, and how each of them is served there.

An *arrangement* is a choice of at most one serving option for each model
(`cluster.serving_options`) that fits into one card. A model's *capacity* is the images/s that all
cards generate if only this model is requested. The plan gives every card an arrangement. The goal
is the greatest geometric mean of the capacities, weighted by the models' shares. A model without a
place would make the mean 0, so models share cards as far as memory allows. Cards of a kind are
interchangeable. If there are few possibilities all are tried, otherwise hill climbing searches them
(`cluster.packing_search`).

Memory that is left over is used for more slots, which let images overtake each other. Memory is
counted in ten-thousandths of a card, because Ray counts GPUs in ten-thousandths. So Ray can place
what is planned.

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

ENCODER_FLOPS = 2.5e12  # for a prompt of 256 tokens: 2 × parameters × tokens
ENCODER_LOAD = 0.7  # the fraction of time for which text encoders may be busy


USUAL = PlanTerms()


class DoesNotFit(Exception):
    """No plan is possible; the message says why for each model, and what would make it possible."""


Arrangement = tuple[ServingOption | None, ...]  # by model; None: the model is not on this card


@dataclass(frozen=True, slots=True)
class PackedCards:
    """Equal cards with the same arrangement; `options`: how each card serves its models."""

    cards: CardGroup
    options: tuple[ServingOption, ...]


@dataclass(frozen=True)
class Plan:
    """A plan: the models and text encoders that every card runs.

    `packed_cards`: all cards, grouped by kind, arrangement and whether a text encoder runs there.
    """

    planned_models: tuple[PlannedModel, ...]
    packed_cards: tuple[PackedCards, ...]

    def even_parts(self, card: Card) -> int | None:
        """The equal part, in ten-thousandths, that each replica on this kind of card can have.

        None if the cards hold different numbers of replicas or none, or if the equal part is too
        small for one of the replicas.
        """
        same_kind = [packed for packed in self.packed_cards if packed.cards.card == card]
        replicas = {sum(option.replicas for option in packed.options) for packed in same_kind}
        if len(replicas) > 1 or not max(replicas):
            return None
        parts = min(packed.cards.free_parts for packed in same_kind) // replicas.pop()
        fit = all(option.parts <= parts for packed in same_kind for option in packed.options)
        return parts if fit else None

    def encoders(self, card: Card) -> int:
        """The number of text encoder replicas on all cards of a kind."""
        return sum(
            packed.cards.count
            for packed in self.packed_cards
            if packed.cards.card == card and packed.cards.encoder_gib
        )

    @cached_property
    def images_s(self) -> dict[str, float]:
        """The capacity of each model: images/s of all cards if only this model is requested."""
        return {
            planned.model: sum(
                packed.cards.count * option.images_s
                for packed in self.packed_cards
                for option in packed.options
                if option.model == planned.model
            )
            for planned in self.planned_models
        }

    @property
    def mean_images_s(self) -> float:
        """The geometric mean of the capacities, weighted by share, which the plan maximises."""
        total = sum(planned.share for planned in self.planned_models)
        return math.exp(
            sum(m.share / total * math.log(self.images_s[m.model]) for m in self.planned_models)
        )

    @property
    def mixed_images_s(self) -> float:
        """Images/s of all models together if each is requested by its share."""
        return sum(m.share for m in self.planned_models) / sum(
            m.share / self.images_s[m.model] for m in self.planned_models
        )


def plan(
    groups: Sequence[CardGroup],
    planned_models: Sequence[PlannedModel],
    *,
    terms: PlanTerms = USUAL,
    encoder_gib: float | None = None,
) -> Plan:
    """Plan which models run on which cards, and where the text encoders run.

    `groups`: the cards, by kind. `encoder_gib`: the memory of a card that a text encoder replica
    takes; None: text encoders run on CPUs. All text encoders run on cards of one kind: the kind
    that leaves the models the highest mean capacity. Raises `DoesNotFit` if there is no plan, and
    `ValueError` if a kind of card is given twice.
    """
    if len({group.card.id for group in groups}) < len(groups):
        given = ", ".join(group.card.id for group in groups)
        raise ValueError(f"cards {given}: give each kind of card once")
    models_alone = _placed(groups, planned_models, terms)
    if models_alone is None:
        raise DoesNotFit(why_not(groups, planned_models, terms))
    if encoder_gib is None:
        return _with_more_slots(models_alone, terms)
    plans, too_few = [], []
    for i, group in enumerate(groups):
        needed = encoders_needed(models_alone.mixed_images_s, group.card)
        with_encoder = replace(group, count=needed, encoder_gib=encoder_gib)
        if needed > group.count:
            too_few.append(f"{needed} × {group.card.id}")
        elif with_encoder.free_parts >= 0:
            without = replace(group, count=group.count - needed)
            split = [*groups[:i], without, with_encoder, *groups[i + 1 :]]
            plans.append(_placed(split, planned_models, terms))
    if not any(plans):
        raise DoesNotFit(
            f"text encoders need {encoder_gib:.1f} GiB of a card, and no card has that left next "
            "to the models"
            + (f"; to encode all prompts they need {' or '.join(too_few)}" if too_few else "")
            + ": add a card, or run them on CPUs (--encoders-on-cpu)"
        )
    best = max((p for p in plans if p), key=lambda p: p.mean_images_s)
    return _with_more_slots(best, terms)


def encoders_needed(images_s: float, card: Card) -> int:
    """Estimate, from arithmetic, the text encoder replicas that a rate of images needs.

    Every image has one prompt to encode.
    """
    prompts_s = 1e12 * card.tflops * EFFICIENCY / ENCODER_FLOPS
    return math.ceil(images_s / (ENCODER_LOAD * prompts_s))


# -- the search -----------------------------------------------------------------------------------


def arrangements(choices: Sequence[Sequence[ServingOption]], free_parts: int) -> list[Arrangement]:
    """The arrangements that fit into `free_parts` of a card; `choices`: the options of each model.

    An arrangement is left out if another one gives every model at least as many images/s.
    """
    fitting: list[tuple[int, Arrangement]] = [(0, ())]
    for options in choices:
        fitting = [
            (parts + (option.total_parts if option else 0), (*before, option))
            for parts, before in fitting
            for option in (None, *options)
            if option is None or parts + option.total_parts <= free_parts
        ]
    fitting.sort(key=lambda each: (-sum(_rates(each[1])), each[0]))
    best: dict[Arrangement, tuple[float, ...]] = {}
    for _, arrangement in fitting:
        rates = _rates(arrangement)
        if not any(all(map(le, rates, others)) for others in best.values()):
            best[arrangement] = rates
    return list(best)


def _rates(arrangement: Arrangement) -> tuple[float, ...]:
    """Images/s of each model on a card with this arrangement."""
    return tuple(option.images_s if option else 0.0 for option in arrangement)


def _placed(
    groups: Sequence[CardGroup], planned_models: Sequence[PlannedModel], terms: PlanTerms
) -> Plan | None:
    """The best plan for the models without text encoders; None if they do not all have room."""
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
    packed_cards = [
        PackedCards(replace(group, count=n), tuple(option for option in arrangement if option))
        for group, arranged, ns in zip(groups, arranged_groups, counts, strict=True)
        for arrangement, n in zip(arranged, ns, strict=True)
        if n
    ]
    return Plan(tuple(planned_models), tuple(packed_cards))


def _with_more_slots(plan: Plan, terms: PlanTerms) -> Plan:
    """Use memory that is left over for more slots, as far as the latency target allows.

    The models of a card take turns: each doubles its slots while that fits.
    """
    grown_cards = []
    for packed in plan.packed_cards:
        chosen, grown = list(packed.options), True
        most_parts = plan.even_parts(packed.cards.card) or FRACTIONS
        while grown:
            grown = False
            for i, option in enumerate(chosen):
                spare = packed.cards.free_parts - sum(each.total_parts for each in chosen)
                (planned,) = [m for m in plan.planned_models if m.model == option.model]
                for more in all_options(planned, packed.cards, terms):
                    if (
                        (more.replicas, more.slots) == (option.replicas, 2 * option.slots)
                        and more.total_parts - option.total_parts <= spare
                        and more.parts <= most_parts
                    ):
                        chosen[i], grown = more, True
        grown_cards.append(replace(packed, options=tuple(chosen)))
    return replace(plan, packed_cards=tuple(grown_cards))


# -- reasons in words --------------------------------------------------------------------------


def why_not(
    groups: Sequence[CardGroup], planned_models: Sequence[PlannedModel], terms: PlanTerms
) -> str:
    """Explain why no plan exists.

    The text says for each model that fits on no card why it does not fit, and what would make it
    possible. If every model fits alone, the text says that not all of them fit at once.
    """
    if not groups:
        return "there are no cards"
    unplaced = [
        m for m in planned_models if not any(fitting_options(m, group, terms) for group in groups)
    ]
    if unplaced:
        return "\n".join(line for planned in unplaced for line in _reasons(planned, groups, terms))
    least = ", ".join(
        f"{m.model} {min(_least_gib(m, g.card, terms) for g in groups):.1f} GiB"
        for m in planned_models
    )
    return f"each model fits alone, but not all of them at once ({least}): add a card"


def _reasons(planned: PlannedModel, groups: Sequence[CardGroup], terms: PlanTerms) -> Iterator[str]:
    """Lines that say why a model fits on none of the cards, and what would make it possible."""
    for group in groups:
        card = group.card
        recipe = recipe_on(card, adaln_8_bit=terms.adaln_8_bit)
        if (gib := _least_gib(planned, card, terms)) > group.free_gib:
            why = f"needs {gib:.1f} GiB in {recipe}, and {group.free_gib:.1f} GiB are free"
        else:
            alone_s = sum(times(planned, recipe, card, 1))
            allowed = f"{terms.latency_s:g} s are allowed"
            why = f"an image takes {alone_s:.1f} s in {recipe}, and {allowed}"
        yield f"{planned.model} on {card.id}: {why}"
    remedies = []
    in_8_bit = replace(terms, adaln_8_bit=True)
    if any(fitting_options(planned, group, in_8_bit) for group in groups):
        remedies.append("AdaLN stored in 8 bit (--adaln-8-bit)")
    width_px, height_px = (
        side // 32 * 16 for side in (planned.shape.width_px, planned.shape.height_px)
    )
    small = replace(planned.shape, width_px=width_px, height_px=height_px)
    smaller = replace(planned, shape=small, max_pixels=planned.max_pixels // 4)
    if small.pixels and any(fitting_options(smaller, group, terms) for group in groups):
        remedies.append(f"images of {small.width_px}x{small.height_px}")
    reserved_gib = max(group.reserved_gib for group in groups)
    others = [CardGroup(card, 1, reserved_gib) for card in CARDS.values()]
    if enough := [cards.card.id for cards in others if fitting_options(planned, cards, terms)]:
        remedies.append(f"another card: {', '.join(enough)}")
    yield f"{planned.model}: possible with: " + (
        "; or ".join(remedies) or "no card that Octet knows"
    )


def _least_gib(planned: PlannedModel, card: Card, terms: PlanTerms) -> float:
    """GiB of one replica with one slot."""
    recipe = recipe_on(card, adaln_8_bit=terms.adaln_8_bit)
    return footprint(
        planned.structure, recipe, 1, planned.max_pixels, planned.shape.text_tokens
    ).total
