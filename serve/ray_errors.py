"""What Ray raises at the caller when the replica that it called is gone."""

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

REPLICA_LOST = RayActorError, NodeDiedError, OutOfMemoryError, WorkerCrashedError
