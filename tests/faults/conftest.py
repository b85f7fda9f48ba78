"""A Ray cluster of several nodes on this machine, with cards that only Ray believes in."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Ray reads these when it is imported.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"

STORE_BYTES = 80 * 2**20


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Short, because Ray puts sockets into it."""
    path = Path(tempfile.mkdtemp(prefix="octet-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Any]:
    """Only a head without GPU so far; its driver is this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        from ray._private import utils
        from ray.cluster_utils import Cluster

        # It would tell every other Ray user of this machine to join our cluster.
        utils.write_ray_address = lambda *_: None
        head = {
            "num_cpus": 4,
            "num_gpus": 0,
            "include_dashboard": False,
            "temp_dir": str(folder),
            "object_store_memory": STORE_BYTES,
        }
        cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
    yield cluster
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.shutdown()
        cluster.shutdown()
