"""How many replicas the Dispatcher wants: the autoscaling policy, told what queue and replicas say.

Without clock, network or Ray; `Dispatcher` calls `decide` with every heartbeat and passes on
`reported` to Ray Serve, where `autoscaling.ray_policy` takes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean

from autoscaling.load import Demand, Load, PolicyTuning, ScalingLimits, Supply
from autoscaling.policy import PolicyState, decide

from .admission import Admission
from .grants import Grants
from .protocol import Pools

SEEN_S = 3.0  # until Ray Serve has certainly been told
GENERATOR = "Generator-"  # and its pool: a deployment's name


class Scaling:
    """`began`: when this process began to count what arrives.

    `ours`: else Ray Serve's own policy decides, and is told how many requests there are.
    """

    def __init__(
        self,
        grants: Grants,
        admission: Admission,
        limits: ScalingLimits,
        began: float,
        *,
        ours: bool = True,
    ) -> None:
        self._grants, self._admission = grants, admission
        self.limits, self._began, self._ours = limits, began, ours
        self._state = PolicyState(at=began)
        self._settled = False  # what was there before this process would have been heard
        # Wanted, of every pool and follower.
        self.replicas: Mapping[str, int] = {n: p.min_replicas for n, p in limits.pools.items()}
        self._recent: dict[str, list[tuple[float, int]]] = {}  # of each pool, what was wanted
        self.reasons: dict[str, str] = {}  # of each pool's last change
        self.placeable = frozenset(limits.pools)  # by the nodes that are there

    def tune(self, tuning: PolicyTuning) -> None:
        self.limits = replace(self.limits, tuning=tuning)

    def decide(self, now: float) -> Mapping[str, str]:
        """Decide anew; returns the reasons of the pools for which it changed."""
        if not self._ours:
            return {}
        decision = decide(self._load(now), self.limits, self._state, now)
        self._state, self.replicas = decision.state, decision.replicas
        self.reasons |= decision.reasons
        self._settled = now - self._began >= self.limits.tuning.hold_s
        if self._settled:
            for pool in self.limits.pools:
                self._keep(pool, decision.replicas[pool], now)
        return decision.reasons

    def _keep(self, pool: str, replicas: int, now: float) -> None:
        """Ray Serve may not see what was wanted for a moment only, and stops nothing then."""
        self._recent[pool] = [
            (at, n) for at, n in self._recent.get(pool, ()) if now - at <= SEEN_S and n > replicas
        ]
        most = max((n for _, n in self._recent[pool]), default=replicas)
        self._recent[pool].append((now, replicas))
        self._grants.keep(pool, most, now)

    def may_come(self, pool: str) -> bool:
        """Whether there is a node that could hold a replica, or one may still be added."""
        known = self._state.pools.get(pool)
        added = self.limits.tuning.node_wait_s > 0
        return pool in self.placeable or (added and not (known and known.given_up))

    def reported(self) -> dict[str, float]:
        """For Ray Serve: replicas of each deployment, or requests where it decides itself.

        At first only the fewest that there are to be: others may be there or be about to start.
        """
        kind = "replicas" if self._settled else "least"
        replicas = {
            f"{kind}/{GENERATOR if name in self.limits.pools else ''}{name}": float(n)
            for name, n in self.replicas.items()
        }
        if self._ours:
            return replicas
        requests = self._requests()
        return replicas | {f"requests/{GENERATOR}{pool}": n for pool, n in requests.items()}

    def _requests(self) -> dict[str, float]:
        """That run in each pool, or wait for it as the first of theirs that may come."""
        waiting = Counter(
            next(filter(self.may_come, item.pools), item.pools[0]) for item in self._grants.queue
        )
        return {p: float(waiting[p] + self._grants.running_in(p)) for p in self.limits.pools}

    def _load(self, now: float) -> Load:
        queued: dict[Pools, float] = {}
        since: dict[Pools, float] = {}
        for item in self._grants.queue:  # by arrival
            queued[item.pools] = queued.get(item.pools, 0.0) + item.work_s
            since.setdefault(item.pools, item.what.since)
        arrived = self._admission.arrived
        demands = []
        for pools in {*arrived, *queued}:
            work_s, squares = arrived.get(pools, (0.0, 0.0))
            wait_s = now - since.get(pools, now)
            demands.append(Demand(pools, work_s, squares, queued.get(pools, 0.0), wait_s))
        return Load(
            demands,
            {pool: self._supply(pool) for pool in self.limits.pools},
            self._admission.open_calls,
        )

    def _supply(self, pool: str) -> Supply:
        ready = self._grants.staying(pool)
        if not ready:
            return Supply(placeable=pool in self.placeable)
        return Supply(
            len(ready),
            fmean(said.speed for said in ready),
            pool in self.placeable,
            fmean(said.start_s for said in ready),
        )
