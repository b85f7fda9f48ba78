"""The errors that Ray raises in a caller whose replica has died, or is lost with its node.

`tests/edge/test_retries.py` goes through all errors of Ray and says why the others are not here.
"""

from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RaySystemError,
    RpcError,
    WorkerCrashedError,
)

REPLICA_LOST = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    LocalRayletDiedError,
    RaySystemError,
    RpcError,
    OutOfMemoryError,  # Ray has killed the replica to free the node's memory
    ObjectLostError,  # the image was generated, but its node died before the caller had it
    ObjectStoreFullError,  # the node has no room for the image
    OutOfDiskError,
)

# Errors of a call before its replica has received it: the caller's own node has no room for the
# picture of an edit.
NO_ROOM = ObjectStoreFullError, OutOfDiskError
