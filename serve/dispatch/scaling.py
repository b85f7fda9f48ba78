"""How many replicas the Dispatcher wants: the autoscaling policy, fed from queue and replicas.

The Dispatcher calls `decide` once per heartbeat. Ray Serve fetches `report`; its controller then
applies the numbers through `autoscaling.ray_policy`. This file uses no clock, network or Ray.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from autoscaling.load import Demand, Load, ScalingLimits, Supply
from autoscaling.policy import Jumps, PolicyState, ScalingDecision, decide, preferred
from autoscaling.report import ScalingReport
from cluster.room import Room

from ..deployments import generator_deployment
from .admission import Admission, Arrivals
from .grants import Grants
from .protocol import BATCH, Pools

SEEN_S = 3.0  # Ray Serve has fetched a new number after that time


class Scaling:
    """The number of replicas of each pool, as Octet's own policy wants it.

    `began`: the time at which this process began to count the arriving work.
    """

    policy = staticmethod(decide)

    def __init__(self, grants: Grants, admission: Admission, began: float) -> None:
        self.limits = ScalingLimits({})
        self.replicas: Mapping[str, int] = {}  # wanted, of every pool and every follower
        self.reasons: dict[str, str] = {}  # why each pool's number last changed
        self.placeable: frozenset[str] = frozenset()  # pools that fit on a node that is there
        self.room: Room | None = None  # the nodes that are there; None: not known yet
        self.others: Mapping[str, int] = {}  # replicas of deployments that are no pools
        self._short: Mapping[str, int] = {}  # the pools that lack room, and what they get
        self._grants, self._admission, self._began = grants, admission, began
        self._state = PolicyState(at=began)
        self._settled = False  # whether replicas from before this process have had time to report
        self.stored: Mapping[Pools, float] = {}  # work of stored jobs that counts as waiting
        self._recent: dict[str, list[tuple[float, int]]] = {}  # by pool: what was wanted lately
        self._all_since: dict[str, float] = {}  # by pool: since when all its replicas are wanted

    def set_limits(self, limits: ScalingLimits) -> None:
        """Use these pools, bounds and tuning from the next decision on.

        A new pool wants its smallest number of replicas, and counts as placeable, until then.
        """
        new = limits.pools.keys() - self.limits.pools.keys()
        self.placeable |= new
        first = {pool: limits.pools[pool].min_replicas for pool in new}
        known = {*limits.pools, *limits.followers}
        self.replicas = {n: r for n, r in self.replicas.items() if n in known} | first
        for notes in (self.reasons, self._recent, self._all_since):
            for pool in notes.keys() - known:
                del notes[pool]
        self.limits = limits

    def jumps(self) -> Jumps:
        """Return the jumps of the rate that the policy remembers."""
        return self._state.jumps

    def remember(self, jumps: Jumps) -> None:
        """Begin with what an earlier process has learnt of jumps, as if work had just come."""
        self._state = self._state.remembering(jumps, self._began)

    def decide(self, now: float, unix_s: float | None = None) -> Mapping[str, str]:
        """Decide how many replicas each pool should have; `unix_s`: the time of day.

        Returns the reason for each number that has changed, by pool.
        """
        load = self.load(now)._replace(unix_s=unix_s)
        decision = self._within_room(load, now)
        self._state, self.replicas = decision.state, decision.replicas
        self.reasons |= decision.reasons
        self._settled = now - self._began >= self.limits.tuning.hold_s
        if self._settled:
            for pool in self.limits.pools:
                self._keep(pool, decision.replicas[pool], now)
        return decision.reasons

    def _within_room(self, load: Load, now: float) -> ScalingDecision:
        """Decide for replicas that the nodes can hold together; the reasons say what falls short.

        The number of a pool's replicas that fit becomes the limit of that pool. Then the policy
        decides again, so that the demand beyond the limit can go to the model's next pool. If nodes
        may be added (`node_wait_s` above 0), nothing is limited, because pending replicas make the
        Ray autoscaler add nodes.
        """
        decision = self.policy(load, self.limits, self._state, now)
        if self.room is None or self.limits.tuning.node_wait_s:
            return decision
        room, asked, fitting = dict[str, int](), dict[str, int](), dict[str, int]()
        for _ in self.limits.pools:  # each time, one more pool at least has got a limit
            fitting = self._fitting(load, decision, fitting)
            wanted = {pool: decision.replicas[pool] for pool in self.limits.pools}
            missing = {pool for pool, number in wanted.items() if fitting[pool] < number}
            if not missing:
                break
            room |= {pool: fitting[pool] for pool in missing}
            asked = {pool: wanted[pool] for pool in missing} | asked
            decision = self.policy(load, replace(self.limits, room=room), self._state, now)
        return decision._replace(reasons=self._with_shortages(decision, room, asked))

    def _fitting(
        self, load: Load, decision: ScalingDecision, before: Mapping[str, int]
    ) -> dict[str, int]:
        """How many of the replicas that a decision wants the nodes can hold together.

        Room is given out in this order:

        - the other deployments, the numbers of `before`, and each pool's `min_replicas`;
        - one replica for each pool that has work and is the first choice of some requests;
        - the replicas that these pools already have, up to one more than an equal division would
          give them, so that small changes of load start and stop no replicas;
        - the other replicas that work needs: first for these pools, then for all;
        - replicas that no work needs now.

        `before`: the numbers that fitted in the previous round.
        """
        assert self.room  # noqa: S101 - for the type checker
        numbers, bounds, states = decision.replicas, self.limits.pools, decision.state.pools
        others = {name: numbers.get(name, number) for name, number in self.others.items()}
        pools = sorted(bounds, key=lambda pool: not self.replicas.get(pool))
        wanted = {pool: numbers[pool] for pool in pools}
        least = {pool: bounds[pool].min_replicas for pool in pools}
        first = others, {pool: min(before.get(pool, 0), wanted[pool]) for pool in pools}
        given = self.room.together(*first, wanted)
        if any(given.get(pool, number) < number for pool, number in wanted.items()):
            needed = {pool: min(states[pool].needed_now, wanted[pool]) for pool in pools}
            models = dict.fromkeys(bounds[pool].model for pool in bounds)
            ordered = [pool for model in models for pool in preferred(model, self.limits)]
            choices = {next((p for p in ordered if p in d.pools), "") for d in load.demands}
            chosen = {pool: needed[pool] for pool in pools if pool in choices}
            even = self.room.together(*first, least, chosen)
            one = {pool: min(number, 1) for pool, number in chosen.items()}
            held = {
                pool: min(self.replicas.get(pool, 0), even.get(pool, 0) + 1, number)
                for pool, number in chosen.items()
            }
            given = self.room.together(*first, least, one, held, chosen, needed, wanted)
        return {pool: max(given.get(pool, wanted[pool]), least[pool]) for pool in pools}

    def _with_shortages(
        self, decision: ScalingDecision, room: Mapping[str, int], asked: Mapping[str, int]
    ) -> dict[str, str]:
        """Add to a decision's reasons one for each pool that now lacks room, or no longer does.

        `room`: the numbers to which pools were limited. `asked`: the numbers that they wanted.
        """
        reasons = dict(decision.reasons)
        for pool, number in room.items():
            if pool in reasons or self._short.get(pool) != number:
                others = {p: n for p, n in decision.replicas.items() if p != pool and n}
                beside = " and ".join(
                    f"{n} {p}" for p, n in others.items() if p in self.limits.pools
                )
                reasons[pool] = (
                    f"{number} of {asked[pool]} wanted replicas: the nodes hold no more"
                    f"{' beside ' if beside else ''}{beside}"
                )
        for pool in self._short.keys() - room.keys() - reasons.keys():
            reasons[pool] = (
                f"{decision.replicas.get(pool, 0)} replicas: the nodes have room for all again"
            )
        self._short = room
        return reasons

    def may_come(self, pool: str) -> bool:
        """Return whether a node could hold a replica of the pool, or may still be added for one."""
        known = self._state.pools.get(pool)
        added = self.limits.tuning.node_wait_s > 0
        return pool in self.placeable or (added and not (known and known.given_up))

    def report(self) -> ScalingReport:
        """The report for Ray Serve: the wanted number of replicas of each deployment.

        During the first `hold_s` seconds of this process, replicas that already run may not have
        reported yet. So the report then only says how many replicas there must be at least.
        """
        numbers = by_deployment(self.replicas, self.limits)
        return ScalingReport(wanted=numbers) if self._settled else ScalingReport(at_least=numbers)

    def restore(self, stopping: Mapping[str, int], now: float) -> None:
        """Undo decisions to have fewer replicas that Ray Serve never carried out.

        `stopping`: how many replicas of each deployment Serve is stopping. A decision counts as
        forgotten if all replicas of the pool have been wanted for `SEEN_S` and none is stopping.
        """
        for pool in self._grants.in_excess():
            all_s = now - self._all_since.get(pool, now)
            if all_s > SEEN_S and not stopping.get(generator_deployment(pool)):
                self._grants.keep_all(pool, now)

    def load(self, now: float) -> Load:
        """The input of the policy: demand by pools, supply of each pool, open requests."""
        queued: dict[Pools, float] = {}
        since: dict[Pools, float] = {}
        queued |= self.stored
        for waiting in self._grants.queue:
            if waiting.tenant.endswith(BATCH) and not self._admission.batches_scale:
                continue
            queued[waiting.pools] = queued.get(waiting.pools, 0.0) + waiting.work_s
            since[waiting.pools] = min(since.get(waiting.pools, now), waiting.since)
        arrived = self._admission.arrived
        demands = []
        for pools in {*arrived, *queued}:
            work_s, squares, images = arrived.get(pools, Arrivals())
            wait_s = now - since.get(pools, now)
            demands.append(Demand(pools, work_s, squares, queued.get(pools, 0.0), wait_s, images))
        return Load(
            demands,
            {pool: self._supply(pool) for pool in self.limits.pools},
            self._admission.open_calls,
        )

    def _supply(self, pool: str) -> Supply:
        ready = self._grants.staying(pool)
        if not ready.replicas:
            return Supply(placeable=pool in self.placeable)
        return Supply(
            ready.replicas,
            ready.speed / ready.replicas,
            pool in self.placeable,
            ready.start_s / ready.replicas,
        )

    def _keep(self, pool: str, replicas: int, now: float) -> None:
        """Give new images only to as many replicas of the pool as Ray Serve will keep.

        `replicas`: the wanted number. A lower number counts only after it was wanted for `SEEN_S`
        seconds, also right after the start of this process. The delay is needed because Serve
        fetches the number only from time to time: it may miss a lower number that was wanted for a
        moment, and stops no replica for it.
        """
        before = self._recent.get(pool, [(now, self.limits.pools[pool].max_replicas)])
        self._recent[pool] = [(at, n) for at, n in before if now - at <= SEEN_S and n > replicas]
        most = max((n for _, n in self._recent[pool]), default=replicas)
        self._recent[pool].append((now, replicas))
        if replicas >= self._grants.living(pool):
            self._all_since.setdefault(pool, now)
        else:
            self._all_since.pop(pool, None)
        self._grants.keep(pool, most, now)


def by_deployment(replicas: Mapping[str, int], limits: ScalingLimits) -> dict[str, float]:
    """Convert numbers of replicas by pool or follower into numbers by deployment.

    A follower is a deployment that is scaled together with the pools.
    """
    return {
        generator_deployment(name) if name in limits.pools else name: float(number)
        for name, number in replicas.items()
    }
