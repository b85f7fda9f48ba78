"""A Generator's metrics, as `serve.metric_catalogue` lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from cluster.cost import CostCoefficients

from ..metric_catalogue import metric
from ..request import Timings
from .denoising_loop import LoopCounts


class GeneratorMetrics:
    """The metrics of one replica: images, phases, steps, speed and cost, all tagged with `pool`."""

    def __init__(self, pool: str) -> None:
        self._pool = {"pool": pool}
        self._counted = LoopCounts()
        self._start_s: dict[str, float] = {}
        self._counters = {
            "steps": metric("octet_engine_steps"),
            "rows": metric("octet_engine_rows"),
            "step_s": metric("octet_engine_step_seconds"),
            "out_of_memory": metric("octet_engine_out_of_memory"),
        }
        self._outcomes = metric("octet_engine_images")
        self._phases = metric("octet_engine_phase_seconds")
        self._start = metric("octet_engine_start_seconds")
        self._speed = metric("octet_engine_speed")
        self._coefficients = metric("octet_engine_cost_seconds")

    def started(self, seconds: Mapping[str, float]) -> None:
        """Note how many seconds each phase of the replica's start took."""
        self._start_s = dict(seconds)

    def ended(self, outcome: str) -> None:
        """Count an image that has ended, by its outcome."""
        self._outcomes.inc(tags={**self._pool, "outcome": outcome})

    def generated(self, timings: Timings) -> None:
        """Count a finished image, and observe how long each of its phases took."""
        self.ended("drawn")
        phases = [
            "text",
            "denoise",
            "decode",
            "encode",
            *(["latents"] if timings.latents_s else []),
        ]
        for phase in phases:
            self._phases.observe(getattr(timings, f"{phase}_s"), {**self._pool, "phase": phase})

    def report(self, counts: LoopCounts, speed: float, coefficients: CostCoefficients) -> None:
        """Report to Ray, once per heartbeat; `counts` are those of the denoising loop."""
        now, before = asdict(counts), asdict(self._counted)
        for name, counter in self._counters.items():
            if now[name] > before[name]:
                counter.inc(now[name] - before[name], self._pool)
        self._counted = LoopCounts(**now)
        # Gauges are set again each time, because Ray forgets those that are not.
        for phase, taken_s in self._start_s.items():
            self._start.set(taken_s, {**self._pool, "phase": phase})
        self._speed.set(speed, self._pool)
        for name, seconds in coefficients._asdict().items():
            self._coefficients.set(seconds, {**self._pool, "coefficient": name})
