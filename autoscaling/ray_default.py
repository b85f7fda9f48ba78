"""Ray Serve's own autoscaling policy on Octet's requests, as the baseline to compare with.

Requests wait in the Dispatcher's queue, where Serve does not see them. So the Dispatcher reports
how many requests wait or run in each pool, and Serve's policy decides on the mean of these reports.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy

from .ray_policy import Decision, newest_report
from .report import ScalingReport, is_reported, publish, published

log = logging.getLogger("ray.serve")


def replicas(contexts: Mapping[Any, Any]) -> Decision:
    """Decide with Ray Serve's own policy, from the requests that the Dispatcher reports.

    `contexts` and the result are those of `ray_policy.replicas`. Never raises: on an error every
    deployment keeps its number of replicas.
    """
    found: dict[Any, float] = {}
    states: dict[Any, dict[str, Any]] = {}
    try:
        if report := newest_report(contexts):
            publish(ScalingReport(at_least=report.at_least, requests=_mean_requests(contexts)))
        at_least, requests = published().at_least, published().requests
        for deployment, context in contexts.items():
            least = at_least.get(deployment.name, 0.0)
            if requests and not is_reported(context.raw_metrics):
                asked = copy.copy(context)
                asked.total_num_requests = requests.get(deployment.name, context.total_num_requests)
                decided, states[deployment] = replica_queue_length_autoscaling_policy(asked)
                found[deployment] = max(decided, least)
            elif least:
                found[deployment] = max(context.target_num_replicas, least)
    except Exception:  # on any error, the present numbers are better than none
        log.exception("autoscaling: every deployment keeps its replicas")
        return {}, {}
    return found, states


def _mean_requests(contexts: Mapping[Any, Any]) -> Mapping[str, float]:
    """The mean of each deployment's reported requests over Serve's look-back period."""
    means = {
        name: max(by_replica.values(), default=0.0)
        for context in contexts.values()
        for name, by_replica in context.aggregated_metrics.items()
    }
    return ScalingReport.from_stats(means).requests
