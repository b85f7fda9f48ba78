"""The autoscaling policy of each application in Ray Serve's controller: it obeys the Dispatcher.

The Dispatcher decides (`serve.dispatch.scaling`) and reports the numbers through Serve's
`record_autoscaling_stats`. In the Dispatcher's own application this policy publishes the newest
report; in every application it takes the numbers that were published last. While the Dispatcher has
not decided yet, the policy only makes sure that each deployment has its smallest number of
replicas.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from .report import ScalingReport, is_reported, publish, published

log = logging.getLogger("ray.serve")

Decision = tuple[dict[Any, float], dict[Any, dict[str, Any]]]


def replicas(contexts: Mapping[Any, Any]) -> Decision:
    """Return the number of replicas by deployment, and an empty state.

    Ray Serve calls this function as the policy of an application. `contexts`: what Ray Serve knows
    about each of its deployments. A deployment that is left out of the result keeps its number of
    replicas. Never raises: an exception in one policy would stop the autoscaling of every
    application.
    """
    try:
        return _obeyed(contexts), {}
    except Exception:  # on any error, the present numbers are better than none
        log.exception("autoscaling: every deployment keeps its replicas")
        return {}, {}


def _obeyed(contexts: Mapping[Any, Any]) -> dict[Any, float]:
    if report := newest_report(contexts):
        publish(report)
    report = published()
    found: dict[Any, float] = {}
    for deployment, context in contexts.items():
        name, target = deployment.name, context.target_num_replicas
        wanted = report.wanted.get(name)
        at_least = report.at_least.get(name, 0.0)
        if wanted or (wanted == 0 and target):
            # A deployment that stays at zero is left out: Serve would start a replica for any
            # request that waits in a handle.
            found[deployment] = wanted
        elif wanted is None and at_least:
            found[deployment] = max(target, at_least)
    return found


def newest_report(contexts: Mapping[Any, Any]) -> ScalingReport | None:
    """The report that the Dispatcher made last, from what Ray Serve kept of all deployments.

    None if none of the deployments has made a report.
    """
    stats: dict[str, float] = {}
    for context in contexts.values():
        for name, by_replica in context.raw_metrics.items():
            samples = [sample for series in by_replica.values() for sample in series]
            if samples and is_reported([name]):
                stats[name] = max(samples, key=lambda sample: sample.timestamp).value
    return ScalingReport.from_stats(stats) if stats else None
