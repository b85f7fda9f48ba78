"""The messages between the Dispatcher, its Ingresses and the Generators, and their timing.

A *call* is one request of a client, for one or more images. A *session* is one Ingress replica's
connection to the Dispatcher. The Ingress's end of the session gives calls and images their ids.

    Ingress → Dispatcher     AdmissionRequest, QueuedImage, Release, UsageRecord, CallQuery: in a
                             SessionUpdate
    Dispatcher → Ingress     AdmissionDecision, Granted, Refused, Position, Cancelled, Recorded,
                             CallAnswer, ShadowGranted, ShadowStopped: in a SessionMessage
    Generator → Dispatcher   Heartbeat, StoppedImage; answered with a HeartbeatReply
    Ingress → Generator      Lease: the grant by which an image is generated

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..tenants.keys import TenantChanges
from ..usage.record import UsageRecord

Pools = tuple[str, ...]  # names of pools, preferred first
# How a call has come: from a client that waits for its answer, to have a job accepted, for a job,
# or for a line of a batch.
Lane = Literal["request", "acceptance", "job", "batch"]
STORED = "job", "batch"  # lanes of work that is stored, and waits as long as it must
BATCH = "/batch"  # ends the name of the flow in which a tenant's batches queue


def flow_of(tenant: str, lane: Lane) -> str:
    """The name under which a call's images queue: batches queue like a tenant of their own."""
    return tenant + BATCH if lane == "batch" else tenant


def tenant_of(flow: str) -> str:
    """The tenant whose images queue under this name."""
    return flow.removesuffix(BATCH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Intervals and waiting times of the Dispatcher, Ingresses and Generators, in seconds.

    `heartbeat_s`: the time between two heartbeats of an Ingress or a Generator.
    `heartbeats_per_s`: how many heartbeats of Generators are due each second, at most. If there are
    more Generators, each one reports less often. About a third more come, because Generators report
    before it is due, and at once if they have news.
    `session_lease_s`: how long an Ingress may be silent before its slots are free.
    `replica_lease_s`: how long a Generator's heartbeat may be overdue before it counts as gone.
    `recovery_s`: how long a restarted Dispatcher grants nothing and admits no new calls after the
    first message, so that every Ingress has time to report which calls and images it has.
    `reconnect_s`: how long an Ingress waits before it opens a lost session again.
    `positions_s`: how long queue positions are collected before they are sent.
    `nodes_s`: the time between two readings of the cluster's nodes.
    `tenants_s`: the time between two readings of the tenants.
    `record_s`: how long an answer waits until its usage records are written. This must be long
    enough for a restart of the Dispatcher.
    `receive_s`: how long a Generator may take to acknowledge an image.
    `retry_pause_s`: how long an image waits before it is queued again if its pool is not there.
    `charge_retry_s`: how long a charge that could not be written waits for its next attempt.
    """

    heartbeat_s: float = 1.0
    heartbeats_per_s: float = 100.0
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


def job_of(call_id: str) -> str:
    """The id of the job of a call, which was opened by its acceptance or by a claim."""
    return call_id.partition(".")[0]


class QueuedImage(NamedTuple):
    """One image that needs a slot, as its Ingress sends it to the Dispatcher's fair queue.

    `work_s`: the predicted work, in seconds of a reference replica. `report_position`: whether the
    client wants to hear the image's place in the queue. `size`: of the image; images of one size
    share batches. `alone`: it must run alone on its replica, because it may have killed others.
    Filled in by the session: `id`, `call_id`, and `waited_s`, the seconds since the image arrived,
    which decide its place among its tenant's images. They are 0 when the image is sent for the
    first time.
    """

    pools: Pools
    work_s: float = 0.0
    report_position: bool = False
    id: str = ""
    call_id: str = ""
    waited_s: float = 0.0
    size: str = ""
    alone: bool = False


class AdmissionRequest(NamedTuple):
    """A call that asks to be admitted, as a whole or not at all.

    `timeout_s`: seconds from the call's beginning to its deadline. `waited_s`: how many of them had
    passed when the request was sent, for example in the result cache's lookup. `work_s`: the work
    that the call may still be charged. `accepted`: an earlier Dispatcher has admitted the call
    already, so this Dispatcher admits it without any check. `usages`: records that are written if
    the call is admitted, because its images are there already. `key_id`: of the API key that the
    client has sent. `result_key`: the key under which
    its images will be in the result cache that all Ingresses share; empty if there is none.
    `follows`: the accepted call waits for an equal call of another Ingress. `lane`: how the call
    has come. The call of an acceptance has no images, and asks whether a job may be accepted whose
    images will cost `work_s`.
    """

    call_id: str
    tenant: str
    request_id: str
    images: tuple[QueuedImage, ...] = ()
    timeout_s: float = 0.0
    work_s: float = 0.0
    accepted: bool = False
    waited_s: float = 0.0
    usages: tuple[UsageRecord, ...] = ()
    result_key: str = ""
    follows: bool = False
    key_id: str = ""
    lane: Lane = "request"

    @property
    def flow(self) -> str:
        """The name under which its images queue."""
        return flow_of(self.tenant, self.lane)


class RunningImage(NamedTuple):
    """An image that holds a slot of a replica of `pool`; `work_s`: its predicted work.

    `flow`: the name under which it has queued.
    """

    image_id: str
    call_id: str
    flow: str
    pool: str
    work_s: float = 0.0
    replica: str = ""
    size: str = ""


class Release(NamedTuple):
    """The end of an image's wait or run: the image is done, or is no longer wanted.

    `took_s`: the work that the image took. None if that is not known yet, because the image was
    stopped or its replica was lost; a Generator that stops an image reports its work. `cancelled`:
    the full charge of an image that its client cancelled. The tenant then pays in proportion to the
    steps that were done. `lost`: whether the replica died while it ran the image. `refused`:
    whether the replica did not begin the image, for example because it is not there any more.
    """

    image_id: str
    took_s: float | None = None
    cancelled: UsageRecord | None = None
    lost: bool = False
    refused: bool = False


class QuarantinedRequest(NamedTuple):
    """A request that has killed a replica in each of its attempts.

    `id`: a digest of everything in it except its seed and the format of the file. `request_id`: the
    id of the request that was the first to do so.
    """

    id: str
    tenant: str
    request_id: str


class CallQuery(NamedTuple):
    """A tenant's question for its open call with this request id; `cancel`: cancel it, too."""

    tenant: str
    request_id: str
    cancel: bool


class CallProgress(NamedTuple):
    """How far an open call is: `step` of its `steps` are done, of all its images together.

    `eta_s`: seconds until the call is expected to be done; None if that is not known.
    """

    call_id: str
    step: int
    steps: int
    eta_s: float | None = None


class SessionUpdate(NamedTuple):
    """The events at an Ingress since its last update.

    The Dispatcher applies the fields in the order in which they stand here.
    """

    usages: tuple[UsageRecord, ...] = ()
    written: tuple[UsageRecord, ...] = ()  # records that the sender has written itself
    releases: tuple[Release, ...] = ()
    ended_calls: tuple[str, ...] = ()
    finished_results: tuple[str, ...] = ()  # result keys whose images are cached, or have failed
    admissions: tuple[AdmissionRequest, ...] = ()
    retries: tuple[QueuedImage, ...] = ()  # further attempts at images of admitted calls
    queries: tuple[CallQuery, ...] = ()
    quarantined: tuple[QuarantinedRequest, ...] = ()
    lifted: tuple[str, ...] = ()  # ids of requests that an operator lets pass again
    faults: tuple[tuple[str, str], ...] = ()  # at present: what does not work there, and why
    keys_used: tuple[tuple[str, float], ...] = ()  # ids of API keys, and when (Unix time)
    progress: tuple[CallProgress, ...] = ()  # of calls whose progress has changed
    shadows: tuple[QueuedImage, ...] = ()  # images to generate again in idle capacity


# -- the Dispatcher to an Ingress -----------------------------------------------------------------

RefusalReason = Literal[
    "no_tenant",
    "no_capacity",
    "queue_full",
    "request_id_in_use",
    "draining",
    "database_unavailable",
    "rate_limit_exceeded",
    "insufficient_quota",
    "deadline_unreachable",
    "timeout_too_short",
]


class RateLimitStatus(NamedTuple):
    """How much a tenant has left of one of its limits.

    `of`: which limit. `reset_s`: seconds until the tenant has the whole limit again.
    """

    of: Literal["requests", "work", "budget"]
    limit: float
    remaining: float
    reset_s: float


class AdmissionDecision(NamedTuple):
    """The answer to an admission request: the call is admitted, or refused for a reason.

    `refusal`: the reason of a refusal; None if the call is admitted. `eta_s`: seconds until the
    call is expected to be done; for "timeout_too_short", the seconds that it takes on an idle
    server. `retry_after_s`: seconds until a refused call would be admitted, if that is known.
    `own_limit`: the call is refused because of its tenant's own share or limit, so calls of other
    tenants may still be admitted. `follows`: its images are not queued, because an equal call of
    another Ingress has them generated; `ResultFinished` tells when that call is done.
    """

    session: str
    call_id: str
    refusal: RefusalReason | None = None
    eta_s: float | None = None
    retry_after_s: float | None = None
    own_limit: bool = False
    rate_limits: tuple[RateLimitStatus, ...] = ()
    follows: bool = False


class Granted(NamedTuple):
    """A waiting image was granted a slot of a replica of `pool`; the fields are a `Lease`'s."""

    session: str
    image_id: str
    pool: str
    replica: str
    owner: str = ""


class Refused(NamedTuple):
    """An image was taken out of the queue, or was not queued.

    "no_capacity": no pool of the image has a replica, and no node could hold one. "evicted": the
    queue is full, and the image's tenant has the most waiting work ÷ weight, while a tenant with
    nothing waiting has asked for images.
    """

    session: str
    image_id: str
    reason: Literal["no_capacity", "evicted"] = "no_capacity"


class ShadowGranted(NamedTuple):
    """A shadow may run on a replica of `pool`, which is idle."""

    session: str
    image_id: str
    pool: str
    replica: str


class ShadowStopped(NamedTuple):
    """A shadow must stop, because its pool is needed."""

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


class ResultFinished(NamedTuple):
    """The equal call that this one follows is done: its images are cached, or it has failed."""

    session: str
    call_id: str


class CallState(NamedTuple):
    """An open call: its `queued` and `running` images, and its age in seconds.

    `position`: the place in the queue of its first queued image, 1 for the next; None if no image
    is queued, or if the place is beyond those that are counted. `progress`: None if the call's
    Ingress does not tell it.
    """

    queued: int
    running: int
    position: int | None
    age_s: float
    progress: CallProgress | None = None


class CallAnswer(NamedTuple):
    """The answer to a query; `state` is None if no Ingress has the call.

    `certain`: False right after the Dispatcher's start. A call that is not found then may be one
    whose Ingress has not reported yet.
    """

    session: str
    query: CallQuery
    state: CallState | None
    certain: bool = True


class Recorded(NamedTuple):
    """A call's usage records are written."""

    session: str
    call_id: str


DispatchEvent = (
    AdmissionDecision
    | Granted
    | Refused
    | ShadowGranted
    | ShadowStopped
    | Position
    | Cancelled
    | ResultFinished
    | CallAnswer
    | Recorded
)


class PoolStatus(NamedTuple):
    """The state of a pool: its staying replicas, and what the autoscaling policy wants.

    `running`: the number of images that hold a slot of the pool. `running_work_s`: the work left of
    these images, as the replicas report it. `speed`: how many reference replicas would do as much
    work as this pool. `placeable`: whether a node could hold one of its replicas. `least`: the
    fewest replicas that the pool may have. `wanted`: the number of replicas that the policy wants.
    `reason`: why `wanted` last changed.
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


class CordonedNode(NamedTuple):
    """A node that gets no new work.

    `node`: Ray's id of it. `cards`: the UUIDs of the cards for which it is cordoned.
    """

    node: str
    reason: str
    cards: tuple[str, ...] = ()


class DispatcherStatus(NamedTuple):
    """The Dispatcher's state: open `calls` of clients, `queued` images and every pool.

    `faults`: what does not work at present, and why: a file of tenants, a bucket that an Ingress
    cannot write to. `quarantined`: the requests that are refused because they have killed replicas.
    """

    draining: bool
    calls: int
    queued: int
    pools: dict[str, PoolStatus]
    faults: dict[str, str]
    quarantined: tuple[QuarantinedRequest, ...]
    cordoned: tuple[CordonedNode, ...]

    def as_json(self) -> dict[str, object]:
        """The status as `GET /v1/state` shows it."""
        pools = {name: pool._asdict() for name, pool in self.pools.items()}
        quarantined = [request._asdict() for request in self.quarantined]
        cordoned = [node._asdict() for node in self.cordoned]
        return {
            **self._asdict(),
            "pools": pools,
            "quarantined": quarantined,
            "cordoned": cordoned,
        }


class SessionMessage(NamedTuple):
    """The events that the Dispatcher sends to an Ingress at one time.

    `tenants`: all tenants when a session begins, and later those that have changed; otherwise
    None. `status`: the Dispatcher's status, sent with every heartbeat and when a
    replica has reported itself for the first time; otherwise None.
    """

    events: tuple[DispatchEvent, ...] = ()
    tenants: TenantChanges | None = None
    status: DispatcherStatus | None = None


# -- Generators -----------------------------------------------------------------------------------


class Lease(NamedTuple):
    """A grant as the Ingress shows it to a Generator: whose image may run on which replica.

    `owner`: the name under which the image has queued; a replica shares its steps by it.
    """

    session: str
    image_id: str
    pool: str
    replica: str
    owner: str = ""


class StoppedImage(NamedTuple):
    """A Generator's report that it stopped an image.

    `steps`: the steps that were done. `work_s`: the work that they took.
    """

    lease: Lease
    steps: int
    work_s: float


class Heartbeat(NamedTuple):
    """The report of a Generator replica about itself.

    `running_work_s`: the work left of its running images, in seconds of this replica. `speed`: how
    many seconds of a reference replica's work this replica does in one second. `node`: Ray's id of
    its node. `start_s`: how long this replica took to start, in seconds. `card`: the UUID of its
    card, empty on a CPU. `fault`: what the driver says is wrong with the card, empty if nothing.
    """

    pool: str
    replica: str
    slots: int
    running_work_s: float = 0.0
    speed: float = 1.0
    node: str = ""
    start_s: float = 0.0
    card: str = ""
    fault: str = ""


class HeartbeatReply(NamedTuple):
    """The Dispatcher's answer to a heartbeat.

    `orphans`: those leases that the replica runs, but that no session holds. `one_at_a_time`: the
    replica's card has had a fault, so only one image may run on it. `next_s`: seconds until the
    next heartbeat is due, unless the replica has news before.
    """

    orphans: tuple[Lease, ...] = ()
    one_at_a_time: bool = False
    next_s: float = 1.0
