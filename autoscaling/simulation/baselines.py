"""The baseline policies of the simulator, with which Octet's own policy is compared.

The baselines are Ray Serve's own policy, the queue-length rule of KEDA and Kubernetes, and an
oracle. They serve for measurements only.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from ray.serve import autoscaling_policy
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from ..load import PoolBounds
from .simulator import TICK_S, PolicyView


class _Now:
    """A simulated clock that replaces the `time` module in Ray's policy, whose delays read it."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return self.now


class RayServe:
    """The installed `replica_queue_length_autoscaling_policy`, with Serve's factors and delays.

    The policy is told the number of waiting and running requests as Serve would count them if they
    waited in its handles: as their mean over the last `look_back_period_s`.
    `target_ongoing_requests` and `min_replicas` hold for the first pool; other pools have the same
    target per slot, and no minimum. The defaults are Serve's own.
    """

    def __init__(
        self,
        pools: Mapping[str, PoolBounds],
        target_ongoing_requests: float = 2.0,
        upscale_delay_s: float = 30.0,
        downscale_delay_s: float = 600.0,
        min_replicas: float = 0.0,
        look_back_period_s: float = 30.0,
        upscaling_factor: float = 1.0,
        downscaling_factor: float = 1.0,
    ) -> None:
        self._pools = pools = _with_least(pools, int(min_replicas))
        self._clock = _Now()
        (first, *_) = pools.values()
        self._configs = {
            name: AutoscalingConfig(
                min_replicas=pool.min_replicas,
                max_replicas=pool.max_replicas,
                target_ongoing_requests=target_ongoing_requests * pool.slots / first.slots,
                upscale_delay_s=upscale_delay_s,
                downscale_delay_s=downscale_delay_s,
                metrics_interval_s=min(10.0, look_back_period_s / 2),
                look_back_period_s=look_back_period_s,
                upscaling_factor=upscaling_factor,
                downscaling_factor=downscaling_factor,
            )
            for name, pool in pools.items()
        }
        self._policy = autoscaling_policy._apply_autoscaling_config(
            autoscaling_policy.replica_queue_length_autoscaling_policy
        )
        self._wanted = {name: pool.min_replicas for name, pool in pools.items()}
        self._states: dict[str, dict[str, Any]] = {name: {} for name in pools}
        self._counts: dict[str, deque[int]] = {
            name: deque(maxlen=round(look_back_period_s / TICK_S)) for name in pools
        }

    def __call__(self, view: PolicyView, now: float) -> Mapping[str, int]:
        self._clock.now = now
        kept, autoscaling_policy.time = autoscaling_policy.time, self._clock
        try:
            for name, pool in self._pools.items():
                requests = _requests(name, self._pools, self._wanted, view)
                self._wanted[name] = self._decide(name, pool, requests, view, now)
        finally:
            autoscaling_policy.time = kept
        return self._wanted

    def _decide(
        self, name: str, pool: PoolBounds, requests: int, view: PolicyView, now: float
    ) -> int:
        counts, config = self._counts[name], self._configs[name]
        counts.append(requests)
        context = AutoscalingContext(
            deployment_id=None,
            deployment_name=name,
            app_name=None,
            current_num_replicas=view.load.supplies[name].ready,
            target_num_replicas=self._wanted[name],
            running_replicas=[],
            total_num_requests=sum(counts) / len(counts),
            total_queued_requests=0.0,
            aggregated_metrics={},
            raw_metrics={},
            capacity_adjusted_min_replicas=pool.min_replicas,
            capacity_adjusted_max_replicas=pool.max_replicas,
            policy_state=self._states[name],
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now,
            config=config,
        )
        wanted, self._states[name] = self._policy(context)
        return int(min(max(math.ceil(wanted), pool.min_replicas), pool.max_replicas))


def _requests(
    name: str, pools: Mapping[str, PoolBounds], wanted: Mapping[str, int], view: PolicyView
) -> int:
    """The requests of pool `name`, as the baselines count them.

    Requests that run in the pool count. Waiting requests count for one pool only: the first pool
    whose `wanted` replicas are below its limit, or the last pool if all are at their limits.
    """
    *_, last = pools
    growing = (other for other, pool in pools.items() if wanted[other] < pool.max_replicas)
    return view.running[name] + (view.waiting if name == next(growing, last) else 0)


def _with_least(pools: Mapping[str, PoolBounds], least: int) -> Mapping[str, PoolBounds]:
    """The pools, of which the first has at least so many replicas, or as many as it may have."""
    name, *_ = pools
    least = min(max(least, pools[name].min_replicas), pools[name].max_replicas)
    return {**pools, name: replace(pools[name], min_replicas=least)}


class QueueLength:
    """KEDA's rule on the number of waiting and running requests, applied by Kubernetes' HPA.

    Every 15 s the HPA sets replicas = ⌈requests ÷ `target`⌉, but changes nothing if that is within
    10 % of the present number. The HPA adds at most as many replicas as there are, or four if that
    is more. When the number falls, it stays at the highest that the rule gave within
    `stabilisation_s`. KEDA itself looks every 30 s. It sets zero replicas after `cooldown_s`
    without requests, and one replica with the first request.

    `target` and `min_replicas` hold for the first pool; other pools have the same target per slot.
    """

    EVERY_S, POLL_S, TOLERANCE = 15.0, 30.0, 0.1

    def __init__(
        self,
        pools: Mapping[str, PoolBounds],
        target: float = 2.0,
        stabilisation_s: float = 300.0,
        cooldown_s: float = 300.0,
        min_replicas: float = 0.0,
    ) -> None:
        self._pools = pools = _with_least(pools, int(min_replicas))
        (first, *_) = pools.values()
        self._targets = {n: target * pool.slots / first.slots for n, pool in pools.items()}
        self._stabilisation_s, self._cooldown_s = stabilisation_s, cooldown_s
        self._wanted = {name: pool.min_replicas for name, pool in pools.items()}
        self._results: dict[str, deque[tuple[float, int]]] = {name: deque() for name in pools}
        self._active = dict.fromkeys(pools, -math.inf)

    def __call__(self, view: PolicyView, now: float) -> Mapping[str, int]:
        for name, pool in self._pools.items():
            requests = _requests(name, self._pools, self._wanted, view)
            wanted = self._wanted[name]
            if now % self.POLL_S == 0 and requests:
                self._active[name] = now
                wanted = max(wanted, 1)
            if wanted and now % self.EVERY_S == 0:
                wanted = self._hpa(name, requests, wanted, now)
            if now - self._active[name] > self._cooldown_s:
                wanted = 0
            self._wanted[name] = min(max(wanted, pool.min_replicas), pool.max_replicas)
        return self._wanted

    def _hpa(self, name: str, requests: int, wanted: int, now: float) -> int:
        """The HPA's next number of replicas, given the present number `wanted`."""
        target = self._targets[name]
        near = abs(requests / (target * wanted) - 1) <= self.TOLERANCE
        result = wanted if near else max(math.ceil(requests / target), 1)
        recent = self._results[name]
        recent.append((now, result))
        while now - recent[0][0] > self._stabilisation_s:
            recent.popleft()
        if result < wanted:
            return min(max(replicas for _, replicas in recent), wanted)
        return min(result, max(2 * wanted, wanted + 4))


class Oracle:
    """A policy that knows every request in advance, and orders replicas in time for it.

    At any time the oracle has replicas for the mean rate of work within a window of `window_s`
    seconds around that time, and a reserve for chance: `spare` standard deviations of the number of
    busy replicas. The oracle keeps a replica that will be needed again within twice the time of a
    start. `window_s` and `spare` are tuned by hand. So the oracle's cost shows the value of knowing
    the future, but a cheaper policy may exist.
    """

    def __init__(
        self,
        pools: Mapping[str, PoolBounds],
        arrivals: Sequence[tuple[float, float]],
        seconds: float,
        start_s: float,
        spare: float = 2.0,
        window_s: float = 60.0,
    ) -> None:
        """`arrivals`: the time and the work of each request, in order of time.

        `seconds`: the length of the workload. `start_s`: seconds from an order to a ready replica.
        """
        self._pools = pools
        most = sum(pool.max_replicas for pool in pools.values())
        (pool, *_) = pools.values()
        times = [at for at, _ in arrivals]
        sums = [0.0, *accumulate(work for _, work in arrivals)]
        last = int(seconds / TICK_S) + 1
        needs = []
        for tick in range(last):
            at = tick * TICK_S
            work = (
                sums[bisect_left(times, at + window_s / 2)]
                - sums[bisect_left(times, at - window_s / 2)]
            )
            busy = work / window_s  # reference replicas that are busy on average
            need = math.ceil(busy + spare * math.sqrt(busy / pool.slots) - 1e-9)
            needs.append(min(max(need, pool.min_replicas), most))
        ahead = math.ceil(start_s / TICK_S)
        # A replica is ordered just in time to be ready. It is kept if it is needed again within
        # another start's time, because a new start would cost as much.
        ordered, kept = most_ahead(needs, ahead), most_ahead(needs, 2 * ahead)
        self._wanted: list[int] = []
        for now, later in zip(ordered, kept, strict=True):
            before = self._wanted[-1] if self._wanted else 0
            self._wanted.append(max(now, min(before, later)))

    def __call__(self, view: PolicyView, now: float) -> Mapping[str, int]:
        tick = int(now / TICK_S)
        left, wanted = self._wanted[min(tick, len(self._wanted) - 1)], {}
        for name, pool in self._pools.items():
            wanted[name] = min(math.ceil(left / pool.speed), pool.max_replicas)
            left = max(left - math.floor(wanted[name] * pool.speed), 0)
        return wanted


def most_ahead(values: Sequence[int], ticks: int) -> list[int]:
    """For each value, the greatest of it and the next `ticks` values."""
    found, window = [0] * len(values), deque[int]()
    for i in range(len(values) - 1, -1, -1):
        while window and values[window[-1]] <= values[i]:
            window.pop()
        window.append(i)
        if window[0] > i + ticks:
            window.popleft()
        found[i] = values[window[0]]
    return found
