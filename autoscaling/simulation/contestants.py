"""The policies that `octet simulate` and `bench.autoscaling` compare, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from ..load import PoolBounds, ScalingLimits
from ..policy import Jumps, PolicyState, decide
from .simulator import Policy, PolicyView


class QueuedWork:
    """Octet's own policy; a number that is None is taken from the tuning in `limits`."""

    def __init__(
        self,
        limits: ScalingLimits,
        jumps: Jumps = MappingProxyType({}),
        spare: float | None = None,
        hold_s: float | None = None,
        utilisation: float | None = None,
        late_part: float | None = None,
    ) -> None:
        """`jumps`: what the policy remembers of jumps of the rate before it begins."""
        given = limits.tuning
        tuning = replace(
            given,
            spare=given.spare if spare is None else spare,
            hold_s=hold_s or given.hold_s,
            utilisation=utilisation or given.utilisation,
            late_part=given.late_part if late_part is None else late_part,
        )
        self._limits = replace(limits, tuning=tuning)
        self._state = PolicyState().remembering(jumps, 0.0)

    @property
    def jumps(self) -> Jumps:
        """The jumps of the rate that the policy remembers."""
        return self._state.jumps

    def __call__(self, view: PolicyView, now: float) -> Mapping[str, int]:
        decision = decide(view.load, self._limits, self._state, now)
        self._state = decision.state
        return decision.replicas


class Static:
    """A policy with a fixed number of replicas.

    The first pool gets as many of them as its limit allows, the next pool the others, and so on.
    """

    def __init__(self, pools: Mapping[str, PoolBounds], replicas: int) -> None:
        self._wanted = {}
        for name, pool in pools.items():
            self._wanted[name] = min(replicas, pool.max_replicas)
            replicas -= self._wanted[name]

    def __call__(self, view: PolicyView, now: float) -> Mapping[str, int]:
        return self._wanted


def contestant(
    name: str,
    limits: ScalingLimits,
    works: Iterable[tuple[float, float]],
    seconds: float,
    start_s: float,
    jumps: Jumps = MappingProxyType({}),
    **numbers: float,
) -> Policy:
    """Make a policy by its name: `queued-work`, `static`, `ray-serve`, `keda` or `oracle`.

    `works`, `seconds` and `start_s` are for the oracle alone: time and work of each request, the
    length of the workload, and the time of a start. `jumps` is for `queued-work` alone, see
    `QueuedWork`. `numbers` tune the policy: they are keyword arguments of its constructor. Raises
    `TypeError` for a number that the constructor does not take.
    """
    from . import baselines  # imported here, because it needs Ray

    if name == "queued-work":
        return QueuedWork(limits, jumps, **numbers)
    if name == "static":
        return Static(limits.pools, int(numbers["replicas"]))
    if name == "ray-serve":
        return baselines.RayServe(limits.pools, **numbers)
    if name == "keda":
        return baselines.QueueLength(limits.pools, **numbers)
    return baselines.Oracle(limits.pools, list(works), seconds, start_s, **numbers)
