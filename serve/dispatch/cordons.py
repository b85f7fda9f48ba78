"""Nodes that get no new work: by an operator's order, or because one of their cards fails.

A *fault* of a card is an error that the driver reports (Xid, ECC), or the death of a replica on it
while images ran there. All that happens to a card within `INCIDENT_S` is one fault. With `FAULTS`
faults within `WINDOW_S` the card's node is to be *cordoned*. Until then a card with a fault runs
one image at a time, so that the next fault costs only that one.

A request can kill replicas, too. So the calls whose images ran there are *suspects*. A suspect is
cleared when one of its images is generated on another card, to which its last attempt goes if it
can. A call that was there in `DEATHS` deaths is the cause, and the cards are forgiven. Only faults
without suspects count.

Ray cannot take one card of a node out of service, so the whole node is cordoned. The card is
remembered: a node that comes with it later, such as a new pod on the same machine, gets no image,
and is to be cordoned as well.

Time is an argument, in seconds on any steady clock.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from .protocol import CordonedNode, Heartbeat

FAULTS = 2
WINDOW_S = 600.0
INCIDENT_S = 30.0
DIED = "a replica died on it"
DEATHS = 3  # as many as an image has attempts


@dataclass(slots=True)
class CardFault:
    """A fault of a card: from when to when, on which node, and the calls that may be its cause."""

    since: float
    last: float
    node: str
    what: str
    suspects: set[str] = field(default_factory=set)


class Cordons:
    """The cordoned nodes, and the recent faults of cards."""

    def __init__(self, cordoned: Iterable[CordonedNode] = ()) -> None:
        """`cordoned`: what an earlier Dispatcher had cordoned."""
        self.incident_s = INCIDENT_S
        self.cordoned: dict[str, CordonedNode] = {one.node: one for one in cordoned}
        self._faults: dict[str, list[CardFault]] = {}  # by card
        self._deaths: Counter[str] = Counter()  # by call, of those that are suspects
        self._cards: dict[str, set[str]] = {}  # the cards of each node, as far as they are known

    def heard(self, heartbeat: Heartbeat, now: float) -> int:
        """Note the card of a replica, and its fault if it reports one.

        Returns how many slots of the replica may be used.
        """
        if heartbeat.card:
            self._cards.setdefault(heartbeat.node, set()).add(heartbeat.card)
        if heartbeat.fault:
            self._add(heartbeat, heartbeat.fault, (), now)
        return self.usable(heartbeat, now)

    def usable(self, heartbeat: Heartbeat, now: float) -> int:
        """Return how many slots of a replica may be used, of those that it has reported."""
        if heartbeat.fault or heartbeat.node in self.cordoned or self._bad(heartbeat.card):
            return 0
        return min(heartbeat.slots, 1) if self.careful(heartbeat, now) else heartbeat.slots

    def careful(self, heartbeat: Heartbeat, now: float) -> bool:
        """Return whether the replica must run one image at a time, because its card had a fault."""
        return bool(self._recent(card_or_node(heartbeat), now))

    def died(self, heartbeat: Heartbeat, calls: Iterable[str], now: float) -> None:
        """Note that a replica has died while images of these calls ran on it.

        `heartbeat`: the replica's last one.
        """
        suspects = set(calls)
        self._add(heartbeat, DIED, suspects, now)
        self._deaths.update(suspects)
        guilty = {call for call in suspects if self._deaths[call] >= DEATHS}
        for card, faults in self._faults.items():
            self._faults[card] = [fault for fault in faults if not fault.suspects & guilty]

    @property
    def suspicious(self) -> bool:
        """True while a call may be the cause of a death."""
        return bool(self._deaths)

    def generated(self, call: str, card: str) -> None:
        """Note that an image of a call was generated on a card: the call did not harm others."""
        if call in self._deaths:
            for other, faults in self._faults.items():
                for fault in faults if other != card else ():
                    fault.suspects.discard(call)

    def due(self, now: float) -> list[CordonedNode]:
        """The nodes that should be cordoned now.

        A card of theirs has too many faults, or has had them on an earlier node.
        """
        found = []
        for card in list(self._faults):
            recent = [fault for fault in self._recent(card, now) if not fault.suspects]
            if len(recent) >= FAULTS:
                whats = ", ".join(dict.fromkeys(fault.what for fault in recent))
                reason = f"card {card}: {whats} ({len(recent)} faults in {WINDOW_S / 60:.0f} min)"
                found.append(CordonedNode(recent[-1].node, reason, (card,)))
        for node, cards in self._cards.items():
            found += [
                CordonedNode(node, bad.reason, bad.cards)
                for card in cards
                if (bad := self._bad(card)) is not None
            ]
        return [one for one in found if one.node not in self.cordoned]

    def cordon(self, node: str, reason: str, cards: Iterable[str] | None = None) -> None:
        """Give a node no new work from now on.

        `cards`: the cards for which the node is cordoned; by default all that are known of it. What
        is noted of these cards on earlier nodes is forgotten.
        """
        chosen = set(self._cards.get(node, ()) if cards is None else cards)
        self._forget(chosen)
        self.cordoned[node] = CordonedNode(node, reason, tuple(sorted(chosen)))

    def uncordon(self, node: str) -> bool:
        """Give a node work again, and forget its cards' faults; return whether it was cordoned."""
        if (ended := self.cordoned.pop(node, None)) is None:
            return False
        self._forget(set(ended.cards))
        for card in (*ended.cards, *self._cards.get(node, ()), node):
            self._faults.pop(card, None)
        return True

    def gone(self, node: str) -> None:
        """Forget which cards a node had, because it is no longer there."""
        self._cards.pop(node, None)

    def _forget(self, cards: set[str]) -> None:
        """Drop the cordons of all nodes with one of these cards."""
        self.cordoned = {n: one for n, one in self.cordoned.items() if not cards & set(one.cards)}

    def _bad(self, card: str) -> CordonedNode | None:
        """The cordon by which a card is known to fail."""
        return next((one for one in self.cordoned.values() if card and card in one.cards), None)

    def _add(self, heartbeat: Heartbeat, what: str, suspects: Iterable[str], now: float) -> None:
        """Note a fault of the replica's card, as a part of the last one if that is recent."""
        recent = self._recent(card_or_node(heartbeat), now)
        if recent and now - recent[-1].last <= self.incident_s:
            recent[-1].last = now
            recent[-1].suspects |= set(suspects)
            return
        fault = CardFault(now, now, heartbeat.node, what, set(suspects))
        self._faults.setdefault(card_or_node(heartbeat), []).append(fault)

    def _recent(self, card: str, now: float) -> list[CardFault]:
        """The faults of a card within `WINDOW_S`; older ones are forgotten."""
        recent = [fault for fault in self._faults.get(card, ()) if now - fault.last <= WINDOW_S]
        if recent:
            self._faults[card] = recent
        else:
            self._faults.pop(card, None)
        if not self._faults:
            self._deaths.clear()
        return recent


def card_or_node(heartbeat: Heartbeat) -> str:
    """The replica's card; without one, the node stands for it."""
    return heartbeat.card or heartbeat.node
