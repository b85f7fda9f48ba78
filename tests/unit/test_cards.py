"""The table of card facts: consistent, and found by each of a card's names."""

import pytest

from cluster.cards import (
    CAPABILITIES,
    CARDS,
    FP8_SINCE,
    OTHER_CAPABILITIES,
    Card,
    card_of,
    card_of_device,
    cards_named,
)


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_facts_are_plausible(card: Card) -> None:
    assert (card.fp8_tflops is not None) is (card.compute_capability >= FP8_SINCE)
    assert card.fp8_tflops is None or card.fp8_tflops == pytest.approx(2 * card.tflops, rel=0.02)
    if card.spot_usd_h is not None:
        assert card.on_demand_usd_h is not None
        assert card.spot_usd_h < card.on_demand_usd_h
    assert 7 < card.memory_gib < 180
    assert not set(card.ray_names) & OTHER_CAPABILITIES.keys()
    assert all(card_of(name) is card for name in card.ray_names)


@pytest.mark.parametrize(
    ("name", "memory_gib", "found"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "h100"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100-80"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a100-40"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090"),
        ("NVIDIA L40S", 44.4, "l40s"),
        ("NVIDIA L4", 22.1, "l4"),
        ("Tesla T4", 14.6, "t4"),
        ("NVIDIA GeForce RTX 2080 Ti", 10.8, "rtx2080ti"),
        ("NVIDIA GeForce RTX 4060", 7.75, "rtx4060"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", 7.75, "rtx4060-laptop"),
        ("NVIDIA GeForce RTX 4060 Ti", 7.75, None),  # other cards with as much memory
        ("NVIDIA GeForce RTX 4070 SUPER", 11.7, None),
        ("NVIDIA GeForce RTX 4080 SUPER", 15.7, None),
        ("NVIDIA GeForce RTX 5090 D", 31.4, None),
        ("NVIDIA A10G", 22.1, None),  # not an A10
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.6, None),
        ("NVIDIA H100 NVL", 93.1, None),
        ("NVIDIA GB200", 184.0, None),
        ("cpu", 24.0, None),
    ],
)
def test_the_drivers_name_finds_the_card(name: str, memory_gib: float, found: str | None) -> None:
    card = card_of_device(name, memory_gib)
    assert (card and card.id) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("H100", ["h100"]),
        ("NVIDIA H100 80GB HBM3", ["h100"]),
        ("a100-80gb", ["a100-80"]),
        ("NVIDIA A100-SXM4-40GB", ["a100-40"]),
        ("A100", ["a100-40", "a100-80"]),
        ("4090", ["rtx4090"]),
        ("NVIDIA GeForce RTX 4090", ["rtx4090"]),
        ("Tesla T4", ["t4"]),
        ("NVIDIA L4", ["l4"]),
        ("l40s", ["l40s"]),
        ("h1000", []),
        ("", []),
    ],
)
def test_cards_are_found_as_people_name_them(text: str, found: list[str]) -> None:
    assert [card.id for card in cards_named(text)] == found


def test_every_card_is_found_by_its_id() -> None:
    assert all(cards_named(id) == [card] for id, card in CARDS.items())


def test_rays_ambiguous_a100_counts_as_the_smaller_one() -> None:
    card = card_of("A100")
    assert card is not None
    assert card.memory_gib < 40
    assert CAPABILITIES["A100"] == (8, 0)
