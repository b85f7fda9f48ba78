"""The replicas of all deployments, as Ray Serve's controller knows them."""

from __future__ import annotations

from collections.abc import Mapping

ReplicaStates = Mapping[str, Mapping[str, int]]  # replicas by deployment and Serve's state


def replica_states() -> ReplicaStates:
    """Ask Serve's controller for the number of replicas in each state. Blocks.

    Raises Ray's errors, which have no common class, if the controller does not answer.
    """
    from ray import serve

    return {
        name: {str(getattr(state, "value", state)): n for state, n in found.replica_states.items()}
        for application in serve.status().applications.values()
        for name, found in application.deployments.items()
    }
