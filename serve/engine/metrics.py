"""What a Generator counts; Ray exports it with the names `ray_octet_…` on every node.

Ray adds the tags deployment, replica and application.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from ray.serve import metrics

from ..cost import Coefficients
from ..request import Timings
from .denoising_loop import Counts

PHASE_S = 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100


class EngineMetrics:
    """`pool` tags every one of them."""

    def __init__(self, pool: str) -> None:
        self._pool = {"pool": pool}
        self._counted = Counts()
        self._start_s: dict[str, float] = {}
        tags = ("pool",)
        self._counters = {
            "steps": metrics.Counter(
                "octet_engine_steps", "Calls of the transformer.", tag_keys=tags
            ),
            "rows": metrics.Counter(
                "octet_engine_rows", "Rows in them, without padding.", tag_keys=tags
            ),
            "step_s": metrics.Counter(
                "octet_engine_step_seconds", "Seconds spent in them.", tag_keys=tags
            ),
            "out_of_memory": metrics.Counter(
                "octet_engine_out_of_memory",
                "Steps and decodes for which memory did not suffice.",
                tag_keys=tags,
            ),
        }
        self._outcomes = metrics.Counter(
            "octet_engine_images",
            "Images by outcome: drawn, cancelled, non_finite, failed.",
            tag_keys=("pool", "outcome"),
        )
        self._phases = metrics.Histogram(
            "octet_engine_phase_seconds",
            "Seconds of an image in a phase: text, denoise, decode, encode.",
            boundaries=list(PHASE_S),
            tag_keys=("pool", "phase"),
        )
        self._start = metrics.Gauge(
            "octet_engine_start_seconds",
            "Seconds of this replica's start: checkpoint, load, text, warm-up.",
            tag_keys=("pool", "phase"),
        )
        self._speed = metrics.Gauge(
            "octet_engine_speed", "Work of a reference replica done in a second.", tag_keys=tags
        )
        self._coefficients = metrics.Gauge(
            "octet_engine_cost_seconds",
            "Learnt coefficients of the work of an image: see serve/cost.py.",
            tag_keys=("pool", "coefficient"),
        )

    def started(self, seconds: Mapping[str, float]) -> None:
        """How long each phase of the start took."""
        self._start_s = dict(seconds)

    def ended(self, outcome: str) -> None:
        self._outcomes.inc(tags={**self._pool, "outcome": outcome})

    def drew(self, timings: Timings) -> None:
        self.ended("drawn")
        for phase in ("text", "denoise", "decode", "encode"):
            self._phases.observe(getattr(timings, f"{phase}_s"), {**self._pool, "phase": phase})

    def report(self, counts: Counts, speed: float, coefficients: Coefficients) -> None:
        """Once per heartbeat; `counts` as the denoising loop has them."""
        now, before = asdict(counts), asdict(self._counted)
        for name, counter in self._counters.items():
            if now[name] > before[name]:
                counter.inc(now[name] - before[name], self._pool)
        self._counted = Counts(**now)
        # Gauges again and again: Ray forgets what it has not heard of for a while.
        for phase, taken_s in self._start_s.items():
            self._start.set(taken_s, {**self._pool, "phase": phase})
        self._speed.set(speed, self._pool)
        for name, seconds in coefficients._asdict().items():
            self._coefficients.set(seconds, {**self._pool, "coefficient": name})
