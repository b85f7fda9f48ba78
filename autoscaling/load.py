"""The policy's inputs: the limits on replicas, the replicas that exist, and the work to do.

*Work* is measured in seconds of a model's reference replica. It is known before an image is
generated.

Pure: standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class PolicyTuning:
    """The policy's numbers that an operator may set.

    - `target_wait_s`: seconds within which a queue is to be drained, once the replicas that were
      ordered for it are ready.
    - `utilisation`: the largest fraction of time for which expected work may keep replicas busy.
    - `spare`: capacity for chance, in standard deviations of the number of images that are
      generated at a time.
    - `hold_s`: seconds over which arriving work is averaged, and for which replicas are kept after
      they were last needed.
    - `idle_s`: seconds without work after which a pool's last replica is stopped.
    - `node_wait_s`: seconds that the provider may take to add a node for a replica; 0: nodes are
      never added.
    - `warm_reserve`: replicas beyond the needed ones, for each model that is not idle.
    """

    target_wait_s: float = 10.0
    utilisation: float = 0.8
    spare: float = 3.0
    hold_s: float = 300.0
    idle_s: float = 600.0
    node_wait_s: float = 0.0
    warm_reserve: int = 0


@dataclass(frozen=True, slots=True)
class PoolBounds:
    """The settings of a pool, and estimates that hold until its replicas have been observed.

    `slots`: images that a replica runs at a time. `speed`: estimated seconds of work that a replica
    does per second. `start_s`: estimated seconds of a replica's start. `usd_h`: US dollars per hour
    of a replica, 0 if unknown. A model's pools are preferred by the price of their work if all
    prices are known, otherwise in the order of the settings.
    """

    model: str
    min_replicas: int
    max_replicas: int
    slots: int
    speed: float = 1.0
    start_s: float = 30.0
    usd_h: float = 0.0


@dataclass(frozen=True, slots=True)
class Follower:
    """A deployment that pools or clients depend on, and that is scaled with them.

    It has the same part of its `max_replicas` as `pools` have of theirs. If `each` is not 0, it has
    one replica for every `each` open requests instead.
    """

    min_replicas: int
    max_replicas: int
    pools: tuple[str, ...] = ()
    each: int = 0


@dataclass(frozen=True, slots=True)
class ScalingLimits:
    """The bounds of all pools and followers by name, and the policy's tuning."""

    pools: Mapping[str, PoolBounds]
    followers: Mapping[str, Follower] = field(default_factory=dict)
    tuning: PolicyTuning = PolicyTuning()


class Demand(NamedTuple):
    """The work of all requests that may use the same pools, in seconds of a reference replica.

    `arrived_s`, `squares`: the work that has arrived since the start, and the sum of the squares of
    the requests' works. `queued_s`: the work that waits. `oldest_wait_s`: how long the oldest
    waiting request has waited.
    """

    pools: tuple[str, ...]
    arrived_s: float
    squares: float
    queued_s: float = 0.0
    oldest_wait_s: float = 0.0


class Supply(NamedTuple):
    """The replicas that a pool has.

    `ready`: the number of ready ones. `speed`: seconds of work per second that one of them does,
    None if unknown. `placeable`: whether a node of the cluster could hold a replica. `start_s`:
    seconds that starts took once a node was there, None if unknown.
    """

    ready: int = 0
    speed: float | None = None
    placeable: bool = True
    start_s: float | None = None


class Load(NamedTuple):
    """Everything that the policy is told at one time.

    A pool that is missing from `supplies` keeps its number of wanted replicas.
    """

    demands: Sequence[Demand]
    supplies: Mapping[str, Supply]
    open_requests: int = 0
