"""The file in which the Dispatcher keeps what its autoscaling policy has learnt of jumps.

A restarted Dispatcher reads it, so that the floors are there at once (`autoscaling.floor`). Losing
the file costs what was learnt, and nothing else; so faults are logged and never raised.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from autoscaling.floor import JumpMemory

from ..atomic_file import replace_file
from .protocol import Pools
from .scaling import Scaling

FILE = "jumps.json"  # in the data folder
EVERY_S = 60.0

log = logging.getLogger("ray.serve")


class JumpFile:
    """Joins the scaling with the file of what it has learnt."""

    def __init__(self, scaling: Scaling, folder: Path | None) -> None:
        """`folder`: the folder of the file; None: what is learnt ends with this process."""
        self._scaling, self._file = scaling, folder / FILE if folder else None
        if self._file:
            scaling.remember(read(self._file))

    async def run(self, every_s: float = EVERY_S) -> None:
        """Write the file from time to time, for ever."""
        while True:
            await asyncio.sleep(every_s)
            await self.write()

    async def write(self) -> None:
        """Write the file now."""
        if self._file is None:
            return
        jumps = self._scaling.jumps().items()
        found = [{"pools": pools, **memory.as_json()} for pools, memory in jumps]
        try:
            await asyncio.to_thread(replace_file, self._file, json.dumps(found).encode())
        except OSError as error:
            log.warning("what autoscaling has learnt is not on disk: %s", error)


def read(file: Path) -> Mapping[Pools, JumpMemory]:
    """Read the jumps that the file holds, by pools; none if it is missing or damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {tuple(one["pools"]): JumpMemory.from_json(one) for one in found}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        log.warning("%s: %s; autoscaling learns anew", file, error)
        return {}
