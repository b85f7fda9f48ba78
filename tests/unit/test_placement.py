"""Where pools may run; `tests/faults` holds Ray itself to the same."""

import pytest
from ray.util.accelerators import accelerators

from cluster.placement import (
    COMPUTE_CAPABILITY,
    Need,
    Node,
    fits,
    selectors,
    unknown_cards,
)


def node(card: str | None = None, label: str | None = None, gpus: float = 1) -> Node:
    labels = {"ray.io/accelerator-type": card, "octet/precision": label}
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
        (node("A100", "fp8"), True),  # the label wins
        (node("H100", "fp16"), False),
        (node("H100", "fp9"), True),  # which says nothing
    ],
)
def test_fp8_is_where_label_or_card_say(where: Node, fp8: bool) -> None:
    assert where.has_fp8 is fp8
    assert fits(Need("fp8", 1, 0.5), where) is fp8
    assert fits(Need("fp16", 1, 0.5), where)
    assert fits(Need("fp16", 1, 0.5, allow_fp8_nodes=False), where) is not fp8


def test_totals_must_suffice() -> None:
    assert not fits(Need("fp8", 1, 1.5), node("H100"))
    assert not fits(Need("fp8", 5, 0.5), node("H100"))
    assert not fits(Need("fp16", 1, 0.1), node(gpus=0))


def test_pools_without_gpu_run_anywhere() -> None:
    assert fits(Need("fp8", 1, 0), node(gpus=0))
    assert selectors(Need("fp8", 1, 0)) == []


def test_16_bit_prefers_nodes_without_fp8() -> None:
    strict, free = Need("fp16", 1, 1, allow_fp8_nodes=False), Need("fp16", 1, 1)
    assert selectors(free)[: len(selectors(strict))] == selectors(strict)
    assert selectors(free)[len(selectors(strict)) :] == selectors(Need("fp8", 1, 1))


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
    assert named - COMPUTE_CAPABILITY.keys() <= {"K80"}  # too old for torch
