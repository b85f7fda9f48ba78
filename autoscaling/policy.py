"""The autoscaling policy: decides how many replicas each pool should have.

A *demand* is the work of all requests that may use the same pools. A model's pools are filled in
order of preference; demand that is too much for a pool goes on to the next one. *Speed* is the
seconds of work that a replica of the pool does per second. A pool needs replicas

- for arriving work: rate ÷ speed, plus spare capacity. The spare capacity covers images that meet
  by chance, which grows with the square root of the number of images.
- for queued work: as many as drain the queue within `target_wait_s`, or within an eighth of a
  start's time if that is longer. This counts only the work that will be left when a replica that is
  ordered now becomes ready; if none will be left, nothing is ordered. Replicas that were ordered
  for a queue stay until the queue is empty.

- for work that may jump: as many as earlier jumps have needed (`floor`), until no work has come for
  `keep_s`.

*Wanted* replicas are either *ready* or *starting*. The number of wanted replicas rises at once. A
fall stops at the highest number that was needed within `hold_s` and within the time of two starts,
so neither chance nor a short pause stops replicas. The last replica is stopped when the pool has
needed no replica for `idle_s`. If replicas do not start in time, the demand that they should serve
goes to the next pool until they do.

Time is an argument, in seconds on any steady clock.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from .floor import Floor, JumpMemory
from .load import Demand, Follower, Load, PoolBounds, ScalingLimits
from .pool_state import PoolState, ReplicaOrder, ReplicasNeeded, bounded, updated
from .rates import Sample, Samples, rates, with_sample

PAUSE_S = 10.0  # a longer time between two decisions is a pause, about which nothing is known
CHANCE_QUEUE_S = 1.0  # a queue that the ready replicas drain within this time is chance
# A queue may take at least this part of a start's time to drain. In less time, replicas would start
# that are needed for moments only.
MIN_DRAIN = 1 / 8
ROUNDING = 1e-6  # replicas; tolerance for floating-point errors

Jumps = Mapping[tuple[str, ...], JumpMemory]  # by the pools of a demand


@dataclass(frozen=True, slots=True)
class PolicyState:
    """The state that `decide` keeps from one decision to the next."""

    at: float = -math.inf
    samples: Mapping[tuple[str, ...], Samples] = field(default_factory=dict)
    floors: Mapping[tuple[str, ...], Floor] = field(default_factory=dict)  # by pools of a demand
    pools: Mapping[str, PoolState] = field(default_factory=dict)
    followers: Mapping[str, tuple[ReplicasNeeded, ...]] = field(default_factory=dict)

    @property
    def jumps(self) -> Jumps:
        """The jumps of the rate that the policy remembers."""
        return {pools: floor.memory for pools, floor in self.floors.items()}

    def remembering(self, jumps: Jumps, now: float) -> PolicyState:
        """The state with what was learnt earlier of jumps, as if work had come just now."""
        floors = {pools: Floor(memory, worked=now) for pools, memory in jumps.items()}
        return replace(self, floors=floors)


class ScalingDecision(NamedTuple):
    """The number of replicas of every pool and follower, by name.

    `state`: the state to hand to the next decision. `reasons`: for each number that changed, why.
    """

    replicas: Mapping[str, int]
    state: PolicyState
    reasons: Mapping[str, str]


class _Share(NamedTuple):
    """The demand that a pool has to serve, and the replicas that this needs, not rounded.

    `for_rate`: the replicas for arriving work. `for_queue`: the replicas for queued work.
    """

    rate: float = 0.0  # arriving work per second
    queued_s: float = 0.0
    oldest_wait_s: float = 0.0
    for_rate: float = 0.0
    for_queue: float = 0.0

    @property
    def replicas(self) -> float:
        return max(self.for_rate, self.for_queue)


def decide(load: Load, limits: ScalingLimits, state: PolicyState, now: float) -> ScalingDecision:
    """Decide how many replicas to run from now on, always within their bounds.

    `state`: the state that the last decision returned.
    """
    tuning, mean_s = limits.tuning, limits.tuning.hold_s
    full_limits, limits = limits, limits.within_room
    if now < state.at or now - state.at > PAUSE_S:
        state = _resumed(state, now)
    samples = dict(state.samples)
    floors = {p: floor for p, floor in state.floors.items() if limits.pools.keys() & set(p)}
    arrived = {d.pools for d in load.demands}
    all_demands = [*load.demands, *(Demand(p, 0.0, 0.0) for p in floors if p not in arrived)]
    for d in all_demands:
        new = Sample(now, d.arrived_s, d.squares)
        # If this is the first demand for these pools, nothing had arrived by the last decision.
        first = (Sample(state.at, 0.0, 0.0),) if state.at > -math.inf else ()
        samples[d.pools] = with_sample(samples.get(d.pools, first), new, mean_s)
    pools = {
        name: updated(state.pools.get(name), pool, load.supplies.get(name), limits.tuning, now)
        for name, pool in limits.pools.items()
    }
    reasons = {}
    for model in dict.fromkeys(pool.model for pool in limits.pools.values()):
        names = preferred(model, limits)
        demands = [d for d in all_demands if set(d.pools) & set(names)]
        arriving = rates([samples[d.pools] for d in demands], mean_s)
        filling = _Filling(pools, limits, now)
        unserved = [
            _Unserved(d, rate, d.queued_s) for d, rate in zip(demands, arriving, strict=True)
        ]
        start_s = pools[names[0]].start_s
        least = dict.fromkeys(names, 0.0)  # the replicas that stay ready for jumps
        for d in demands:
            floor = floors.get(d.pools, Floor())
            level = floor.level(tuning.late_part, tuning.keep_s, start_s, now, load.unix_s)
            for name in (name for name in names if name in d.pools):
                bound = limits.pools[name].max_replicas - least[name]
                taken = min(level / pools[name].speed, bound)
                least[name] += taken
                level -= taken * pools[name].speed
        for place, name in enumerate(names):
            before = pools[name]
            share, unserved = filling.share(name, names[place + 1 :], unserved)
            if name in load.supplies:
                after = _with_wanted(
                    before, share, name, limits, least[name], first=not place, now=now
                )
                pools[name] = after
                if after.wanted != before.wanted:
                    reasons[name] = _reason(before, after, share, limits.pools[name])
        for d, rate in zip(demands, arriving, strict=True):
            part = rate / sum(arriving) if rate else 1.0
            mine = [pools[name] for name in names if name in d.pools]
            floor = floors.get(d.pools, Floor())
            floors[d.pools] = _updated_floor(floor, mine, part, d, load.unix_s, now)
    replicas = {name: pool.wanted for name, pool in pools.items()}
    followers = {}
    for name, follower in limits.followers.items():
        wanted = _follower_replicas(follower, replicas, load, full_limits)
        history = state.followers.get(name, ())
        followers[name] = _with_need(history, wanted, limits.tuning.hold_s, now)
    for name, history in followers.items():
        replicas[name] = wanted = history[0].replicas
        last = state.followers.get(name)
        if last and last[0].replicas != wanted:
            reasons[name] = f"{last[0].replicas} → {wanted} replicas (it follows what it serves)"
    return ScalingDecision(replicas, PolicyState(now, samples, floors, pools, followers), reasons)


def _updated_floor(
    floor: Floor,
    pools: Sequence[PoolState],
    part: float,
    demand: Demand,
    unix_s: float | None,
    now: float,
) -> Floor:
    """Let a demand's floor count the work that has arrived.

    `pools`: those of the demand, preferred first. `part`: of their capacity that it may use. An
    image may wait for as long as it takes alone. It may take longer in all, but on a busy replica
    it shares the time with others.
    """
    slack_s = demand.arrived_s / demand.images / pools[0].speed if demand.images else 0.0
    ready = part * sum(pool.ready * pool.speed for pool in pools)
    ordered = part * sum(min(pool.needed, pool.wanted) * pool.speed for pool in pools)
    start_s = pools[0].start_s
    return floor.updated(demand.arrived_s, ready, ordered, start_s, slack_s, now, unix_s)


def preferred(model: str, limits: ScalingLimits) -> list[str]:
    """The names of a model's pools, preferred first.

    The pool with the cheapest work comes first if all prices are known. Otherwise the order of the
    settings is kept.
    """
    names = [name for name, pool in limits.pools.items() if pool.model == model]
    if all(limits.pools[name].usd_h for name in names):
        names.sort(key=lambda name: limits.pools[name].usd_h / limits.pools[name].speed)
    return names


def _resumed(state: PolicyState, now: float) -> PolicyState:
    """The state from which to decide after a pause, or after the clock was set back.

    The wanted numbers stay until more is known. If the clock was set back, the measured rates are
    forgotten.
    """
    if state.at == -math.inf:
        return state
    pools = {
        name: replace(
            pool,
            busy=now if pool.wanted else pool.busy,
            orders=(ReplicaOrder(now, pool.starting),) if pool.starting else (),
            arriving=(ReplicasNeeded(now, pool.wanted),),
            draining=(),
            given_up_at=now if pool.given_up else None,
        )
        for name, pool in state.pools.items()
    }
    followers = {
        name: (ReplicasNeeded(now, held[0].replicas),) for name, held in state.followers.items()
    }
    if now < state.at:
        return PolicyState(floors=state.floors, pools=pools, followers=followers)
    return replace(state, pools=pools, followers=followers)


# -- what is needed -------------------------------------------------------------------------------


class _Unserved(NamedTuple):
    """The part of one demand that no pool serves yet.

    `rate`: its arriving work per second. `queued_s`: its queued work.
    """

    demand: Demand
    rate: float
    queued_s: float

    def scaled(self, rate: float, queued_s: float) -> _Unserved:
        """Keep the fractions `rate` and `queued_s` of the arriving and the queued work."""
        return self._replace(rate=self.rate * rate, queued_s=self.queued_s * queued_s)


class _Filling:
    """Distributes a model's demands among its pools, one pool after the other."""

    def __init__(
        self,
        pools: Mapping[str, PoolState],
        limits: ScalingLimits,
        now: float,
    ) -> None:
        self._pools, self._limits, self._now = dict(pools), limits, now

    def share(
        self, name: str, later: Sequence[str], unserved: Sequence[_Unserved]
    ) -> tuple[_Share, list[_Unserved]]:
        """The share of pool `name`, and the demand that it leaves to the `later` pools.

        `unserved`: the demand that the earlier pools have left.
        """
        pool, state = self._limits.pools[name], self._pools[name]
        mine = [u for u in unserved if name in u.demand.pools]
        movable = [u for u in mine if set(later) & set(u.demand.pools)]
        share = _Share(
            sum(u.rate for u in mine),
            sum(u.queued_s for u in mine),
            max((u.demand.oldest_wait_s for u in mine if u.queued_s), default=0.0),
        )
        helping = self._helping(name, later, unserved) if movable else 0.0
        share = self._needs(share, pool, state, helping)
        limit = state.ready if state.given_up else pool.max_replicas
        rate_left = _left(limit, share.for_rate, share.rate, sum(u.rate for u in movable))
        queue_left = _left(limit, share.for_queue, share.queued_s, sum(u.queued_s for u in movable))
        left = []
        for u in unserved:
            if u in movable:
                left.append(u.scaled(rate_left, queue_left))
            else:
                left.append(u.scaled(0.0, 0.0) if u in mine else u)
        return share, left

    def _helping(self, name: str, later: Sequence[str], unserved: Sequence[_Unserved]) -> float:
        """Work per second that ready replicas of later pools can spare for this pool's queue.

        The later pools first serve the demands that this pool cannot serve; only the rest is spare.
        """
        others = [
            u.rate
            for u in unserved
            if name not in u.demand.pools and set(later) & set(u.demand.pools)
        ]
        capacity = sum(self._pools[pool].ready * self._pools[pool].speed for pool in later)
        return max(capacity - sum(others), 0.0)

    def _needs(self, share: _Share, pool: PoolBounds, state: PoolState, helping: float) -> _Share:
        """Return the share with the replicas that it needs; `helping`: see `_helping`."""
        tuning, start_s = self._limits.tuning, state.start_s
        busy = share.rate / state.speed  # replicas that are busy on average
        spare = tuning.spare * math.sqrt(busy / pool.slots)
        for_queue = 0.0
        if share.queued_s:
            # Replica-seconds of work until a replica that is ordered now is ready.
            done_s = state.ready * start_s
            for order in () if state.given_up else state.orders:
                # Assume that an overdue start needs as long again as it is late.
                due_s = abs(start_s - (self._now - order.at))
                done_s += order.replicas * max(start_s - due_s, 0.0)
            left_s = share.queued_s + (share.rate - helping) * start_s - state.speed * done_s
            if left_s > 0:
                drain_s = max(tuning.target_wait_s, MIN_DRAIN * start_s)
                for_queue = busy + left_s / drain_s / state.speed
        if share.oldest_wait_s > max(tuning.target_wait_s, start_s) and not state.starting:
            for_queue = max(for_queue, state.ready + 1.0)  # the predictions were wrong
        for_rate = max(busy + spare, busy / tuning.utilisation)
        return share._replace(for_rate=for_rate, for_queue=for_queue)


def _left(limit: int, needed: float, here: float, movable: float) -> float:
    """The fraction of the movable demand that goes on to later pools.

    `here`: the demand that has come to this pool. `needed`: the replicas that all of it needs.
    `limit`: the replicas that the pool can have. `movable`: the part of `here` that later pools can
    serve.
    """
    excess = max(1 - limit / needed, 0.0) if needed else 0.0
    return min(excess * here / movable, 1.0) if movable else 0.0


# -- what is wanted -------------------------------------------------------------------------------


def _with_wanted(
    before: PoolState,
    share: _Share,
    name: str,
    limits: ScalingLimits,
    least: float,
    *,
    first: bool,
    now: float,
) -> PoolState:
    """The pool's state with the number of replicas that is wanted now.

    `before`: the state so far. `share`: what the pool has to serve. `least`: its part of the
    model's floor, in replicas. `first`: whether the pool is the preferred one of its model, which
    holds the warm reserve.
    """
    pool, tuning = limits.pools[name], limits.tuning
    busy = now if share.replicas else before.busy
    idle = now - busy > tuning.idle_s
    for_rate = math.ceil(share.for_rate - ROUNDING)
    if first and not idle:
        for_rate += tuning.warm_reserve
    for_queue = math.ceil(share.for_queue - ROUNDING)
    if share.queued_s > CHANCE_QUEUE_S * before.speed * before.ready:
        for_queue = max(for_queue, before.wanted)
    hold_s = max(tuning.hold_s, 2 * before.start_s)
    arriving = _with_need(before.arriving, bounded(for_rate, pool), hold_s, now)
    draining = _with_need(before.draining, bounded(for_queue, pool), tuning.target_wait_s, now)
    kept = bounded(math.ceil(least - ROUNDING), pool)
    wanted = bounded(max(arriving[0].replicas, draining[0].replicas, kept), pool)
    if not wanted and before.wanted and not idle:
        wanted = min(1, pool.max_replicas)
    return replace(
        before, wanted=wanted, busy=busy, arriving=arriving, draining=draining, kept=kept
    )


def _follower_replicas(
    follower: Follower, replicas: Mapping[str, int], load: Load, limits: ScalingLimits
) -> int:
    """The replicas that a follower needs, given the `replicas` of the pools."""
    most = follower.max_replicas
    if follower.each:
        wanted = math.ceil(load.open_requests / follower.each)
    else:
        pools = {name: limits.pools[name] for name in follower.pools}
        full = sum(pool.max_replicas * pool.speed for pool in pools.values())
        part = sum(replicas[name] * pool.speed for name, pool in pools.items()) / full
        wanted = math.ceil(most * part - ROUNDING)
    return min(max(wanted, follower.min_replicas), most)


def _with_need(
    history: tuple[ReplicasNeeded, ...], needed: int, hold_s: float, now: float
) -> tuple[ReplicasNeeded, ...]:
    """Add the number that is `needed` now to a history of needs, newest last.

    Earlier needs stay in it if they are greater and at most `hold_s` old. So the first entry is
    always the greatest need within `hold_s`, the second one the greatest need since the first, and
    so on.
    """
    kept = [need for need in history if need.replicas > needed and now - need.at <= hold_s]
    return (*kept, ReplicasNeeded(now, needed))


def _reason(before: PoolState, after: PoolState, share: _Share, pool: PoolBounds) -> str:
    """Say in words which rule changed the number of replicas, with the rule's numbers."""
    words = [f"{share.rate:.2f} s of work arrive a second"] if share.rate else ["nothing arrives"]
    if share.queued_s:
        words.append(f"{share.queued_s:.1f} s wait")
    words.append(f"{after.ready} ready at {after.speed:.2f}")
    if after.wanted > before.wanted:
        words.append(f"a start takes {after.start_s:.0f} s")
    if share.replicas > pool.max_replicas:
        words.append(f"{pool.max_replicas} is its limit")
    if after.given_up:
        words.append("its new replicas do not become ready")
    if not after.wanted:
        rule = "idle"
    elif after.wanted < before.wanted:
        rule = "the most that was needed of late"
    elif after.kept > after.needed:
        rule = "for jumps like those before"
    elif after.draining[0].replicas > after.arriving[0].replicas:
        rule = "to drain what waits"
    else:
        rule = "for what arrives"
    return f"{before.wanted} → {after.wanted} replicas ({rule}): {', '.join(words)}"
