"""What the Dispatcher, its Ingresses and the Generators tell each other.

A *call* is one request of a client, with one *entry* for each image and each further attempt at
it. Calls and entries have the names that their session gives them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from ..usage.record import UsageRecord

Pools = tuple[str, ...]


class QueuedImage(NamedTuple):
    """An entry of a call; `work_s` is predicted. `watched`: its session wants its position."""

    entry: str
    call: str
    pools: Pools
    work_s: float = 0.0
    watched: bool = False


class AdmissionRequest(NamedTuple):
    """A call, which is admitted as a whole or not at all.

    `timeout_s`: from its beginning to its deadline. `work_s`: what it may still be charged. Nothing
    refuses what was `accepted` before, but the lack of every replica and node that it needs.
    """

    call: str
    tenant: str
    request_id: str
    entries: tuple[QueuedImage, ...] = ()
    timeout_s: float = 0.0
    work_s: float = 0.0
    accepted: bool = False


class RunningImage(NamedTuple):
    """An entry that holds a slot of a pool by an earlier grant."""

    entry: str
    call: str
    tenant: str
    pool: str
    work_s: float = 0.0


class Release(NamedTuple):
    """An entry is done or no longer wanted, whether it waits or runs.

    `took_s`: the work that it took; None if the Generator will say, because it was stopped.
    `cancelled`: what its tenant would have been charged; it is charged the steps that were done.
    """

    entry: str
    took_s: float | None = None
    cancelled: UsageRecord | None = None


class SessionUpdate(NamedTuple):
    """What happened at an Ingress since it last spoke, to be taken in this order."""

    usages: tuple[UsageRecord, ...] = ()
    releases: tuple[Release, ...] = ()
    ended: tuple[str, ...] = ()  # calls
    openings: tuple[AdmissionRequest, ...] = ()
    submits: tuple[QueuedImage, ...] = ()  # further attempts


class Lease(NamedTuple):
    """A grant as the Generator that draws by it knows it."""

    session: str
    entry: str
    pool: str


class StoppedImage(NamedTuple):
    """A Generator drew no further than this; `work_s`: what it took so far."""

    lease: Lease
    steps: int
    work_s: float


class Heartbeat(NamedTuple):
    """What a Generator replica says of itself.

    `running_work_s`: what it still has to do, in its own seconds; `speed`: work of a reference
    replica that it does in a second; `node`: Ray's id of its node; `start_s`: what its own start
    took there.
    """

    pool: str
    replica: str
    slots: int
    running_work_s: float = 0.0
    speed: float = 1.0
    node: str = ""
    start_s: float = 0.0


class HeartbeatReply(NamedTuple):
    """The Dispatcher's answer to a heartbeat.

    `orphans`: leases that no session holds. `leaving`: the replica's node is being drained, so it
    is to get no new images.
    """

    orphans: tuple[Lease, ...] = ()
    leaving: bool = False


Refusal = Literal[
    "no_tenant",
    "no_capacity",
    "queue_full",
    "request_id_in_use",
    "draining",
    "rate_limit_exceeded",
    "insufficient_quota",
    "deadline_unreachable",
]


class RateLimitStatus(NamedTuple):
    """How a tenant stands to one of its limits; `reset_s`: until it has all of it again."""

    of: Literal["requests", "work", "budget"]
    limit: float
    remaining: float
    reset_s: float


class AdmissionDecision(NamedTuple):
    """Whether a call is admitted, or why it is refused.

    `eta_s`: when it is expected to be done. `retry_after_s`: when it would be admitted, if that is
    known. `own`: the tenant has more under way than its share; others may be admitted.
    """

    session: str
    call: str
    refusal: Refusal | None = None
    eta_s: float | None = None
    retry_after_s: float | None = None
    own: bool = False
    standings: tuple[RateLimitStatus, ...] = ()


class Outcome(NamedTuple):
    """What became of an entry: the pool it was granted, or that it has none any more.

    Or where it waits (`position`, 1: next). A call in the place of an entry: it is "cancelled" by
    another call, or its usage is "recorded".
    """

    session: str
    entry: str
    pool: str | None
    kind: Literal["granted", "queued", "no_capacity", "cancelled", "recorded", "unrecorded"]
    position: int = 0


SESSION_LEASE_S = 10.0


REPLICA_LEASE_S = 5.0


HEARTBEAT_S = 1.0  # how often Ingresses and Generators are heard from
