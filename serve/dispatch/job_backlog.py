"""The jobs that wait in the database, as the Dispatcher sees them.

What accepted jobs will cost is held in their tenants' budgets, and their work counts for the number
of replicas. Their images come into the queue later, a few at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from ..request import Precision
from ..settings.application import JobSettings
from ..settings.models import Model
from .protocol import Pools

if TYPE_CHECKING:
    from sqlalchemy import Connection


LEAST_S = 0.05  # between two readings


class StoredWork(NamedTuple):
    """The jobs of a tenant, lane, model and precision that wait; `work_s`: of all their images."""

    tenant: str
    lane: str
    model: str
    precision: str
    jobs: int
    work_s: float


def stored_work(connection: Connection) -> list[StoredWork]:
    """Read the jobs that wait."""
    from sqlalchemy import select

    from ..store.schema import JOB_COUNTS as COUNTS

    kind = COUNTS.c.tenant, COUNTS.c.lane, COUNTS.c.model, COUNTS.c.precision
    found = select(*kind, COUNTS.c.queued, COUNTS.c.queued_work_s).where(COUNTS.c.queued > 0)
    return [StoredWork(*row) for row in connection.execute(found)]


class JobBacklog:
    """Reads the stored work again and again; `rows`: as it was read last."""

    def __init__(
        self,
        read: Callable[[], Awaitable[list[StoredWork]]],
        then: Callable[[], None],
    ) -> None:
        """`read`: reads the stored work, or raises `OSError`. `then` is called after that."""
        self._read, self._then = read, then
        self._pools: dict[tuple[str, str], Pools] = {}  # by model and precision
        self._asked = asyncio.Event()
        self._settings = JobSettings()
        self.rows: list[StoredWork] = []

    def set_models(self, models: Iterable[Model], settings: JobSettings) -> None:
        """Serve these models from now on, with these settings."""
        self._settings = settings
        self._pools = {
            (model.id, precision): tuple(
                model.pool_name(pool)
                for pool in model.pools
                if precision in (Precision.AUTO, pool.precision)
            )
            for model in models
            for precision in Precision
        }

    def look(self) -> None:
        """Read again soon, because the stored work has changed."""
        self._asked.set()

    async def run(self, every_s: float) -> None:
        """Read the stored work for ever."""
        while True:
            with contextlib.suppress(OSError):  # the database's fault is told elsewhere
                self.rows = await self._read()
                self._then()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(every_s):
                    await self._asked.wait()
            await asyncio.sleep(LEAST_S)
            self._asked.clear()

    def held(self) -> dict[str, float]:
        """By tenant, the work that is held in its budget."""
        found: defaultdict[str, float] = defaultdict(float)
        for row in self.rows:
            found[row.tenant] += row.work_s
        return dict(found)

    def by_pool(self) -> dict[tuple[str, str], StoredWork]:
        """The stored work of all tenants by preferred pool and lane; its tenant is empty."""
        found: dict[tuple[str, str], StoredWork] = {}
        for row in self.rows:
            pools = self._pools.get((row.model, row.precision))
            if pools:
                jobs, work_s = row.jobs, row.work_s
                if before := found.get((pools[0], row.lane)):
                    jobs, work_s = jobs + before.jobs, work_s + before.work_s
                key = pools[0], row.lane
                found[key] = row._replace(tenant="", jobs=jobs, work_s=work_s)
        return found

    def as_queue(self, target_wait_s: float) -> Mapping[Pools, float]:
        """The work that the autoscaling policy is to count as waiting, by pools.

        Jobs may take `target_wait_s` of their own settings, and requests the `target_wait_s` that
        is given here: a job's work counts for as much less as it may take longer.
        """
        part = min(target_wait_s / self._settings.target_wait_s, 1.0)
        found: defaultdict[Pools, float] = defaultdict(float)
        for row in self.rows:
            pools = self._pools.get((row.model, row.precision))
            if pools and (row.lane != "batch" or self._settings.scale_up_for_batches):
                found[pools] += part * row.work_s
        return found
