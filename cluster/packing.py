"""The packing plan: which models share a card, and in which way each is served there.

An *arrangement* has at most one way for each model (`cluster.ways`) and fits into the card. The
plan gives every card an arrangement such that the mean of the models' capacities (images/s if only
that model is asked for), geometric and weighted by their shares, is greatest. So a model that has
no place weighs more than any speed, and models share cards as far as their memory allows. Cards of
a kind are interchangeable: with few possibilities all are tried, else it climbs.

Memory that is left gives slots, which let images overtake each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import le

from serve.cost import EFFICIENCY

from .cards import CARDS, Card
from .footprint import footprint, text_encoders_gib
from .packing_search import Search
from .ways import Terms, Want, Way, all_ways, recipe_on, times, ways

ENCODER_FLOPS = 2.5e12  # of a prompt of 256 tokens: 2 × parameters × tokens
ENCODER_LOAD = 0.7  # how busy text encoders may be


USUAL = Terms()
FRACTIONS = 10_000  # Ray counts GPUs in ten-thousandths


class DoesNotFit(Exception):
    """No plan; the message says for each model why, and what would do."""


Arrangement = tuple[Way | None, ...]  # one for each model wanted


@dataclass(frozen=True, slots=True)
class Cards:
    """`count` equal cards; each keeps `reserved_gib` for others and has so many text encoders."""

    card: Card
    count: int
    reserved_gib: float = 0.0
    encoders: int = 0

    @property
    def for_replicas_gib(self) -> float:
        return self.card.memory_gib - self.reserved_gib

    @property
    def usable_gib(self) -> float:
        return self.for_replicas_gib - self.encoders * text_encoders_gib()


@dataclass(frozen=True, slots=True)
class Stack:
    """Equal cards with equal arrangements."""

    cards: Cards
    ways: tuple[Way, ...]


@dataclass(frozen=True)
class Plan:
    wants: tuple[Want, ...]
    stacks: tuple[Stack, ...]

    def even_part(self, card: Card) -> float | None:
        """The part of such a card that each replica gets if all get the same, and as many a card.

        None where that is not possible.
        """
        stacks = [stack for stack in self.stacks if stack.cards.card == card]
        replicas = {sum(way.replicas for way in stack.ways) for stack in stacks}
        if len(replicas) > 1 or not max(replicas):
            return None
        total_gib = stacks[0].cards.for_replicas_gib
        taken = fraction_of(text_encoders_gib(), total_gib) if self.encoders(card) else 0.0
        # Not the last ten-thousandth: Ray Serve adds up in floating point.
        part = math.floor((FRACTIONS * (1 - taken) - 1) / replicas.pop()) / FRACTIONS
        fit = all(way.gib <= part * total_gib for stack in stacks for way in stack.ways)
        return part if fit else None

    def encoders(self, card: Card) -> int:
        """Text encoder replicas on all such cards."""
        return sum(s.cards.count * s.cards.encoders for s in self.stacks if s.cards.card == card)

    @cached_property
    def images_s(self) -> dict[str, float]:
        """Of each model, if only that one is asked for."""
        return {
            want.model: sum(
                stack.cards.count * way.images_s
                for stack in self.stacks
                for way in stack.ways
                if way.model == want.model
            )
            for want in self.wants
        }

    @property
    def mean_images_s(self) -> float:
        """What the plan maximises: the geometric mean, weighted by share."""
        total = sum(want.share for want in self.wants)
        return math.exp(sum(w.share / total * math.log(self.images_s[w.model]) for w in self.wants))

    @property
    def mixed_images_s(self) -> float:
        """Of all models together, each asked for by its share."""
        return sum(w.share for w in self.wants) / sum(
            w.share / self.images_s[w.model] for w in self.wants
        )


def plan(
    groups: Sequence[Cards],
    wants: Sequence[Want],
    *,
    terms: Terms = USUAL,
    encoders_on_gpu: bool = True,
) -> Plan:
    """Where everything goes. Raises `DoesNotFit`.

    `terms.latency_s`: of an image while all slots are taken; by default `SLOWDOWN` × its own time
    on the card.
    """
    without = _placed(groups, wants, terms)
    if without is None:
        raise DoesNotFit(why_not(groups, wants, terms))
    if not encoders_on_gpu:
        return _with_more_slots(without, terms)
    plans = []
    for i, group in enumerate(groups):
        needed = encoders_needed(without.mixed_images_s, group.card)
        if needed <= group.count:
            home = replace(group, count=needed, encoders=1)
            rest = replace(group, count=group.count - needed)
            plans.append(_placed([*groups[:i], rest, home, *groups[i + 1 :]], wants, terms))
    if not any(plans):
        raise DoesNotFit(
            f"the text encoders need {text_encoders_gib():.1f} GiB, and there is no card left with "
            "that beside the models: add a card, or run them on CPUs (--encoders-on-cpu)"
        )
    best = max((p for p in plans if p), key=lambda p: p.mean_images_s)
    return _with_more_slots(best, terms)


def fraction_of(gib: float, total_gib: float) -> float:
    """Of a GPU, rounded up to what Ray counts in."""
    return math.ceil(FRACTIONS * gib / total_gib) / FRACTIONS


def encoders_needed(images_s: float, card: Card) -> int:
    """Text encoder replicas for so many prompts a second; estimated from arithmetic."""
    prompts_s = 1e12 * card.tflops * EFFICIENCY / ENCODER_FLOPS
    return math.ceil(images_s / (ENCODER_LOAD * prompts_s))


# -- the search -----------------------------------------------------------------------------------


def arrangements(choices: Sequence[Sequence[Way]], usable_gib: float) -> list[Arrangement]:
    """What fits on a card, without what another beats for every model; `choices`: by model."""
    kept: list[tuple[float, Arrangement]] = [(0.0, ())]
    for models_ways in choices:
        kept = [
            (gib + (way.total_gib if way else 0.0), (*before, way))
            for gib, before in kept
            for way in (None, *models_ways)
            if way is None or gib + way.total_gib <= usable_gib
        ]
    kept.sort(key=lambda each: (-sum(_rates(each[1])), each[0]))
    best: dict[Arrangement, tuple[float, ...]] = {}
    for _, arrangement in kept:
        rates = _rates(arrangement)
        if not any(all(map(le, rates, others)) for others in best.values()):
            best[arrangement] = rates
    return list(best)


def _rates(arrangement: Arrangement) -> tuple[float, ...]:
    return tuple(way.images_s if way else 0.0 for way in arrangement)


def _placed(groups: Sequence[Cards], wants: Sequence[Want], terms: Terms) -> Plan | None:
    """The best plan, or None if a model has no place in any."""
    options = [
        arrangements([ways(w, g.card, g.usable_gib, terms) for w in wants], g.usable_gib)
        for g in groups
    ]
    counts = Search(
        [g.count for g in groups],
        [[_rates(a) for a in arranged] for arranged in options],
        [want.share for want in wants],
    ).best()
    if counts is None:
        return None
    stacks = [
        Stack(replace(group, count=n), tuple(way for way in arrangement if way))
        for group, arranged, ns in zip(groups, options, counts, strict=True)
        for arrangement, n in zip(arranged, ns, strict=True)
        if n
    ]
    return Plan(tuple(wants), tuple(stacks))


def _with_more_slots(plan: Plan, terms: Terms) -> Plan:
    """What memory is left gives slots, in turns: they cost nothing."""
    stacks = []
    for stack in plan.stacks:
        chosen, grown = list(stack.ways), True
        part = plan.even_part(stack.cards.card)
        while grown:
            grown = False
            for i, way in enumerate(chosen):
                spare_gib = stack.cards.usable_gib - sum(w.total_gib for w in chosen)
                (want,) = [w for w in plan.wants if w.model == way.model]
                for more in all_ways(want, stack.cards.card, terms):
                    if (
                        (more.replicas, more.slots) == (way.replicas, way.slots + 1)
                        and more.total_gib - way.total_gib <= spare_gib
                        and (part is None or more.gib <= part * stack.cards.for_replicas_gib)
                    ):
                        chosen[i], grown = more, True
        stacks.append(replace(stack, ways=tuple(chosen)))
    return replace(plan, stacks=tuple(stacks))


# -- in words -------------------------------------------------------------------------------------


def why_not(groups: Sequence[Cards], wants: Sequence[Want], terms: Terms) -> str:
    """Of each model that fits nowhere why, and what would do; else that not all fit at once."""
    homeless = [w for w in wants if not any(ways(w, g.card, g.usable_gib, terms) for g in groups)]
    if homeless:
        return "\n".join(line for want in homeless for line in _reasons(want, groups, terms))
    least = ", ".join(
        f"{w.model} {min(_least_gib(w, g.card, terms) for g in groups):.1f} GiB" for w in wants
    )
    return f"each model fits alone, but not all of them at once ({least}): add a card"


def _reasons(want: Want, groups: Sequence[Cards], terms: Terms) -> Iterator[str]:
    for card, usable_gib in {group.card: group.usable_gib for group in groups}.items():
        recipe = recipe_on(card, adaln_8_bit=terms.adaln_8_bit)
        if (gib := _least_gib(want, card, terms)) > usable_gib:
            why = f"needs {gib:.1f} GiB in {recipe}, and there are {usable_gib:.1f}"
        else:
            alone_s = sum(times(want, recipe, card, 1))
            why = f"an image takes {alone_s:.1f} s in {recipe}, and {terms.latency_s:g} are allowed"
        yield f"{want.model} on {card.id}: {why}"
    would = []
    in_8_bit = replace(terms, adaln_8_bit=True)
    if any(ways(want, g.card, g.usable_gib, in_8_bit) for g in groups):
        would.append("AdaLN stored in 8 bit (--adaln-8-bit)")
    small = replace(
        want.shape, width_px=want.shape.width_px // 2, height_px=want.shape.height_px // 2
    )
    smaller = replace(want, shape=small, max_pixels=want.max_pixels // 4)
    if any(ways(smaller, g.card, g.usable_gib, terms) for g in groups):
        would.append(f"images of {small.width_px}x{small.height_px}")
    if enough := [c.id for c in CARDS.values() if ways(want, c, c.memory_gib, terms)]:
        would.append(f"another card: {', '.join(enough)}")
    yield f"{want.model}: what would do: " + ("; or ".join(would) or "no card that is known here")


def _least_gib(want: Want, card: Card, terms: Terms) -> float:
    """Of one replica with one slot."""
    recipe = recipe_on(card, adaln_8_bit=terms.adaln_8_bit)
    return footprint(want.structure, recipe, 1, want.max_pixels, want.shape.text_tokens).total
