"""Writes of many callers in one transaction, because a commit costs more than what it commits."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection

from ..errors import OctetError
from .database import Database

T = TypeVar("T")

MOST = 64  # writes in one transaction


class _Write(NamedTuple):
    work: Callable[[Connection], Any]
    done: asyncio.Future[Any]


class GroupedWrites:
    """Commits together what callers write while an earlier transaction runs.

    Needs a running event loop.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: deque[_Write] = deque()
        self._writing: asyncio.Task[None] | None = None

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Call `work` in a transaction, and return its result once that is committed.

        `work` may raise an `OctetError` before it writes anything; only its own caller gets it.
        Raises `StoreUnavailable` if the database fails or does not answer in time. Whether the
        transaction was committed is then unknown, so `work` must be something that may be done
        again. What was begun goes on if the caller is cancelled.
        """
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Write(work, done))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())
        return await done

    async def _write(self) -> None:
        while self._waiting:
            group = [self._waiting.popleft() for _ in range(min(MOST, len(self._waiting)))]
            try:
                found = await self._database.write_soon(partial(_all, group))
            except OSError as error:
                for one in group:
                    if not one.done.done():
                        one.done.set_exception(error)
                continue
            except Exception as error:
                if len(group) == 1:
                    if not group[0].done.done():
                        group[0].done.set_exception(error)
                else:  # each by itself, so that one fault is not that of all
                    for one in group:
                        await self._alone(one)
                continue
            for one, result in zip(group, found, strict=True):
                if one.done.done():  # its caller was cancelled
                    continue
                if isinstance(result, OctetError):
                    one.done.set_exception(result)
                else:
                    one.done.set_result(result)

    async def _alone(self, one: _Write) -> None:
        try:
            result = await self._database.write_soon(one.work)
        except Exception as error:
            if not one.done.done():
                one.done.set_exception(error)
        else:
            if not one.done.done():
                one.done.set_result(result)


def _all(group: list[_Write], connection: Connection) -> list[Any]:
    return [_tried(one.work, connection) for one in group]


def _tried(work: Callable[[Connection], T], connection: Connection) -> T | OctetError:
    try:
        return work(connection)
    except OctetError as error:
        return error
