"""Forecasts of calls on the pools as they are now: when they would be granted, and when done.

The formulas are in `forecast`. This file supplies their inputs: the queue, the replicas and the
recent arrivals.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .forecast import ArrivalRate, CrowdForecast, ForecastAccuracy, TenantDemand
from .forecast import wait_s as fluid_wait_s
from .grants import Grants
from .protocol import AdmissionRequest, Pools

IDLE_S = 60.0  # arrival rates without an event for so long are forgotten
FEW_TENANTS = 64  # so many are read anew for each forecast
READING_S = 0.1  # with more tenants, a reading of them is used for so long


class Forecast(NamedTuple):
    """The predicted duration of a call, in two parts.

    `wait_s`: seconds until its last image has a slot. `service_s`: seconds from then to its end.
    """

    wait_s: float
    service_s: float


class CallForecasts:
    """Forecasts for new calls; learns from the calls that have ended."""

    def __init__(self, grants: Grants) -> None:
        self._grants = grants
        self._rates: dict[str, dict[str, ArrivalRate]] = {}  # arriving work, by pool and tenant
        self._accuracy: dict[Pools, ForecastAccuracy] = {}  # by the pools of a call's images
        self._crowds: dict[Pools, CrowdForecast] = {}  # the last readings of many tenants

    def count_arrival(self, request: AdmissionRequest, now: float) -> None:
        """Count an admitted call in its tenant's rates of arriving work."""
        for pool in {pool for image in request.images for pool in image.pools}:
            rates = self._rates.setdefault(pool, {})
            rate = rates.setdefault(request.tenant, ArrivalRate())
            rate.add(sum(i.work_s for i in request.images if pool in i.pools), now)

    def learn(self, pools: Pools, predicted_s: float, took_s: float) -> None:
        """Compare the forecast of a call for these pools with the time that it took."""
        self._accuracy.setdefault(pools, ForecastAccuracy()).learn(predicted_s, took_s)

    def forget(self, now: float, passed_s: float) -> None:
        """Let past forecast errors fade, because `passed_s` seconds have passed.

        Arrival rates without an arrival for `IDLE_S` are dropped.
        """
        for accuracy in self._accuracy.values():
            accuracy.fade(passed_s)
        for rates in self._rates.values():
            for tenant in [name for name, rate in rates.items() if now - rate.at > IDLE_S]:
                del rates[tenant]
        for pools in [p for p, read in self._crowds.items() if now - read.read_at > IDLE_S]:
            del self._crowds[pools]

    def expected_s(self, pools: Pools, predicted_s: float) -> float:
        """The mean time in seconds that calls with this forecast have taken lately."""
        return self._accuracy.get(pools, ForecastAccuracy()).expected(predicted_s)

    def at_most_s(self, pools: Pools, forecast: Forecast) -> float:
        """The most seconds that a call with this forecast should take until it is done.

        For a call that must queue, 99 of 100 calls take at most that long, as learned from earlier
        calls for the same pools. For a call that finds a free slot, the forecast itself is
        returned, so errors of earlier forecasts cannot cause its refusal.
        """
        if not forecast.wait_s:
            return forecast.service_s
        return self._accuracy.get(pools, ForecastAccuracy()).at_most(sum(forecast))

    def forecast(
        self, request: AdmissionRequest, now: float, *, own_backlog: bool = True
    ) -> Forecast | None:
        """Forecast when the call's images would have slots, and when the call would be done.

        Returns None if the call has no images or none of its pools has a replica. With
        `own_backlog=False` the forecast assumes that the tenant has nothing else waiting.
        """
        if not request.images:
            return None
        pools = request.images[0].pools
        speed, slots, running = self._capacity(pools)
        if not speed:
            return None
        queue, coming = self._grants.queue, len(request.images)
        wait_s = 0.0
        if running + coming > slots or any(map(queue.waits_for, pools)):
            own_s = queue.backlog_s(request.flow, pools) if own_backlog else 0.0
            if request.lane == "request":  # it comes before the tenant's jobs
                own_s = max(own_s - self._grants.waiting_jobs(request.tenant)[1], 0.0)
            wait_s = self.wait_s(request, own_s + request.work_s, now)
        return Forecast(wait_s, self._service_s(request, full=wait_s > 0))

    def _service_s(self, request: AdmissionRequest, *, full: bool) -> float:
        """Seconds from the grant of the call's images to the call's end.

        If the pools are `full`, the images are assumed to be spread over all of them. Otherwise all
        are assumed to run in the first pool that has a free slot.
        """
        pools = request.images[0].pools
        if not full:
            pools = tuple(p for p in pools if self._grants.free_slots(p) > 0)[:1] or pools
        speed, slots, running = self._capacity(pools)
        images = min(slots, running + len(request.images))
        return self._generation_s(request, pools, images, speed)

    def alone_s(self, request: AdmissionRequest) -> float:
        """Seconds that the call takes in the fastest of its pools if nothing else runs there."""
        speeds = {pool: self._capacity((pool,))[0] for pool in request.images[0].pools}
        coming = len(request.images)
        return min(
            self._generation_s(request, (pool,), coming, speed)
            for pool, speed in speeds.items()
            if speed
        )

    def _generation_s(
        self, request: AdmissionRequest, pools: Pools, images: int, speed: float
    ) -> float:
        """Seconds of the call's largest image while `images` images run in these pools."""
        replicas = sum(map(self._grants.living, pools))
        return max(image.work_s for image in request.images) * max(replicas, images) / speed

    def wait_s(self, request: AdmissionRequest, own_s: float, now: float) -> float:
        """Seconds until `own_s` seconds of the tenant's own work have been granted."""
        pools, flow = request.images[0].pools, request.flow
        weight, (speed, _, _) = self._grants.queue.weight(flow), self._capacity(pools)
        known = self._crowds.get(pools)
        if known is None or not 0 <= now - known.read_at < READING_S:
            demands = self._demands(pools, now)
            if len(demands) <= FEW_TENANTS:
                self._crowds.pop(pools, None)
                demands.pop(flow, None)
                return fluid_wait_s(own_s, weight, list(demands.values()), speed)
            known = self._crowds[pools] = CrowdForecast(demands, now)
        return known.wait_s(flow, own_s, weight, speed)

    def _demands(self, pools: Pools, now: float) -> dict[str, TenantDemand]:
        """The backlog of every tenant for these pools, and the work that arrives for them."""
        queue = self._grants.queue
        backlogs = queue.backlogs(pools)
        arriving = dict.fromkeys(backlogs, 0.0)
        for pool in pools:
            for name, rate in self._rates.get(pool, {}).items():
                arriving[name] = max(arriving.get(name, 0.0), rate.per_s(now))
        return {
            name: TenantDemand(queue.weight(name), backlogs.get(name, 0.0), per_s)
            for name, per_s in arriving.items()
        }

    def grants_in_s(self, request: AdmissionRequest, images: int) -> float | None:
        """Seconds until `images` of the waiting images have been granted slots.

        None if no image waits, or if the call's pools have no replica.
        """
        pools = request.images[0].pools
        speed, _, _ = self._capacity(pools)
        depth = self._grants.queue_depth
        if not (speed and depth):
            return None
        return images * sum(self._grants.queue.backlogs(pools).values()) / depth / speed

    def _capacity(self, pools: Iterable[str]) -> tuple[float, int, int]:
        """Total speed, number of slots, and slots in use of these pools' staying replicas."""
        speed, slots, running = 0.0, 0, 0
        for pool in pools:
            staying = self._grants.staying(pool)
            slots += staying.slots
            running += staying.slots - self._grants.free_slots(pool)
            speed += staying.speed
        return speed, slots, running
