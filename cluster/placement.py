"""On which nodes the replicas of a pool may run, preferred first.

A node's label `octet/precision` (`fp8` or `fp16`) says which precision it is for. Where it is
missing, Ray's own label `ray.io/accelerator-type` decides by the table below; a card that is not
in it counts as having no FP8. `selectors` says the same to Ray that `fits` says to us.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from .capability import FP8_SINCE

PRECISION_LABEL = "octet/precision"
ACCELERATOR_LABEL = "ray.io/accelerator-type"

# Compute capability by Ray's name of the card. Source: NVIDIA's list of CUDA GPUs.
COMPUTE_CAPABILITY = {
    "P4": (6, 1),
    "P100": (6, 0),
    "V100": (7, 0),
    "T4": (7, 5),
    "A100": (8, 0),
    "A100-40G": (8, 0),
    "A100-80G": (8, 0),
    "A30": (8, 0),
    "A2": (8, 6),
    "A10": (8, 6),
    "A10G": (8, 6),
    "A16": (8, 6),
    "A40": (8, 6),
    "RTX-A6000": (8, 6),
    "GeForce-RTX-3090": (8, 6),
    "L4": (8, 9),
    "L40": (8, 9),
    "L40S": (8, 9),
    "GeForce-RTX-4080": (8, 9),
    "GeForce-RTX-4090": (8, 9),
    "H20": (9, 0),
    "H100": (9, 0),
    "H200": (9, 0),
    "GH200": (9, 0),
    "B200": (10, 0),
    "GB200": (10, 0),
    "B300": (10, 3),
    "GB300": (10, 3),
    "RTX-PRO-6000": (12, 0),
    "GeForce-RTX-5080": (12, 0),
    "GeForce-RTX-5090": (12, 0),
}
FP8_CARDS = tuple(card for card, found in COMPUTE_CAPABILITY.items() if found >= FP8_SINCE)

Selector = dict[str, str]


@dataclass(frozen=True, slots=True)
class Node:
    """A living node; its resources are totals, in Ray's units."""

    id: str
    labels: Mapping[str, str] = field(default_factory=dict)
    num_cpus: float = 0.0
    num_gpus: float = 0.0

    @property
    def has_fp8(self) -> bool:
        label = self.labels.get(PRECISION_LABEL)
        if label in ("fp8", "fp16"):
            return label == "fp8"
        return self.labels.get(ACCELERATOR_LABEL) in FP8_CARDS


@dataclass(frozen=True, slots=True)
class Need:
    """What one replica of a pool needs of its node, in Ray's units."""

    precision: Literal["fp8", "fp16"]
    num_cpus: float
    num_gpus: float
    allow_fp8_nodes: bool = True


def selectors(need: Need) -> list[Selector]:
    """Ray label selectors for a pool's replicas, preferred first; none means anywhere."""
    if not need.num_gpus:
        return []
    unlabelled, cards = "!in(fp8,fp16)", ",".join(FP8_CARDS)
    with_fp8 = [
        {PRECISION_LABEL: "fp8"},
        {PRECISION_LABEL: unlabelled, ACCELERATOR_LABEL: f"in({cards})"},
    ]
    if need.precision == "fp8":
        return with_fp8
    without = [
        {PRECISION_LABEL: "fp16"},
        {PRECISION_LABEL: unlabelled, ACCELERATOR_LABEL: f"!in({cards})"},
    ]
    return [*without, *with_fp8] if need.allow_fp8_nodes else without


def fits(need: Need, node: Node) -> bool:
    """Whether an empty node could hold a replica."""
    if node.num_cpus < need.num_cpus or node.num_gpus < need.num_gpus:
        return False
    if not need.num_gpus:
        return True
    return node.has_fp8 if need.precision == "fp8" else need.allow_fp8_nodes or not node.has_fp8


def unknown_cards(nodes: Iterable[Node]) -> dict[str, str]:
    """A warning for each GPU node whose precision is a guess, by node id."""
    warnings = {}
    for node in nodes:
        card = node.labels.get(ACCELERATOR_LABEL)
        label = node.labels.get(PRECISION_LABEL)
        if (
            not node.num_gpus
            or label in ("fp8", "fp16")
            or (not label and card in COMPUTE_CAPABILITY)
        ):
            continue
        known = f"label {PRECISION_LABEL}={label}" if label else f"card {card or 'without a name'}"
        warnings[node.id] = (
            f"node {node.id[:8]}: unknown {known}; it counts as "
            f"{'having' if node.has_fp8 else 'having no'} FP8. To say so, start the node with "
            f"the label {PRECISION_LABEL}=fp8 or {PRECISION_LABEL}=fp16 (ray start --labels, or "
            "'labels' of a KubeRay worker group)"
        )
    return warnings
