"""The policy's inputs: the limits on replicas, the replicas that exist, and the work to do.

*Work* is measured in seconds of a model's reference replica. It is known before an image is
generated.

Pure: standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class PolicyTuning:
    """The policy's numbers that an operator may set.

    - `late_part`: the fraction of all work that may come faster than replicas start. Replicas for
      the rest stay ready (`floor`); 1: none do.
    - `keep_s`: seconds without any work after which no replicas stay ready for jumps.
    - `target_wait_s`: seconds within which a queue is to be drained, once the replicas that were
      ordered for it are ready.
    - `utilisation`: the largest fraction of time for which expected work may keep replicas busy.
    - `spare`: the reserve for chance. The number of images in progress varies by chance; the
      reserve is this many standard deviations of that number.
    - `hold_s`: seconds over which arriving work is averaged. Replicas for arriving work are also
      kept for this time after they were last needed, and at least for twice the time of a start.
    - `idle_s`: further seconds without work, after `hold_s`, until a pool's last replica stops.
    - `node_wait_s`: seconds that the provider may take to add a node for a replica; 0: nodes are
      never added.
    - `warm_reserve`: replicas beyond the needed ones, for each model that is not idle.
    """

    late_part: float = 0.001
    keep_s: float = 3600.0
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

    - `slots`: images that a replica runs at a time.
    - `speed`: seconds of work that a replica does per second, as estimated.
    - `start_s`: seconds that a replica takes to start, as estimated.
    - `usd_h`: US dollars per hour of a replica, 0 if unknown. If all prices of a model's pools are
      known, the pool with the cheapest work is preferred. Otherwise the order of the settings
      counts.
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

    The deployment has the same part of its `max_replicas` as `pools` have of theirs: half as many
    as possible if the pools have half. If `each` is not 0, the deployment has one replica for every
    `each` open requests instead.
    """

    min_replicas: int
    max_replicas: int
    pools: tuple[str, ...] = ()
    each: int = 0


@dataclass(frozen=True, slots=True)
class ScalingLimits:
    """The bounds of all pools and followers by name, and the policy's tuning.

    `room`: the replicas that the nodes can hold beside those of the other pools, for pools that
    want more.
    """

    pools: Mapping[str, PoolBounds]
    followers: Mapping[str, Follower] = field(default_factory=dict)
    tuning: PolicyTuning = PolicyTuning()
    room: Mapping[str, int] = field(default_factory=dict)

    @property
    def within_room(self) -> ScalingLimits:
        """The same limits, with each pool's largest number lowered to its `room`."""
        lower = {
            name: replace(self.pools[name], max_replicas=min(most, self.pools[name].max_replicas))
            for name, most in self.room.items()
        }
        return replace(self, pools={**self.pools, **lower})


class Demand(NamedTuple):
    """The work of all requests that may use the same pools, in seconds of a reference replica.

    `arrived_s`: the work that has arrived since the start. `squares`: the sum of the squares of the
    works of the single requests. `images`: their number. `queued_s`: the work that waits.
    `oldest_wait_s`: how long the oldest waiting request has waited.
    """

    pools: tuple[str, ...]
    arrived_s: float
    squares: float
    queued_s: float = 0.0
    oldest_wait_s: float = 0.0
    images: int = 0


class Supply(NamedTuple):
    """The replicas that a pool has.

    `ready`: the number of ready replicas. `speed`: seconds of work that one of them does per
    second, None if unknown. `placeable`: whether a node of the cluster could hold a replica.
    `start_s`: seconds that replicas took to start once they had a node, None if unknown.
    """

    ready: int = 0
    speed: float | None = None
    placeable: bool = True
    start_s: float | None = None


class Load(NamedTuple):
    """Everything that the policy is told for one decision.

    A pool that is missing from `supplies` keeps its number of wanted replicas. `unix_s`: the time
    of day, None if it is not known.
    """

    demands: Sequence[Demand]
    supplies: Mapping[str, Supply]
    open_requests: int = 0
    unix_s: float | None = None
