"""The router that sends an image to the replica that its lease names."""

from __future__ import annotations

import random
from collections import OrderedDict

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

LEASE = 1  # the place of `lease` among the arguments of `Generator.generate`
REMEMBERED = 1000  # replicas that are gone


class NamedReplica(RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Sends an image to the replica that the Dispatcher has granted it.

    A replica may have reported itself to the Dispatcher before this router has heard of it; the
    image then waits for it. A replica that was there and is gone will not come back. So the image
    goes to any other one, which refuses it, and it is queued again at once.
    """

    _there: dict[str, RunningReplica]
    _gone: OrderedDict[str, None]

    def initialize_state(self, **_: object) -> None:
        self._there, self._gone = {}, OrderedDict()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._note_changes()

    def on_replica_actor_died(self, replica_id: object) -> None:
        super().on_replica_actor_died(replica_id)
        self._note_changes()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [random.sample(candidate_replicas, 1)]
        pending_request.routing_context.should_backoff = True  # a pause between two attempts
        name = pending_request.args[LEASE].replica
        if name in self._gone:
            return [random.sample(candidate_replicas, 1)]
        return [[self._there[name]] if name in self._there else []]

    def _note_changes(self) -> None:
        before = self._there
        self._there = {id.unique_id: replica for id, replica in self.curr_replicas.items()}
        for name in before.keys() - self._there.keys():
            self._gone[name] = None
        for name in self._there.keys() & self._gone.keys():
            del self._gone[name]
        while len(self._gone) > REMEMBERED:
            self._gone.popitem(last=False)
