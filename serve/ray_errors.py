"""The errors that Ray raises in a caller whose replica has died or is lost with its node."""

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

REPLICA_LOST = RayActorError, NodeDiedError, OutOfMemoryError, WorkerCrashedError
