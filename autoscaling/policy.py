"""How many replicas each pool should have.

A demand names the pools that may serve it; a model's pools are filled in order of preference, and
what is too much for one goes on to the next. A pool whose replicas do `speed` seconds of work a
second needs

- for what arrives: rate ÷ speed, plus room for the chance by which images meet, which grows with
  the square root of their number, and for the usual rise within a start's time (`rates`);
- for what waits: enough to drain, within `target_wait_s` or an eighth of a start's time if that is
  longer, what will be left when a replica that is ordered now is ready. A queue that is gone by
  then orders nothing; what was ordered for one stays until it is gone.

*Wanted* replicas are *ready* or *starting*. Wanted goes up at once, and down to the most that was
needed within `hold_s` and within two starts, so neither chance nor a short pause releases anything;
to zero when a pool has had nothing to do for `idle_s`. Replicas that do not come in time are not
waited for: until they do, their share goes to the next pool.

Time is an argument, in seconds on any steady clock.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from .load import Demand, Follower, Load, PoolBounds, ScalingLimits
from .pool_state import PoolState, ReplicaOrder, ReplicasNeeded, bounded, updated
from .rates import Rises, Sample, Samples, rates, recent_rate, updated_rises, with_sample

PAUSE_S = 10.0  # without a decision for so long, nothing is known of the time between
QUEUE_S = 1.0  # a queue that lasts no longer is chance
DRAIN = 1 / 8  # of a start's time, at least: for less, replicas would start for moments
ROUNDING = 1e-6  # of a replica


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What `decide` remembers."""

    at: float = -math.inf
    samples: Mapping[tuple[str, ...], Samples] = field(default_factory=dict)
    rises: Mapping[str, Rises] = field(default_factory=dict)  # by model
    pools: Mapping[str, PoolState] = field(default_factory=dict)
    followers: Mapping[str, tuple[ReplicasNeeded, ...]] = field(default_factory=dict)


class ScalingDecision(NamedTuple):
    """Replicas of every pool and follower; `reasons`: of those for which it changed."""

    replicas: Mapping[str, int]
    state: PolicyState
    reasons: Mapping[str, str]


class _Share(NamedTuple):
    """What a pool has to serve, and the replicas that it takes, not rounded."""

    rate: float = 0.0  # work a second
    queued_s: float = 0.0
    oldest_wait_s: float = 0.0
    for_rate: float = 0.0
    for_queue: float = 0.0

    @property
    def replicas(self) -> float:
        return max(self.for_rate, self.for_queue)


def decide(load: Load, limits: ScalingLimits, state: PolicyState, now: float) -> ScalingDecision:
    """Replicas to run from now on, within their bounds whatever the load says."""
    mean_s = limits.tuning.hold_s
    if now < state.at or now - state.at > PAUSE_S:
        state = _resumed(state, now)
    samples = dict(state.samples)
    for d in load.demands:
        new = Sample(now, d.arrived_s, d.squares)
        # Nobody had asked for these pools by the last decision, if there was one.
        first = (Sample(state.at, 0.0, 0.0),) if state.at > -math.inf else ()
        samples[d.pools] = with_sample(samples.get(d.pools, first), new, mean_s)
    pools = {
        name: updated(state.pools.get(name), pool, load.supplies.get(name), limits.tuning, now)
        for name, pool in limits.pools.items()
    }
    rises, reasons = {}, {}
    for model in dict.fromkeys(pool.model for pool in limits.pools.values()):
        names = preferred(model, limits)
        demands = [d for d in load.demands if set(d.pools) & set(names)]
        theirs = [samples[d.pools] for d in demands]
        arriving, known = rates(theirs, mean_s), state.rises.get(model, Rises())
        start_s = pools[names[0]].start_s
        rises[model] = updated_rises(
            known, sum(arriving), recent_rate(theirs, mean_s), start_s, now
        )
        rise = rises[model].usual / sum(arriving) if sum(arriving) else 0.0
        filling = _Filling(pools, limits, rise, now)
        unserved = [
            _Unserved(d, rate, d.queued_s) for d, rate in zip(demands, arriving, strict=True)
        ]
        for place, name in enumerate(names):
            before = pools[name]
            share, unserved = filling.share(name, names[place + 1 :], unserved)
            if name in load.supplies:
                after = _wanting(before, share, name, limits, first=not place, now=now)
                pools[name] = after
                if after.wanted != before.wanted:
                    reasons[name] = _reason(before, after, share, limits.pools[name])
    replicas = {name: pool.wanted for name, pool in pools.items()}
    followers = {}
    for name, follower in limits.followers.items():
        wanted = _following(follower, replicas, load, limits)
        history = state.followers.get(name, ())
        followers[name] = _held(history, wanted, limits.tuning.hold_s, now)
    for name, history in followers.items():
        replicas[name] = wanted = history[0].replicas
        last = state.followers.get(name)
        if last and last[0].replicas != wanted:
            reasons[name] = f"{last[0].replicas} → {wanted} replicas (along with what it serves)"
    return ScalingDecision(replicas, PolicyState(now, samples, rises, pools, followers), reasons)


def preferred(model: str, limits: ScalingLimits) -> list[str]:
    """A model's pools, best first."""
    names = [name for name, pool in limits.pools.items() if pool.model == model]
    if all(limits.pools[name].usd_h for name in names):
        names.sort(key=lambda name: limits.pools[name].usd_h / limits.pools[name].speed)
    return names


def _resumed(state: PolicyState, now: float) -> PolicyState:
    """After a pause, or a clock that was set: what is wanted stays until more is known."""
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
        return PolicyState(pools=pools, followers=followers)
    return replace(state, pools=pools, followers=followers)


# -- what is needed -------------------------------------------------------------------------------


class _Unserved(NamedTuple):
    """What of one demand no pool has taken over yet: work per second, and queued work."""

    demand: Demand
    rate: float
    queued_s: float

    def scaled(self, rate: float, queued_s: float) -> _Unserved:
        return self._replace(rate=self.rate * rate, queued_s=self.queued_s * queued_s)


class _Filling:
    """Shares a model's demands out among its pools, one pool after the other."""

    def __init__(
        self,
        pools: Mapping[str, PoolState],
        limits: ScalingLimits,
        rise: float,
        now: float,
    ) -> None:
        """`rise`: the usual rise within a start's time, for each second of arriving work."""
        self._pools, self._limits = dict(pools), limits
        self._rise, self._now = rise, now

    def share(
        self, name: str, later: Sequence[str], unserved: Sequence[_Unserved]
    ) -> tuple[_Share, list[_Unserved]]:
        """The share of pool `name`, and what it leaves to the pools that come `later`."""
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
        """Work per second that the later pools can spare for a queue that they share."""
        others = [
            u.rate
            for u in unserved
            if name not in u.demand.pools and set(later) & set(u.demand.pools)
        ]
        there = sum(self._pools[pool].ready * self._pools[pool].speed for pool in later)
        return max(there - sum(others), 0.0)

    def _needs(self, share: _Share, pool: PoolBounds, state: PoolState, helping: float) -> _Share:
        tuning, start_s = self._limits.tuning, state.start_s
        always = share.rate / state.speed  # replicas that are at work at any time
        chance = tuning.spare * math.sqrt(always / pool.slots)
        spare = math.hypot(chance, self._rise * always)
        for_queue = 0.0
        if share.queued_s:
            # What replicas will have done when one that is ordered now is ready.
            done_s = state.ready * start_s
            for order in () if state.given_up else state.orders:
                # Assume that an overdue start needs as long again as it is late.
                due_s = abs(start_s - (self._now - order.at))
                done_s += order.replicas * max(start_s - due_s, 0.0)
            left_s = share.queued_s + (share.rate - helping) * start_s - state.speed * done_s
            if left_s > 0:
                drain_s = max(tuning.target_wait_s, DRAIN * start_s)
                for_queue = always + left_s / drain_s / state.speed
        if share.oldest_wait_s > max(tuning.target_wait_s, start_s) and not state.starting:
            for_queue = max(for_queue, state.ready + 1.0)  # whatever was predicted
        for_rate = max(always + spare, always / tuning.utilisation)
        return share._replace(for_rate=for_rate, for_queue=for_queue)


def _left(limit: int, needed: float, here: float, movable: float) -> float:
    """The part of the movable demand that goes on to later pools.

    `needed`: the replicas that serving everything `here` would take; `limit`: those that there are.
    """
    excess = max(1 - limit / needed, 0.0) if needed else 0.0
    return min(excess * here / movable, 1.0) if movable else 0.0


# -- what is wanted -------------------------------------------------------------------------------


def _wanting(
    before: PoolState, share: _Share, name: str, limits: ScalingLimits, *, first: bool, now: float
) -> PoolState:
    """`first`: of its model's pools."""
    pool, tuning = limits.pools[name], limits.tuning
    busy = now if share.replicas else before.busy
    idle = now - busy > tuning.idle_s
    for_rate = math.ceil(share.for_rate - ROUNDING)
    if first and not idle:
        for_rate += tuning.warm_reserve
    for_queue = math.ceil(share.for_queue - ROUNDING)
    if share.queued_s > QUEUE_S * before.speed * before.ready:
        for_queue = max(for_queue, before.wanted)
    hold_s = max(tuning.hold_s, 2 * before.start_s)
    arriving = _held(before.arriving, bounded(for_rate, pool), hold_s, now)
    draining = _held(before.draining, bounded(for_queue, pool), tuning.target_wait_s, now)
    wanted = max(arriving[0].replicas, draining[0].replicas)
    if not wanted and before.wanted and not idle:
        wanted = min(1, pool.max_replicas)
    return replace(before, wanted=wanted, busy=busy, arriving=arriving, draining=draining)


def _following(
    follower: Follower, replicas: Mapping[str, int], load: Load, limits: ScalingLimits
) -> int:
    most = follower.max_replicas
    if follower.each:
        wanted = math.ceil(load.open_requests / follower.each)
    else:
        pools = {name: limits.pools[name] for name in follower.pools}
        full = sum(pool.max_replicas * pool.speed for pool in pools.values())
        part = sum(replicas[name] * pool.speed for name, pool in pools.items()) / full
        wanted = math.ceil(most * part - ROUNDING)
    return min(max(wanted, follower.min_replicas), most)


def _held(
    history: tuple[ReplicasNeeded, ...], needed: int, hold_s: float, now: float
) -> tuple[ReplicasNeeded, ...]:
    """The first is the most that was needed within `hold_s`, and so on of what came after it."""
    kept = [then for then in history if then.replicas > needed and now - then.at <= hold_s]
    return (*kept, ReplicasNeeded(now, needed))


def _reason(before: PoolState, after: PoolState, share: _Share, pool: PoolBounds) -> str:
    """Which rule it was, and its numbers, in words."""
    words = [f"{share.rate:.2f} s of work arrive a second"] if share.rate else ["nothing arrives"]
    if share.queued_s:
        words.append(f"{share.queued_s:.1f} s wait")
    words.append(f"{after.ready} ready at {after.speed:.2f}")
    if after.wanted > before.wanted:
        words.append(f"a start takes {after.start_s:.0f} s")
    if share.replicas > pool.max_replicas:
        words.append(f"{pool.max_replicas} is its limit")
    if after.given_up:
        words.append("its replicas do not come")
    if not after.wanted:
        rule = "idle"
    elif after.wanted < before.wanted:
        rule = "the most that was needed of late"
    elif after.draining[0].replicas > after.arriving[0].replicas:
        rule = "to drain what waits"
    else:
        rule = "for what arrives"
    return f"{before.wanted} → {after.wanted} replicas ({rule}): {', '.join(words)}"
