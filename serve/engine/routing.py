"""To which replica of a pool an image goes."""

from __future__ import annotations

import random

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica


class StayingReplicas(FIFOMixin, RequestRouter):  # type: ignore[misc]  # Ray has no types
    """The emptier of two by chance, as Ray Serve's own router, but none whose node is drained.

    Serve goes on routing to those until others have started in their place.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        staying = [r for r in candidate_replicas if not r.routing_stats.get("leaving")]
        among = staying or candidate_replicas
        if pending_request:  # else who waits for a full replica asks it again without a pause
            pending_request.routing_context.should_backoff = True
        return [random.sample(among, min(len(among), 2))]
