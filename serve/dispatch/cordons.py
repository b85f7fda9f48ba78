"""Nodes that get no new work: by an operator's order, or because one of their cards fails.

A *fault* of a card is an error that the driver reports (Xid, ECC), or the death of a replica on it
while images ran there. With `FAULTS` faults within `WINDOW_S` the card's node is to be *cordoned*.
Until then a card with a fault runs one image at a time, so that the next fault costs only that one.

A request can kill replicas, too. So the calls whose images ran there are *suspects*. A suspect is
cleared when one of its images is generated, which the last attempt does on another card if it can.
A call that was there when `DEATHS` replicas died is the cause, and the cards are forgiven. Only
faults without suspects count.

Ray cannot take one card of a node out of service, so the whole node is cordoned. The card is
remembered: a node that comes with it later, such as a new pod on the same machine, is cordoned
before it gets an image.

Time is an argument, in seconds on any steady clock.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from .protocol import CordonedNode, Heartbeat

FAULTS = 2
WINDOW_S = 600.0
DIED = "a replica died on it"
DEATHS = 3  # as many as an image has attempts


class CardFault(NamedTuple):
    """A fault of a card: when, on which node, and the calls that may be its cause."""

    at: float
    node: str
    what: str
    suspects: frozenset[str] = frozenset()


class Cordons:
    """The cordoned nodes, and the recent faults of cards."""

    def __init__(self, cordoned: Iterable[CordonedNode] = ()) -> None:
        """`cordoned`: what an earlier Dispatcher had cordoned."""
        self.cordoned: dict[str, CordonedNode] = {one.node: one for one in cordoned}
        self._faults: dict[str, list[CardFault]] = {}  # by card
        self._cards: dict[str, set[str]] = {}  # the cards of each node, as far as they are known
        self._reported: set[str] = set()  # replicas whose card's fault is noted

    def heard(self, heartbeat: Heartbeat, now: float) -> int:
        """Note the card of a replica, and its fault if it reports one.

        Returns how many slots of the replica may be used.
        """
        card, node = _card(heartbeat), heartbeat.node
        if heartbeat.card:
            self._cards.setdefault(node, set()).add(heartbeat.card)
        if heartbeat.fault:
            if heartbeat.replica not in self._reported:
                self._reported.add(heartbeat.replica)
                self._add(card, CardFault(now, node, heartbeat.fault))
            return 0
        known = self._bad_card(heartbeat.card)
        if known and node not in self.cordoned:
            self.cordon(node, known.reason)
        if node in self.cordoned:
            return 0
        return min(heartbeat.slots, 1) if self.careful(heartbeat, now) else heartbeat.slots

    def careful(self, heartbeat: Heartbeat, now: float) -> bool:
        """Return whether the replica must run one image at a time, because its card had a fault."""
        return bool(self._recent(_card(heartbeat), now))

    def died(self, heartbeat: Heartbeat, calls: Iterable[str], now: float) -> None:
        """Note that a replica has died while images of these calls ran on it.

        `heartbeat`: the replica's last one.
        """
        suspects = frozenset(calls)
        self._add(_card(heartbeat), CardFault(now, heartbeat.node, DIED, suspects))
        deaths = Counter(
            call for faults in self._faults.values() for fault in faults for call in fault.suspects
        )
        guilty = {call for call in suspects if deaths[call] >= DEATHS}
        for card, faults in self._faults.items():
            self._faults[card] = [fault for fault in faults if not fault.suspects & guilty]

    def generated(self, call: str) -> None:
        """Note that an image of a call was generated: the call kills no replicas."""
        for card, faults in self._faults.items():
            self._faults[card] = [f._replace(suspects=f.suspects - {call}) for f in faults]

    def due(self, now: float) -> list[CordonedNode]:
        """The nodes that should be cordoned now, because a card of theirs has too many faults."""
        found = []
        for card in list(self._faults):
            recent = [fault for fault in self._recent(card, now) if not fault.suspects]
            if len(recent) >= FAULTS:
                node, whats = recent[-1].node, ", ".join(dict.fromkeys(f.what for f in recent))
                reason = f"card {card}: {whats} ({len(recent)} faults in {WINDOW_S / 60:.0f} min)"
                if node not in self.cordoned:
                    found.append(CordonedNode(node, reason, (card,)))
        return found

    def cordon(self, node: str, reason: str, cards: Iterable[str] | None = None) -> None:
        """Give a node no new work from now on.

        `cards`: the cards for which the node is cordoned; by default all that are known of it.
        """
        found = self._cards.get(node, ()) if cards is None else cards
        self.cordoned[node] = CordonedNode(node, reason, tuple(sorted(found)))

    def uncordon(self, node: str) -> bool:
        """Give a node work again, and forget its cards' faults; return whether it was cordoned."""
        if (ended := self.cordoned.pop(node, None)) is None:
            return False
        for other, one in list(self.cordoned.items()):  # the same card under earlier names
            if set(one.cards) & set(ended.cards):
                del self.cordoned[other]
        for card in (*ended.cards, *self._cards.get(node, ()), node):
            self._faults.pop(card, None)
        return True

    def _bad_card(self, card: str) -> CordonedNode | None:
        return next((one for one in self.cordoned.values() if card and card in one.cards), None)

    def _add(self, card: str, fault: CardFault) -> None:
        self._faults.setdefault(card, []).append(fault)

    def _recent(self, card: str, now: float) -> list[CardFault]:
        """The faults of a card within `WINDOW_S`; older ones are forgotten."""
        recent = [f for f in self._faults.get(card, ()) if now - f.at <= WINDOW_S]
        if recent:
            self._faults[card] = recent
        else:
            self._faults.pop(card, None)
        return recent


def _card(heartbeat: Heartbeat) -> str:
    """The replica's card; without one, the node stands for it."""
    return heartbeat.card or heartbeat.node
