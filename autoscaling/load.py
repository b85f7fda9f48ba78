"""What the policy is told: what there may be, what there is, and what is asked of it.

*Work* is seconds of a model's reference replica, known before an image is drawn.

Pure: standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class PolicyTuning:
    """What an operator may set.

    `target_wait_s`: how soon a queue is to be drained once replicas ordered for it are ready;
    `utilisation`: how busy replicas are at most with what is expected; `spare`: room for chance, in
    standard deviations of the images that are drawn at a time; `hold_s`: over how long the work
    that arrives is averaged, and how long what was needed is kept; `idle_s`: until the last replica
    goes; `node_wait_s`: how long a node may take that is added for a replica, 0: nobody adds nodes;
    `warm_reserve`: replicas beyond what is needed, of each model that is not idle.
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
    """What is known of a pool beforehand.

    `speed`, work a second, and `start_s` of a replica: until replicas have shown theirs. `usd_h`:
    what one costs. A model's pools are preferred by the price of their work if all have one, else
    as they are listed.
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
    """A deployment whose size follows that of `pools`, or one replica for `each` open requests."""

    min_replicas: int
    max_replicas: int
    pools: tuple[str, ...] = ()
    each: int = 0


@dataclass(frozen=True, slots=True)
class ScalingLimits:
    pools: Mapping[str, PoolBounds]
    followers: Mapping[str, Follower] = field(default_factory=dict)
    tuning: PolicyTuning = PolicyTuning()


class Demand(NamedTuple):
    """Of all requests that may use the same pools.

    `arrived_s`, `squares`: the work that has arrived since the start, and the sum of its squares.
    """

    pools: tuple[str, ...]
    arrived_s: float
    squares: float
    queued_s: float = 0.0
    oldest_wait_s: float = 0.0


class Supply(NamedTuple):
    """Of a pool; `speed`: of one ready replica; `placeable`: a node that is there could hold it.

    `start_s`: what starts took on their nodes, as far as is known.
    """

    ready: int = 0
    speed: float | None = None
    placeable: bool = True
    start_s: float | None = None


class Load(NamedTuple):
    """What was wanted of a pool that is not in `supplies` stays."""

    demands: Sequence[Demand]
    supplies: Mapping[str, Supply]
    open_requests: int = 0
