"""What the Dispatcher, its Ingresses and the Generators tell each other."""

from __future__ import annotations

from typing import Literal, NamedTuple

Pools = tuple[str, ...]


class Submission(NamedTuple):
    """An entry as its session names it; an empty `request_id` claims none.

    `accepted`: it was queued before, so neither a full queue nor another's request id nor draining
    refuses it. `watched`: its session wants to hear its position.
    """

    entry: str
    pools: Pools
    request_id: str = ""
    accepted: bool = False
    watched: bool = False


class Running(NamedTuple):
    """An entry that holds a slot of a pool by an earlier grant."""

    entry: str
    pool: str
    request_id: str = ""


class Lease(NamedTuple):
    """A grant as the Generator that draws by it knows it."""

    session: str
    entry: str
    pool: str


class Heartbeat(NamedTuple):
    """What a Generator replica says of itself.

    `running_work_s`: what it still has to do, in its own seconds; `speed`: work of a reference
    replica that it does in a second.
    """

    pool: str
    replica: str
    slots: int
    running_work_s: float = 0.0
    speed: float = 1.0


Refusal = Literal["no_capacity", "queue_full", "request_id_in_use", "draining"]


class Outcome(NamedTuple):
    """What became of an entry: the pool it was granted, or why it was refused.

    Or where it waits (`position`, 1: next). A call that is "cancelled" has its request id in the
    place of an entry.
    """

    session: str
    entry: str
    pool: str | None
    kind: Literal["granted", "queued", "cancelled"] | Refusal
    position: int = 0
