"""The router that chooses the replica of a pool that an image is sent to."""

from __future__ import annotations

import random

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

ALONE = 3  # the place of `alone` among the arguments of `Generator.generate`


class StayingReplicas(FIFOMixin, RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Chooses the less busy of two random replicas, but avoids some if there are others.

    These are replicas on nodes that are being drained and, for an image that must run alone,
    replicas on cards that have had a fault: the image may have died there before.

    Ray Serve's own router also chooses the less busy of two. But it goes on using replicas on a
    draining node until others have started in their place. This router uses such replicas only if
    there are no others.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        staying = [r for r in candidate_replicas if not r.routing_stats.get("leaving")]
        usable = staying or candidate_replicas
        if pending_request and pending_request.args[ALONE]:
            usable = [r for r in usable if not r.routing_stats.get("careful")] or usable
        if pending_request:  # else a request that finds only full replicas retries without a pause
            pending_request.routing_context.should_backoff = True
        return [random.sample(usable, min(len(usable), 2))]
