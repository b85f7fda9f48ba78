"""Compiled code that is kept for later starts, and who may compile what is missing.

The folder may be a volume that all nodes share. A *mark* says that a replica has compiled all code
of its kind: the same card, structure, recipe and shapes. A replica that finds its mark starts at
once. Without it, one replica of the node compiles while the node's others of its kind wait.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ..atomic_file import replace_file

DEFAULT_FOLDER = "~/.cache/octet/compiled"
MOST_COMPILERS = 32  # processes that compile at a time

log = logging.getLogger("ray.serve")


class CompiledCode:
    """The code of one kind of replica in a folder.

    `kind`: everything on which the code depends, as plain data.
    """

    def __init__(self, root: Path, kind: Mapping[str, Any]) -> None:
        self._kind = kind
        text = json.dumps(kind, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:24]
        self._mark = root / f"{name}.json"
        # Not in `root`: on a shared volume the replicas of all nodes would wait for each other.
        user = os.getuid()
        self._lock = Path(tempfile.gettempdir()) / f"octet-compiling-{user}-{name}.lock"

    @property
    def complete(self) -> bool:
        """True once a replica of this kind has compiled all its code."""
        return self._mark.is_file()

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Compile in the block, if needed after another replica of this kind and node is done.

        If the block ends without an error, the code counts as complete.
        """
        if self.complete:
            yield
            return
        with FileLock(self._lock):
            yield
            if not self.complete:
                kept = {**self._kind, "compiled_at": time.time()}
                try:
                    replace_file(self._mark, json.dumps(kept, indent=1).encode(), mode=0o644)
                except OSError as error:  # such as a read-only volume
                    log.warning("compiled code is complete, but not marked so: %s", error)


def keep_compiled_code(folder: str | None) -> Path:
    """Make torch keep compiled code in a folder, where later starts find it; returns that folder.

    Each version of torch has its own subfolder of `folder`; None means `DEFAULT_FOLDER`. torch
    compiles with as many processes as this one may use CPUs; by itself it would not see a
    container's limit.
    """
    root = code_folder(folder)
    root.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(root)  # overwrites a value that torch may have set
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(usable_cpus(), MOST_COMPILERS)))
    return root


def code_folder(folder: str | None) -> Path:
    """The subfolder of `folder` for this version of torch."""
    return Path(folder or DEFAULT_FOLDER).expanduser() / torch.__version__


def usable_cpus(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The number of CPUs that this process may use: those of its container, if it has a limit.

    `limit`: the file in which Linux keeps the container's quota and period in microseconds.
    """
    cpus = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = map(int, limit.read_text().split())  # the quota may be "max"
        cpus = min(cpus, math.ceil(quota / period))
    return cpus
