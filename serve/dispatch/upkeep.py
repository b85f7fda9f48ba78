"""The Dispatcher's periodic work: leases expire, replicas are decided on, metrics are reported."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from ..usage.months import month_of
from .admission import Admission
from .dispatcher_metrics import PoolMetrics, TenantMetrics
from .grants import Grants
from .metering import Metering
from .overview import overview
from .protocol import Timing
from .scaling import Scaling

log = logging.getLogger("ray.serve")


class Upkeep:
    """The work that is due with every heartbeat."""

    def __init__(
        self,
        grants: Grants,
        admission: Admission,
        metering: Metering,
        scaling: Scaling,
        tenant_metrics: TenantMetrics,
        timing: Timing,
    ) -> None:
        self._grants, self._admission = grants, admission
        self._metering, self._scaling = metering, scaling
        self._tenant_metrics, self._pool_metrics = tenant_metrics, PoolMetrics()
        self._timing = timing

    async def run(
        self,
        end_session: Callable[[str], None],
        then: Callable[[float], None],
        may_decide: Callable[[float], bool],
    ) -> None:
        """Do the periodic work once per heartbeat, for ever.

        `end_session` is called for every session whose lease has expired. `then` is called at the
        end of each round, with the seconds by which the round began too late. `may_decide` says
        whether the number of replicas may be decided at a time.
        """
        heartbeat_s = self._timing.heartbeat_s
        before, was_late = time.monotonic(), False
        while True:
            await asyncio.sleep(heartbeat_s)
            now, last, before = time.monotonic(), before, time.monotonic()
            late = now - last > 2 * heartbeat_s
            # After a pause of this process, heartbeats that have waited arrive before leases
            # expire. If the loop is late again and again, it is busy and did not pause.
            if not late or was_late:
                self.expire(now, end_session)
            was_late = late
            self._metering.turn_month(month_of(time.time()))
            self.scale(now, decide=may_decide(now))
            then(max(now - last - heartbeat_s, 0.0))
            self._tenant_metrics.report(overview(self._admission, self._grants))

    def expire(self, now: float, end_session: Callable[[str], None]) -> None:
        """End silent sessions and replicas, and waive stopped images that no Generator reports.

        Also lets what was learned from past calls fade.
        """
        self._grants.expire_replicas(now)
        for session in self._grants.expire(now):
            log.warning("session %s fell silent: its slots are free", session)
            end_session(session)
        for usage in self._grants.give_up(now):
            self._metering.waive(usage)
        self._admission.forget(now, self._timing.heartbeat_s)

    def scale(self, now: float, *, decide: bool) -> None:
        """Decide on the number of replicas if `decide`, and report the metrics of every pool.

        Logs errors instead of raising them, because the loop that expires leases must go on.
        """
        try:
            for name, reason in self._scaling.decide(now, time.time()).items() if decide else ():
                log.info("%s: %s", name, reason)
            self._pool_metrics.report(self._scaling, self._grants, now)
        except Exception:  # after any error the numbers wanted before stay in force
            log.exception("autoscaling: no decision")
