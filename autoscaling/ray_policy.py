"""What Ray Serve calls for the number of replicas of every deployment of the application.

The Dispatcher decides (`serve.dispatch.scaling`) and reports numbers through Serve's
`record_autoscaling_stats`; here its newest ones are taken: the `replicas` of each deployment, or at
`least` how many as long as it has not decided. Where Ray Serve is to decide, they are the
`requests` that wait or run: those that wait stand in the Dispatcher's queue, where Serve does not
see them.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy

DISPATCHER, REQUESTS = "Dispatcher", "requests/"

log = logging.getLogger("ray.serve")


def replicas(contexts: Mapping[Any, Any]) -> tuple[dict[Any, float], dict[Any, dict[str, Any]]]:
    """Ray Serve's application-level policy: replicas by deployment, and what it is to remember.

    A deployment that is left out keeps its number. Raises nothing: an exception in one policy
    would hold up those of every application.
    """
    found: dict[Any, float] = {}
    states: dict[Any, dict[str, Any]] = {}
    try:
        reported, requests = _reported(contexts)
        for deployment, context in contexts.items():
            name, target = deployment.name, context.target_num_replicas
            wanted = reported.get(f"replicas/{name}")
            least = reported.get(f"least/{name}", 0.0)
            if requests and name != DISPATCHER:
                asked = copy.copy(context)
                asked.total_num_requests = requests.get(name, context.total_num_requests)
                told, states[deployment] = replica_queue_length_autoscaling_policy(asked)
                found[deployment] = max(told, least)
            elif wanted or (wanted == 0 and target):
                # What stays at zero is left out: Serve would start one for any request that waits
                # in a handle.
                found[deployment] = wanted
            elif wanted is None and least:
                found[deployment] = max(target, least)
    except Exception:  # see above
        log.exception("autoscaling: every deployment keeps its replicas")
        return {}, {}
    return found, states


def _reported(contexts: Mapping[Any, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """What the Dispatcher said last, and the mean of each deployment's requests if it told them."""
    newest: dict[str, float] = {}
    requests: dict[str, float] = {}
    for deployment, context in contexts.items():
        if deployment.name == DISPATCHER:
            for name, of_replicas in context.raw_metrics.items():
                if samples := [sample for series in of_replicas.values() for sample in series]:
                    newest[name] = max(samples, key=lambda sample: sample.timestamp).value
            if any(name.startswith(REQUESTS) for name in newest):
                for name, by_replica in context.aggregated_metrics.items():
                    if name.startswith(REQUESTS):
                        mean = max(by_replica.values(), default=0.0)
                        requests[name.removeprefix(REQUESTS)] = mean
    return newest, requests
