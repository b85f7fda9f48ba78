"""The replicas of the application's deployments, as Ray Serve's controller knows them."""

from __future__ import annotations

from collections.abc import Mapping

from ..deployments import APPLICATION

ReplicaStates = Mapping[str, Mapping[str, int]]  # replicas by deployment and Serve's state


def replica_states() -> ReplicaStates:
    """Ask Serve's controller for the number of replicas in each state. Blocks.

    Raises Ray's errors, which have no common class, if the controller does not answer.
    """
    from ray import serve

    deployments = serve.status().applications[APPLICATION].deployments
    return {
        name: {str(getattr(state, "value", state)): n for state, n in found.replica_states.items()}
        for name, found in deployments.items()
    }
