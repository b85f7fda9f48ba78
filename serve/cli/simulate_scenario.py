"""Inputs of `octet simulate`: pools from options or settings, a workload and a policy."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from autoscaling.load import PolicyTuning, PoolBounds, ScalingLimits
from autoscaling.policy import Jumps, preferred
from autoscaling.simulation import workloads
from autoscaling.simulation.contestants import QueuedWork, contestant
from autoscaling.simulation.dispatch import EmptierOfTwo, FifoQueue, FirstDone
from autoscaling.simulation.fleet import NodeType
from autoscaling.simulation.simulator import (
    Policy,
    RequestQueue,
    SimulatedPool,
    SimulatedRequest,
    Simulation,
    SimulationResult,
    image_of,
)
from autoscaling.simulation.workloads import HOUR_S, Workload
from cluster.cards import CARDS
from cluster.cost import CostCoefficients, reference
from cluster.structure import TRANSFORMERS, structure

from ..dispatch.fair_queue import FairQueue
from ..errors import SettingsError, did_you_mean
from ..models.reference_work import cost_of
from ..models.replica_bounds import replicas_per_card, scaling_limits
from ..settings.application import Settings
from ..settings.models import Pool, ServedModel
from .exit_codes import UsageError

WORKLOADS = (
    "poisson",
    "diurnal",
    "spikes",
    "on-off",
    "heavy-tailed",
    "sparse",
    "daily-crowd",
    "cloud-clients",
)
NUMBERS = {  # the parameters of each policy, in the order in which --policy takes them
    "ray-serve": (
        "target_ongoing_requests",
        "upscale_delay_s",
        "downscale_delay_s",
        "min_replicas",
        "look_back_period_s",
        "upscaling_factor",
        "downscaling_factor",
    ),
    "keda": ("target", "stabilisation_s", "cooldown_s", "min_replicas"),
    "static": ("replicas",),
    "oracle": ("spare", "window_s"),
    "queued-work": ("spare", "hold_s", "utilisation", "late_part"),
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """A model's pools with their nodes, and the tuning of the `queued-work` policy.

    `unit`: the cost coefficients that define the work of an image. `jumps`: what the policy
    remembers of jumps of the rate before it begins.
    """

    pools: dict[str, SimulatedPool]
    unit: CostCoefficients
    tuning: PolicyTuning
    jumps: Jumps = field(default_factory=dict)

    @property
    def limits(self) -> ScalingLimits:
        """The bounds of all pools, as a policy takes them."""
        return ScalingLimits(
            {name: pool.pool for name, pool in self.pools.items()}, tuning=self.tuning
        )

    @property
    def start_s(self) -> float:
        """Seconds from the decision to a ready replica if a node must be added first."""
        return next(iter(self.pools.values())).node_type.first_start_s

    def notes(self, workload: Workload, seed: int = 0) -> list[str]:
        """Explain odd results: too much work for all replicas, and missing prices."""
        arrivals = list(workload.arrivals(seed))
        unit_s = sum(self.unit.work_s(image_of(arrival.shape)) for arrival in arrivals)
        per_s = unit_s / workload.seconds
        most_per_s = 0.0
        for pool in self.pools.values():
            own_s = sum(pool.costs.work_s(image_of(arrival.shape)) for arrival in arrivals)
            most_per_s += pool.pool.max_replicas * (unit_s / own_s if own_s else 1.0)
        found = []
        if per_s > most_per_s:
            most = sum(pool.pool.max_replicas for pool in self.pools.values())
            found.append(
                f"The requests bring {per_s:.1f} s of work per second, and all {most} replicas "
                f"that there may be do {most_per_s:.1f}: the queue grows without end. Lower "
                "--rate, or allow more replicas."
            )
        free = sorted({p.node_type.card for p in self.pools.values() if not p.node_type.usd_h})
        if free:
            found.append(f"No price is known for {', '.join(free)}, which counts as $ 0.")
        return found

    def run(
        self,
        workload: Workload,
        policy: str,
        seed: int = 0,
        warm_up_s: float = 0.0,
        numbers: Mapping[str, float] = MappingProxyType({}),
        *,
        plain_dispatch: bool = False,
        watch: Callable[[float, int], None] | None = None,
    ) -> SimulationResult:
        """Simulate the workload under a policy.

        `numbers`: the policy's parameters, named as in `NUMBERS`. Requests of the first `warm_up_s`
        seconds are not counted. `plain_dispatch`: requests are served in order of arrival, by the
        emptier of two random replicas, as in Ray Serve; otherwise as Octet's Dispatcher does it.
        `watch`: see `Simulation.run`.
        """
        arrivals: list[tuple[float, float]] = []
        if policy == "oracle":
            work_s = self.unit.work_s
            arrivals = [(a.at, work_s(image_of(a.shape))) for a in workload.arrivals(seed)]
        chosen = contestant(
            policy, self.limits, arrivals, workload.seconds, self.start_s, self.jumps, **numbers
        )
        simulation = self._simulation(chosen, seed, plain_dispatch=plain_dispatch)
        return simulation.run(workload, warm_up_s, watch)

    def after(self, workload: Workload, seed: int, numbers: Mapping[str, float]) -> Scenario:
        """The scenario once Octet's policy has served a workload, and remembers its jumps."""
        policy = QueuedWork(self.limits, self.jumps, **numbers)
        self._simulation(policy, seed).run(workload)
        return replace(self, jumps=policy.jumps)

    def _simulation(self, policy: Policy, seed: int, *, plain_dispatch: bool = False) -> Simulation:
        queue: RequestQueue = FairQueue[SimulatedRequest]()
        if plain_dispatch:
            queue = FifoQueue[SimulatedRequest]()
        choice = EmptierOfTwo if plain_dispatch else FirstDone
        return Simulation(self.pools, policy, queue, seed, self.unit, choice)


def scenario_of_card(
    model: str, card: str, slots: int, least: int, most: int, nodes: NodeType
) -> Scenario:
    """A scenario of one pool, with one replica on each card in the card's best precision.

    `least`, `most`: bounds of the number of replicas. `nodes`: the nodes, but for card and price.
    Raises `SettingsError` for an unknown model or card.
    """
    if model not in TRANSFORMERS:
        raise UsageError(f"--model '{model}': {did_you_mean(model, TRANSFORMERS)}")
    if card not in CARDS:
        raise UsageError(f"--card '{card}': {did_you_mean(card, CARDS)}")
    recipe = "fp8" if CARDS[card].has_fp8 else "bf16"
    costs = reference(structure(model), recipe, CARDS[card])
    pool = PoolBounds(model, least, most, slots, start_s=nodes.first_start_s)
    name = f"{model}-{'fp8' if recipe == 'fp8' else 'fp16'}-{card}"
    usd_h = CARDS[card].on_demand_usd_h or 0.0
    node_type = replace(nodes, card=card, usd_h=usd_h)
    return Scenario({name: SimulatedPool(pool, node_type, costs)}, costs, PolicyTuning())


def scenario_of_settings(settings: Settings, model: str | None, nodes: NodeType) -> Scenario:
    """A scenario with the pools of one model of the settings; None stands for the first model.

    `nodes`: see `scenario_of_card`. Replicas that share a card share its time: each is
    as slow as if the others were always busy. Raises `SettingsError` if the settings do not have
    the model.
    """
    served = {m.id: m for m in settings.models}
    if model is not None and model not in served:
        raise UsageError(f"--model '{model}': {did_you_mean(model, served)}")
    chosen = served[model] if model else settings.models[0]
    limits = scaling_limits(settings)
    unit = cost_of(chosen, chosen.pools[0], settings.models_folder)
    pools = {chosen.pool_name(pool): pool for pool in chosen.pools}
    simulated = {
        name: _simulated_pool(
            chosen, pools[name], limits.pools[name], settings.models_folder, nodes
        )
        for name in preferred(chosen.id, limits)
    }
    return Scenario(simulated, unit, limits.tuning)


def _simulated_pool(
    model: ServedModel,
    pool: Pool,
    limits: PoolBounds,
    models_folder: str | None,
    nodes: NodeType,
) -> SimulatedPool:
    per_node = replicas_per_card(pool)
    costs = CostCoefficients(*(per_node * c for c in cost_of(model, pool, models_folder)))
    usd_h = limits.usd_h * per_node
    node_type = replace(nodes, card=pool.card or "unknown card", usd_h=usd_h, per_node=per_node)
    return SimulatedPool(replace(limits, start_s=nodes.first_start_s), node_type, costs)


def workload_of(name: str, per_s: float, hours: float) -> Workload:
    """One of `WORKLOADS` with `per_s` requests per second, or the trace of a CSV file.

    Raises `SettingsError` if there is no such workload or file, or if the file is not a trace.
    """
    if name not in WORKLOADS:
        if not Path(name).is_file():
            known = f"one of {', '.join(WORKLOADS)}, or a CSV file that exists"
            raise UsageError(f"--workload '{name}': expected {known}")
        try:
            return workloads.trace(Path(name))
        except (OSError, ValueError, csv.Error) as error:
            raise SettingsError(str(error)) from None
    make = getattr(workloads, name.replace("-", "_"))
    made: Workload = make(per_s, hours * HOUR_S)
    return made


def policy_of(text: str) -> tuple[str, dict[str, float]]:
    """Parse `NAME` or `NAME:NUMBER,NUMBER` into a policy and its parameters.

    For example, `static:8` is `("static", {"replicas": 8.0})`. Raises `SettingsError` for an
    unknown policy, and for numbers that the policy does not take.
    """
    name, _, given = text.partition(":")
    if name not in NUMBERS:
        raise UsageError(f"--policy '{text}': {did_you_mean(name, NUMBERS)}")
    keys = NUMBERS[name]
    try:
        values = [float(value) for value in given.split(",")] if given else []
    except ValueError:
        values = [-1.0]
    lowest = [
        0.0 if key.endswith(("delay_s", "isation_s", "cooldown_s", "replicas", "part")) else 1e-6
        for key in keys
    ]
    wrong = len(values) > len(keys) or any(
        not low <= value < 1e6 for low, value in zip(lowest, values, strict=False)
    )
    if wrong:
        raise UsageError(f"--policy '{text}': {name} takes {', '.join(keys) or 'no numbers'}")
    if name == "static" and not values:
        raise UsageError(f"--policy '{text}': how many replicas? For example static:8")
    return name, dict(zip(keys, values, strict=False))
