"""The `ray-default` baseline: Ray Serve's own policy decides, on Octet's requests.

The Dispatcher only reports how many requests there are. `autoscaling.ray_default` passes these
numbers to Ray Serve's policy.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from autoscaling.report import ScalingReport

from ..deployments import generator_deployment
from .scaling import Scaling, by_deployment


class RayDefaultScaling(Scaling):
    """Decides nothing, and tells Ray Serve how many requests there are."""

    def decide(self, now: float, unix_s: float | None = None) -> Mapping[str, str]:
        """Decide nothing; returns no reasons."""
        return {}

    def report(self) -> ScalingReport:
        """The number of running and waiting requests of each pool, and its fewest replicas.

        A waiting image counts for the first of its pools that could have a replica.
        """
        waiting = Counter(
            next(filter(self.may_come, image.pools), image.pools[0]) for image in self._grants.queue
        )
        requests = {
            generator_deployment(pool): float(waiting[pool] + self._grants.running_in(pool))
            for pool in self.limits.pools
        }
        return ScalingReport(at_least=by_deployment(self.replicas, self.limits), requests=requests)
