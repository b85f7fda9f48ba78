"""The Dispatcher's report to Ray Serve: how many replicas each deployment should have.

Ray Serve passes a replica's numbers on to an autoscaling policy as one flat dictionary of floats
(`record_autoscaling_stats`). This file is the only one that knows how a report is written into such
a dictionary and read from it.

Serve calls the policy of every application in one process, and shows each policy only the
deployments of its own application. So the policy of the Dispatcher's application publishes the
report here for the others.

Pure: standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

WANTED, AT_LEAST, REQUESTS = "replicas/", "least/", "requests/"


@dataclass(frozen=True, slots=True)
class ScalingReport:
    """The report; each field holds numbers by the name of the deployment.

    `wanted`: replicas that the policy has decided on. `at_least`: the smallest number of replicas
    while the policy has not decided yet. `requests`: requests that wait or run, for Ray Serve's own
    policy.
    """

    wanted: Mapping[str, float] = field(default_factory=dict)
    at_least: Mapping[str, float] = field(default_factory=dict)
    requests: Mapping[str, float] = field(default_factory=dict)

    def as_stats(self) -> dict[str, float]:
        """The report as Ray Serve's dictionary of floats."""
        return {
            prefix + name: float(number)
            for prefix, numbers in (
                (WANTED, self.wanted),
                (AT_LEAST, self.at_least),
                (REQUESTS, self.requests),
            )
            for name, number in numbers.items()
        }

    @classmethod
    def from_stats(cls, stats: Mapping[str, float]) -> ScalingReport:
        """Read a report from Ray Serve's dictionary; other numbers in it are ignored."""

        def part(prefix: str) -> dict[str, float]:
            return {
                name.removeprefix(prefix): number
                for name, number in stats.items()
                if name.startswith(prefix)
            }

        return cls(part(WANTED), part(AT_LEAST), part(REQUESTS))


def is_reported(names: Iterable[str]) -> bool:
    """Return whether any of these names is that of a number in a report."""
    return any(name.startswith((WANTED, AT_LEAST, REQUESTS)) for name in names)


_published = ScalingReport()


def publish(report: ScalingReport) -> None:
    """Keep the Dispatcher's newest report for the policies of all applications of this process."""
    global _published
    _published = report


def published() -> ScalingReport:
    """The report that was published last; an empty one before the first."""
    return _published
