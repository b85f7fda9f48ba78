"""The nodes on which pools may run; `tests/faults` checks the same with Ray itself."""

from collections.abc import Mapping
from typing import Literal

import pytest
from ray.util.accelerators import accelerators

from cluster.cards import CAPABILITIES, CARDS
from cluster.placement import Node, NodeRequirement, fits, selectors, unknown_cards


def node(
    card: str | None = None,
    label: str | None = None,
    gpus: float = 1,
    octet_card: str | None = None,
) -> Node:
    labels = {
        "ray.io/accelerator-type": card,
        "octet/precision": label,
        "octet/card": octet_card,
    }
    return Node("n", {k: v for k, v in labels.items() if v}, num_cpus=4, num_gpus=gpus)


@pytest.mark.parametrize(
    ("where", "fp8"),
    [
        (node("H100"), True),
        (node("L4"), True),
        (node("GeForce-RTX-4090"), True),
        (node("A100"), False),
        (node("GeForce-RTX-3090"), False),
        (node("T4"), False),
        (node("Unheard-Of"), False),
        (node(), False),
        (node("A100", "fp8"), True),  # the label counts, not the card
        (node("H100", "fp16"), False),
        (node("H100", "fp9"), True),  # an unknown label says nothing
    ],
)
def test_fp8_follows_the_label_or_else_the_card(where: Node, fp8: bool) -> None:
    assert where.has_fp8() is fp8
    assert fits(NodeRequirement("fp8", 1, 0.5), where) is fp8
    assert fits(NodeRequirement("fp16", 1, 0.5), where)
    assert fits(NodeRequirement("fp16", 1, 0.5, allow_fp8_nodes=False), where) is not fp8


def test_a_node_must_have_the_resources_of_a_replica() -> None:
    assert not fits(NodeRequirement("fp8", 1, 1.5), node("H100"))
    assert not fits(NodeRequirement("fp8", 5, 0.5), node("H100"))
    assert not fits(NodeRequirement("fp16", 1, 0.1), node(gpus=0))


def test_pools_without_gpu_run_anywhere() -> None:
    assert fits(NodeRequirement("fp8", 1, 0), node(gpus=0))
    assert selectors(NodeRequirement("fp8", 1, 0)) == []


def test_16_bit_prefers_nodes_without_fp8() -> None:
    strict, free = (
        NodeRequirement("fp16", 1, 1, allow_fp8_nodes=False),
        NodeRequirement("fp16", 1, 1),
    )
    assert selectors(free)[: len(selectors(strict))] == selectors(strict)
    assert selectors(free)[len(selectors(strict)) :] == selectors(NodeRequirement("fp8", 1, 1))


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Match labels like Ray; a missing label satisfies every value that begins with "!"."""
    for key, wanted in selector.items():
        negated, wanted = wanted.startswith("!"), wanted.removeprefix("!")
        values = wanted[3:-1].split(",") if wanted.startswith("in(") else [wanted]
        if (labels.get(key) in values) is negated:
            return False
    return True


@pytest.mark.parametrize("precision", ["fp8", "fp16"])
@pytest.mark.parametrize("allow", [True, False])
@pytest.mark.parametrize("bound", [None, "h100", "a100-40", "a100-80", "t4"])
def test_selectors_and_fits_say_the_same(
    precision: Literal["fp8", "fp16"], allow: bool, bound: str | None
) -> None:
    need = NodeRequirement(precision, 1, 0.5, allow, bound)
    for card in ("H100", "A100", "A100-80G", "T4", "Odd", None):
        for label in ("fp8", "fp16", "odd", None):
            for octet_card in (None, "a100-80", "h100", "odd"):
                where = node(card, label, octet_card=octet_card)
                by_ray = any(matches(s, where.labels) for s in selectors(need))
                assert by_ray is fits(need, where), where.labels


def test_a_pool_bound_to_a_card_runs_there_alone() -> None:
    need = NodeRequirement("fp16", 1, 0.5, card="a100-80")
    assert fits(need, node("A100", octet_card="a100-80"))
    assert fits(need, node("A100-80G"))
    assert not fits(need, node("A100"))  # Ray's A100 may have 40 GiB
    assert not fits(need, node("H100"))
    assert node("A100", octet_card="a100-80").card is CARDS["a100-80"]


def test_unknown_cards_get_advice_and_known_ones_do_not() -> None:
    quiet = [node("H100"), node("A100"), node("Odd", "fp8"), node(gpus=0)]
    assert unknown_cards(quiet) == {}
    (warning,) = unknown_cards([node("Odd")]).values()
    assert "Odd" in warning
    assert "no FP8" in warning
    assert "octet/precision=fp8" in warning
    (warning,) = unknown_cards([node("H100", "FP8")]).values()
    assert "octet/precision=FP8" in warning


def test_every_nvidia_card_that_ray_names_is_in_the_table() -> None:
    named = {v for k, v in vars(accelerators).items() if k.startswith("NVIDIA_")}
    assert named - CAPABILITIES.keys() <= {"K80"}  # too old for torch
