"""Policies for the simulator: ours."""

from __future__ import annotations

from collections.abc import Mapping

from .load import Limits
from .policy import State, decide
from .simulator import View


class QueuedWork:
    def __init__(self, limits: Limits) -> None:
        self.limits, self.state = limits, State()

    def __call__(self, view: View, now: float) -> Mapping[str, int]:
        decision = decide(view.load, self.limits, self.state, now)
        self.state = decision.state
        return decision.replicas
