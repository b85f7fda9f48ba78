"""The nodes on which the replicas of a pool may run, preferred nodes first.

A node's label `octet/precision` (`fp8` or `fp16`) says which precision the node is for. Without
this label, the card decides: it is looked up in `cluster.cards` by Ray's own label
`ray.io/accelerator-type`. A card that is not listed there counts as having no FP8. A pool that is
bound to a card runs on nodes whose label `octet/card` names the card, or, without that label, whose
`ray.io/accelerator-type` does. `selectors` states these rules for Ray, and `fits` states the same
rules for Octet.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from .cards import CAPABILITIES, CARDS, FP8_SINCE, Card, card_of

PRECISION_LABEL = "octet/precision"
CARD_LABEL = "octet/card"
ACCELERATOR_LABEL = "ray.io/accelerator-type"
FP8_CARDS = tuple(name for name, found in CAPABILITIES.items() if found >= FP8_SINCE)

Selector = dict[str, str]


@dataclass(frozen=True, slots=True)
class Node:
    """A living node; `num_cpus` and `num_gpus` are its totals, in Ray's units."""

    id: str
    labels: Mapping[str, str] = field(default_factory=dict)
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    draining: bool = False  # about to end: nothing new is placed on the node

    @property
    def card(self) -> Card | None:
        """The node's card if it is one of `CARDS`: by Octet's label, else by Ray's."""
        if label := CARDS.get(self.labels.get(CARD_LABEL, "")):
            return label
        return card_of(self.labels.get(ACCELERATOR_LABEL, ""))

    def has_fp8(self, card: Card | None = None) -> bool:
        """Return whether the node counts as having FP8.

        Octet's precision label decides. Without this label, the given `card` decides. Without both,
        the card in Ray's label decides.
        """
        label = self.labels.get(PRECISION_LABEL)
        if label in ("fp8", "fp16"):
            return label == "fp8"
        return card.has_fp8 if card else self.labels.get(ACCELERATOR_LABEL) in FP8_CARDS


@dataclass(frozen=True, slots=True)
class NodeRequirement:
    """The needs of one replica of a pool, in Ray's units.

    `allow_fp8_nodes`: whether an fp16 replica may run on nodes that have FP8. `card`: the id in
    `CARDS` of the card that the replica needs, None for any card.
    """

    precision: Literal["fp8", "fp16"]
    num_cpus: float
    num_gpus: float
    allow_fp8_nodes: bool = True
    card: str | None = None


def selectors(need: NodeRequirement) -> list[Selector]:
    """Ray label selectors for a pool's replicas, preferred first; an empty list means any node."""
    if not need.num_gpus:
        return []
    if need.card:
        precision = _precision_on(CARDS[need.card], need)
        return [{**selector, **precision} for selector in card_selectors(need.card)]
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


def card_selectors(card: str) -> list[Selector]:
    """Ray label selectors for the nodes that have this card, an id of `CARDS`."""
    labelled, named = ",".join(CARDS), ",".join(CARDS[card].ray_names)
    return [
        {CARD_LABEL: card},
        {CARD_LABEL: f"!in({labelled})", ACCELERATOR_LABEL: f"in({named})"},
    ]


def _precision_on(card: Card, need: NodeRequirement) -> Selector:
    """The selector of nodes by precision label, for a pool that is bound to this card."""
    if need.precision == "fp8":
        return {PRECISION_LABEL: "!fp16" if card.has_fp8 else "fp8"}
    if need.allow_fp8_nodes:
        return {}
    return {PRECISION_LABEL: "fp16" if card.has_fp8 else "!fp8"}


def fits(need: NodeRequirement, node: Node) -> bool:
    """Return whether an empty node could hold a replica of a pool."""
    if node.num_cpus < need.num_cpus or node.num_gpus < need.num_gpus:
        return False
    if not need.num_gpus:
        return True
    card = CARDS[need.card] if need.card else None
    if card and node.card != card:
        return False
    has_fp8 = node.has_fp8(card)
    return has_fp8 if need.precision == "fp8" else need.allow_fp8_nodes or not has_fp8


def unknown_cards(nodes: Iterable[Node]) -> dict[str, str]:
    """Warnings, by node id, about GPU nodes whose precision had to be guessed."""
    warnings = {}
    for node in nodes:
        card = node.labels.get(ACCELERATOR_LABEL)
        label = node.labels.get(PRECISION_LABEL)
        if not node.num_gpus or label in ("fp8", "fp16") or (not label and card in CAPABILITIES):
            continue
        known = f"label {PRECISION_LABEL}={label}" if label else f"card {card or 'without a name'}"
        warnings[node.id] = (
            f"node {node.id[:8]}: unknown {known}; it counts as "
            f"{'having' if node.has_fp8() else 'having no'} FP8. To set this, start the node with "
            f"the label {PRECISION_LABEL}=fp8 or {PRECISION_LABEL}=fp16 (ray start --labels, or "
            "'labels' of a KubeRay worker group)"
        )
    return warnings
