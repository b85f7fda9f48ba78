"""The policies that `octet simulate` and `bench.autoscaling` compare, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..load import PoolBounds, ScalingLimits
from ..policy import PolicyState, decide
from .simulator import Policy, PolicyView


class QueuedWork:
    """Ours; what is None is as in `limits`."""

    def __init__(
        self,
        limits: ScalingLimits,
        spare: float | None = None,
        hold_s: float | None = None,
        utilisation: float | None = None,
    ) -> None:
        kept = limits.tuning
        tuning = replace(
            kept,
            spare=kept.spare if spare is None else spare,
            hold_s=hold_s or kept.hold_s,
            utilisation=utilisation or kept.utilisation,
        )
        self._limits = replace(limits, tuning=tuning)
        self._state = PolicyState()

    def __call__(self, view: PolicyView, now: float) -> Mapping[str, int]:
        decision = decide(view.load, self._limits, self._state, now)
        self._state = decision.state
        return decision.replicas


class Static:
    """Always so many replicas, of the first pool as long as it has them."""

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
    **numbers: float,
) -> Policy:
    """`works`: times and work of all requests, and `start_s`, for the oracle alone.

    `numbers` are what a policy is tuned by: the names of its constructor's arguments. Raises
    `TypeError` for others.
    """
    from . import baselines  # needs Ray

    if name == "queued-work":
        return QueuedWork(limits, **numbers)
    if name == "static":
        return Static(limits.pools, int(numbers["replicas"]))
    if name == "ray-serve":
        return baselines.RayServe(limits.pools, **numbers)
    if name == "keda":
        return baselines.QueueLength(limits.pools, **numbers)
    return baselines.Oracle(limits.pools, list(works), seconds, start_s, **numbers)
