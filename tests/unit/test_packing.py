"""The packing plan: it never overcommits, is near the best, and explains what does not fit."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cards import CARDS, Card
from cluster.cost import ImageShape
from cluster.footprint import footprint, text_encoders_gib
from cluster.packing import DoesNotFit, Plan, encoders_needed, plan
from cluster.packing_search import Search
from cluster.pools import planned_pools
from cluster.serving_options import (
    MAX_REPLICAS,
    MIN_SPEEDUP,
    CardGroup,
    PlannedModel,
    PlanTerms,
    all_options,
    times,
)
from cluster.structure import TRANSFORMERS, structure

STEPS_AND_ROWS = {
    "sd3.5-large": (40, 2),
    "sd3.5-large-turbo": (4, 1),
    "sd3.5-medium": (28, 2),
}


def planned(model: str, side: int = 1024, share: float = 1.0) -> PlannedModel:
    steps, rows = STEPS_AND_ROWS[model]
    return PlannedModel(
        model, structure(model), ImageShape(side, side, 333, rows, steps), side * side, share
    )


LARGE, TURBO, MEDIUM = map(planned, TRANSFORMERS)
ALL = [LARGE, TURBO, MEDIUM]
ENCODER_GIB = text_encoders_gib()

groups = st.lists(
    st.tuples(st.sampled_from(list(CARDS.values())), st.integers(1, 6)),
    min_size=1,
    max_size=3,
    unique_by=lambda pair: pair[0].id,
).map(lambda pairs: [CardGroup(card, count) for card, count in pairs])
planned_models = st.lists(
    st.builds(
        planned,
        st.sampled_from(list(TRANSFORMERS)),
        st.sampled_from([256, 512, 1024]),
        st.sampled_from([0.5, 1, 3]),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda w: w.model,
)
terms = st.builds(PlanTerms, st.sampled_from([None, 1.0, 20.0]), st.booleans())


def plan_if_it_fits(*args: Any, **kwargs: Any) -> Plan | None:
    try:
        return plan(*args, **kwargs)
    except DoesNotFit:
        return None


@settings(deadline=None, max_examples=150)
@given(groups, planned_models, terms, st.sampled_from([None, ENCODER_GIB]), st.floats(0, 20))
def test_nothing_is_overcommitted_wherever_ray_puts_it(
    groups: list[CardGroup],
    planned_models: list[PlannedModel],
    terms: PlanTerms,
    encoder_gib: float | None,
    reserved_gib: float,
) -> None:
    groups = [CardGroup(g.card, g.count, reserved_gib) for g in groups]
    found = plan_if_it_fits(groups, planned_models, terms=terms, encoder_gib=encoder_gib)
    if found is None:
        return
    pools = planned_pools(found)
    fractions = {(p.model, p.card, p.slots): p.num_gpus for p in pools}
    for group in groups:
        stacks = [s for s in found.packed_cards if s.cards.card == group.card]
        assert sum(s.cards.count for s in stacks) <= group.count
        for stack in stacks:
            used = sum(w.replicas * w.gib for w in stack.options) + stack.cards.encoder_gib
            assert used <= max(group.card.memory_gib - reserved_gib, 0) + 1e-9
            # Ray can place the planned replicas on the card.
            card = group.card.id
            taken = sum(w.replicas * fractions[w.model, card, w.slots] for w in stack.options)
            taken += fractions[None, card, 1] if stack.cards.encoder_gib else 0
            assert taken < 1
    for pool in pools:
        memory_gib = CARDS[pool.card].memory_gib
        # Ray puts replicas on a card as long as their fractions, in ten-thousandths, sum to one.
        assert pool.num_gpus == round(pool.num_gpus, 4)
        assert 0 < pool.num_gpus < 1
        assert pool.memory_gib <= pool.num_gpus * (memory_gib - reserved_gib) + 1e-9
        needed = [
            w.gib
            for s in found.packed_cards
            for w in s.options
            if (w.model, w.slots, s.cards.card.id) == (pool.model, pool.slots, pool.card)
        ]
        assert all(gib <= pool.memory_gib + 1e-9 for gib in needed or [ENCODER_GIB])
    assert {w.model for w in planned_models} == {pool.model for pool in pools if pool.model}


@settings(deadline=None, max_examples=60)
@given(groups, planned_models, st.integers(0, 2**32))
def test_even_pools_find_a_place_in_any_order(
    groups: list[CardGroup], planned_models: list[PlannedModel], seed: int
) -> None:
    found = plan_if_it_fits(groups, planned_models, encoder_gib=ENCODER_GIB)
    pools = planned_pools(found) if found else []
    if not all(pool.even for pool in pools):
        return
    rng = random.Random(seed)
    for group in groups:
        free = [1.0] * group.count  # Ray's packing subtracts in floating point
        asked = [p.num_gpus for p in pools for _ in range(p.replicas) if p.card == group.card.id]
        rng.shuffle(asked)
        for size in asked:
            roomy = [i for i, room in enumerate(free) if room >= size]
            assert roomy
            free[rng.choice(roomy)] -= size


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(["rtx4090", "h100", "t4", "l40s"]), min_size=1, max_size=2),
    st.lists(st.sampled_from([LARGE, TURBO, MEDIUM, planned("sd3.5-medium", 512)]), min_size=1,
             max_size=2, unique_by=lambda w: w.model),
)  # fmt: skip
def test_the_plan_is_the_best_of_all_possible_ones(
    names: list[str], planned_models: list[PlannedModel]
) -> None:
    """The plan is compared with every option of every model on every card."""
    cards = [CARDS[name] for name in names]
    per_card: list[set[tuple[float, ...]]] = []
    for card in cards:
        choices = [[None, *all_options(w, CardGroup(card, 1), PlanTerms())] for w in planned_models]
        per_card.append(
            {
                tuple(option.images_s if option else 0.0 for option in arrangement)
                for arrangement in product(*choices)
                if sum(option.replicas * option.gib for option in arrangement if option)
                <= card.memory_gib
            }
        )
    best = max(
        math.prod(sum(rates) for rates in zip(*picked, strict=True)) ** (1 / len(planned_models))
        for picked in product(*per_card)
    )
    groups = [CardGroup(CARDS[name], names.count(name)) for name in dict.fromkeys(names)]
    found = plan_if_it_fits(groups, planned_models)
    assert (found is None) is (best == 0)
    if found:
        assert best / MIN_SPEEDUP <= found.mean_images_s <= best * (1 + 1e-9)


def test_hill_climbing_comes_near_the_best_plan() -> None:
    rng = random.Random(7)
    for _ in range(60):
        models, kinds = rng.randint(1, 3), rng.randint(1, 2)
        rates = [
            [
                tuple(rng.choice([0, 0, rng.uniform(0.1, 5)]) for _ in range(models))
                for _ in range(rng.randint(1, 4))
            ]
            for _ in range(kinds)
        ]
        search = Search([rng.randint(1, 6) for _ in range(kinds)], rates, [1.0] * models)
        (lost, log_mean), (climbed_lost, climbed) = map(
            search.score, (search.all(), search.climb())
        )
        assert climbed_lost == lost
        assert climbed <= log_mean + models * math.log(1.02)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(CARDS.values())), st.integers(1, 4), planned_models, st.floats(0, 60))
def test_more_memory_never_makes_it_worse(
    card: Card, count: int, planned_models: list[PlannedModel], reserved_gib: float
) -> None:
    roomy = plan_if_it_fits([CardGroup(card, count)], planned_models)
    tight = plan_if_it_fits([CardGroup(card, count, reserved_gib)], planned_models)
    if tight:
        assert roomy is not None
        assert roomy.mean_images_s >= tight.mean_images_s / MIN_SPEEDUP


def test_a_thousand_nodes_of_all_kinds_within_a_second() -> None:
    groups = [CardGroup(card, 53) for card in CARDS.values()]
    began = time.process_time()
    found = plan(groups, ALL, encoder_gib=ENCODER_GIB)
    assert time.process_time() - began < 1
    assert sum(stack.cards.count for stack in found.packed_cards) > 900


@pytest.mark.parametrize("model", TRANSFORMERS)
@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_every_model_on_every_card_has_a_plan_or_a_reason(card: Card, model: str) -> None:
    if card.memory_gib > 15 or model == "sd3.5-medium":
        assert plan([CardGroup(card, 2)], [planned(model)]).images_s[model] > 0
    else:
        with pytest.raises(DoesNotFit, match=rf"on {card.id}: needs \d+\.\d GiB"):
            plan([CardGroup(card, 2)], [planned(model)])


def test_latency_targets_are_kept() -> None:
    found = plan([CardGroup(CARDS["h100"], 1)], [LARGE], terms=PlanTerms(latency_s=8.0))
    (option,) = found.packed_cards[0].options
    assert option.latency_s <= 8.0
    assert (option.replicas, option.slots) == (1, 2)  # four would take 15 s


def test_models_that_do_not_fit_are_explained_with_alternatives() -> None:
    with pytest.raises(DoesNotFit) as error:
        plan([CardGroup(CARDS["t4"], 4)], [LARGE])
    assert "sd3.5-large on t4: needs 20.4 GiB in fp16, and 14.6 GiB are free" in str(error.value)
    assert "another card: rtx3090, rtx4080, rtx5080, a10, l4" in str(error.value)

    with pytest.raises(DoesNotFit, match="not all of them at once"):
        plan([CardGroup(CARDS["rtx4090"], 1)], [LARGE, TURBO])

    with pytest.raises(DoesNotFit, match=r"text encoders need 7\.3 GiB"):
        plan([CardGroup(CARDS["t4"], 1)], [MEDIUM], encoder_gib=ENCODER_GIB)

    one_step = replace(TURBO, shape=ImageShape(64, 64, 333, 1, 1), max_pixels=64 * 64)
    with pytest.raises(DoesNotFit, match="to encode all prompts they need 4 × h100"):
        plan([CardGroup(CARDS["h100"], 1)], [one_step], encoder_gib=ENCODER_GIB)

    with pytest.raises(DoesNotFit, match="there are no cards"):
        plan([], [LARGE])


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("reserved_gib", [0.0, 12.0])
@pytest.mark.parametrize("latency_s", [None, 10.0])
def test_the_advice_of_an_error_leads_to_a_plan(
    name: str, reserved_gib: float, latency_s: float | None
) -> None:
    """Every change that the error suggests gives a plan."""
    asked, terms = [CardGroup(CARDS[name], 1, reserved_gib)], PlanTerms(latency_s)
    try:
        plan(asked, [planned("sd3.5-large", 1040)], terms=terms)
    except DoesNotFit as error:
        advice = str(error).splitlines()[-1]
    else:
        return
    if "--adaln-8-bit" in advice:
        plan(asked, [planned("sd3.5-large", 1040)], terms=PlanTerms(latency_s, adaln_8_bit=True))
    if "images of" in advice:
        assert "images of 512x512" in advice
        plan(asked, [planned("sd3.5-large", 512)], terms=terms)
    for other in advice.partition("another card: ")[2].split(", "):
        if other:
            plan(
                [CardGroup(CARDS[other], 1, reserved_gib)],
                [planned("sd3.5-large", 1040)],
                terms=terms,
            )


def test_a_kind_of_card_is_given_once() -> None:
    with pytest.raises(ValueError, match="once"):
        plan([CardGroup(CARDS["h100"], 1), CardGroup(CARDS["h100"], 1, 5.0)], [LARGE])


def test_spare_memory_gives_slots_and_equal_parts() -> None:
    found = plan([CardGroup(CARDS["h100"], 8)], [LARGE], encoder_gib=ENCODER_GIB)
    large, encoder = planned_pools(found)
    assert (large.replicas, large.slots, large.even) == (8, 4, True)
    assert 2 * large.num_gpus > 1  # so that Ray puts one replica on each card and never two
    assert large.num_gpus + encoder.num_gpus <= 1
    assert encoder.replicas == 1


def test_text_encoders_keep_up_with_the_images() -> None:
    assert encoders_needed(0.1, CARDS["t4"]) == 1
    assert encoders_needed(1000, CARDS["h100"]) == math.ceil(1000 / (0.7 * 400e12 / 2.5e12))
    found = plan([CardGroup(CARDS["h100"], 200)], [TURBO], encoder_gib=ENCODER_GIB)
    encoders = found.encoders(CARDS["h100"])
    assert encoders >= encoders_needed(0.9 * found.mixed_images_s, CARDS["h100"]) > 1


def test_weights_are_read_once_for_all_slots() -> None:
    """A step of few tokens takes as long as reading the weights, whatever the number of slots."""
    small = planned("sd3.5-large", 64)
    one, many = (times(small, "fp8", CARDS["l4"], slots)[0] for slots in (1, 4))
    assert one > 2 * many
    large_one, large_many = (times(LARGE, "fp8", CARDS["l4"], slots)[0] for slots in (1, 4))
    assert large_one == pytest.approx(large_many, rel=0.01)


def test_padded_rows_cost_time() -> None:
    three, four = (times(TURBO, "fp8", CARDS["l4"], slots)[0] for slots in (3, 4))
    assert three > 1.2 * four
    planned_for = [footprint(LARGE.structure, "fp8", slots, 1024**2).step for slots in (3, 4)]
    assert planned_for[0] == planned_for[1]


def test_no_option_reaches_the_bound_on_replicas() -> None:
    for card, model in product(CARDS.values(), ALL):
        options = all_options(model, CardGroup(card, 1), PlanTerms())
        assert all(option.replicas < MAX_REPLICAS for option in options)
