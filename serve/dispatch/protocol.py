"""The messages between the Dispatcher, its Ingresses and the Generators, and their timing.

A *call* is one request of a client: one or more images. A *session* is one Ingress replica's
connection to the Dispatcher. Ids of calls and images are given by the session that opens them.

    Ingress → Dispatcher     AdmissionRequest, QueuedImage, Release, UsageRecord: in a SessionUpdate
    Dispatcher → Ingress     AdmissionDecision, Granted, Refused, Position, Cancelled, Recorded: in
                             a SessionMessage
    Generator → Dispatcher   Heartbeat, StoppedImage; answered with a HeartbeatReply
    Ingress → Generator      Lease: the grant by which an image is generated

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..tenants.keys import TenantDirectory
from ..usage.record import UsageRecord

Pools = tuple[str, ...]  # names of pools, preferred first


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How often each side speaks, and how long it waits for the others. All in seconds.

    `heartbeat_s`: between messages of an Ingress, and of a Generator. `session_lease_s`,
    `replica_lease_s`: how long an Ingress or a Generator may be silent before its slots are free.
    `recovery_s`: how long a restarted Dispatcher only listens, so that every Ingress can say what
    it runs. `reconnect_s`: before an Ingress opens a lost session again. `positions_s`: how long
    queue positions are collected before they are sent. `nodes_s`, `tenants_s`: between two looks at
    the cluster's nodes and at the tenants' files. `record_s`: how long an answer waits for its
    usage records to be on disk, a restart of the Dispatcher included. `receive_s`: how long a
    Generator may take to acknowledge an image. `retry_pause_s`: before an image is queued again
    after no replica started it. `charge_retry_s`: before a charge that could not be written is
    tried again.
    """

    heartbeat_s: float = 1.0
    session_lease_s: float = 10.0
    replica_lease_s: float = 5.0
    recovery_s: float = 2.0
    reconnect_s: float = 0.5
    positions_s: float = 0.05
    nodes_s: float = 2.0
    tenants_s: float = 1.0
    record_s: float = 30.0
    receive_s: float = 5.0
    retry_pause_s: float = 0.25
    charge_retry_s: float = 1.0


TIMING = Timing()


# -- an Ingress to the Dispatcher -----------------------------------------------------------------


class QueuedImage(NamedTuple):
    """One image on its way to a slot: from the Ingress that asks for it to the fair queue.

    `work_s`: the predicted work, in seconds of a reference replica. `report_position`: whether the
    client wants to hear its place in the queue. `id` and `call_id` are filled in by the session.
    """

    pools: Pools
    work_s: float = 0.0
    report_position: bool = False
    id: str = ""
    call_id: str = ""


class AdmissionRequest(NamedTuple):
    """A call that asks to be admitted, as a whole or not at all.

    `timeout_s`: from the call's beginning to its deadline. `work_s`: what the call may still be
    charged. `accepted`: an earlier Dispatcher admitted the call, so no limit refuses it now.
    """

    call_id: str
    tenant: str
    request_id: str
    images: tuple[QueuedImage, ...] = ()
    timeout_s: float = 0.0
    work_s: float = 0.0
    accepted: bool = False


class RunningImage(NamedTuple):
    """An image that holds a slot of `pool` by an earlier grant."""

    image_id: str
    call_id: str
    tenant: str
    pool: str
    work_s: float = 0.0


class Release(NamedTuple):
    """An image is done or no longer wanted, whether it waits or runs.

    `took_s`: the work that it took; None if the Generator will say, because the image was stopped.
    `cancelled`: the full charge of an image that its client cancelled; the tenant is charged the
    part of it that belongs to the steps that were done.
    """

    image_id: str
    took_s: float | None = None
    cancelled: UsageRecord | None = None


class SessionUpdate(NamedTuple):
    """The events at an Ingress since its last update, to be applied in this order."""

    usages: tuple[UsageRecord, ...] = ()
    releases: tuple[Release, ...] = ()
    ended_calls: tuple[str, ...] = ()
    admissions: tuple[AdmissionRequest, ...] = ()
    retries: tuple[QueuedImage, ...] = ()  # further attempts at images of admitted calls


# -- the Dispatcher to an Ingress -----------------------------------------------------------------

RefusalReason = Literal[
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
    """How much of one of its limits a tenant has left; `reset_s`: until it has all of it again."""

    of: Literal["requests", "work", "budget"]
    limit: float
    remaining: float
    reset_s: float


class AdmissionDecision(NamedTuple):
    """The answer to an admission request: the call is admitted, or refused for a reason.

    `eta_s`: seconds until the call is expected to be done. `retry_after_s`: seconds until it would
    be admitted, if that is known. `own_limit`: the tenant is over its own share or limit, so calls
    of other tenants may still be admitted.
    """

    session: str
    call_id: str
    refusal: RefusalReason | None = None
    eta_s: float | None = None
    retry_after_s: float | None = None
    own_limit: bool = False
    rate_limits: tuple[RateLimitStatus, ...] = ()


class Granted(NamedTuple):
    """An image has a slot of `pool`."""

    session: str
    image_id: str
    pool: str


class Refused(NamedTuple):
    """An image left the queue: none of its pools has a replica or a node for one."""

    session: str
    image_id: str


class Position(NamedTuple):
    """An image's place in the queue changed; 1 is the next to be granted."""

    session: str
    image_id: str
    position: int


class Cancelled(NamedTuple):
    """A call was cancelled by another call of its tenant."""

    session: str
    call_id: str


class Recorded(NamedTuple):
    """A call's usage records are on disk, or could not be written."""

    session: str
    call_id: str
    on_disk: bool


DispatchEvent = AdmissionDecision | Granted | Refused | Position | Cancelled | Recorded


class SessionMessage(NamedTuple):
    """The events that the Dispatcher sends to an Ingress at one time.

    `tenants`: the directory of all tenants, when a session begins and whenever it has changed.
    """

    events: tuple[DispatchEvent, ...] = ()
    tenants: TenantDirectory | None = None


# -- Generators -----------------------------------------------------------------------------------


class Lease(NamedTuple):
    """A grant as the Generator knows it."""

    session: str
    image_id: str
    pool: str


class StoppedImage(NamedTuple):
    """A Generator stopped an image after `steps` steps; `work_s`: what it took until then."""

    lease: Lease
    steps: int
    work_s: float


class Heartbeat(NamedTuple):
    """The report of a Generator replica about itself.

    `running_work_s`: what it still has to do, in its own seconds. `speed`: seconds of a reference
    replica's work that it does in a second. `node`: Ray's id of its node. `start_s`: what its own
    start took.
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

    `orphans`: leases that no session holds. `leaving`: the replica's node is being drained, so
    Ray Serve must route no new images to it.
    """

    orphans: tuple[Lease, ...] = ()
    leaving: bool = False


# -- operators ------------------------------------------------------------------------------------


class PoolStatus(NamedTuple):
    """The state of a pool: its staying replicas, and what the autoscaling policy wants.

    `running`: images granted to the pool. `running_work_s`: what its replicas still have to do.
    `speed`: the number of reference replicas that it amounts to. `placeable`: whether a node could
    hold one of its replicas. `least`: replicas that it always has. `reason`: why `wanted` last
    changed.
    """

    replicas: int
    slots: int
    running: int
    running_work_s: float
    speed: float
    placeable: bool
    least: int
    wanted: int
    reason: str


class DispatcherStatus(NamedTuple):
    """The Dispatcher's state: open `calls` of clients, `queued` images and every pool."""

    draining: bool
    calls: int
    queued: int
    pools: dict[str, PoolStatus]

    def as_json(self) -> dict[str, object]:
        """The status as `GET /ready` and `GET /v1/state` show it."""
        pools = {name: pool._asdict() for name, pool in self.pools.items()}
        return {**self._asdict(), "pools": pools}
