"""A client's call while it is open: until its deadline, or until another call cancels it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from ...errors import DeadlineExceeded, RequestCancelled

T = TypeVar("T")


class ClientCall:
    """One request as its client sees it: with a deadline, and perhaps cancelled.

    The deadline is `timeout_s` seconds after the call began, which was `age_s` seconds ago.
    `shortened`: whether the client made that time shorter than the default. `cancelled`: whether
    `cancel` was called.
    """

    def __init__(self, timeout_s: float, *, shortened: bool = False, age_s: float = 0.0) -> None:
        self._timeout_s, self._shortened = timeout_s, shortened
        self._began = asyncio.get_running_loop().time() - age_s
        self._deadline = self._began + timeout_s
        self._client: asyncio.Task[Any] | None = None  # the task that waits for the work
        self._work: asyncio.Task[Any] | None = None
        self.cancelled = False

    def cancel(self) -> None:
        """Make `run` raise `RequestCancelled`, now or when it is called next."""
        self.cancelled = True
        if self._work:
            self._work.cancel()

    @property
    def unwanted(self) -> bool:
        """Return whether the client has ended the call, and so pays for the steps that were done.

        The client has ended a call that it cancelled, one from which it disconnected, and one that
        missed a deadline which the client had shortened. It has not ended a call that missed the
        default deadline.
        """
        if self.cancelled:
            return True
        if self._late:
            return self._shortened
        return self._client is not None and self._client.cancelling() > 0

    @property
    def age_s(self) -> float:
        """Seconds since the call began."""
        return asyncio.get_running_loop().time() - self._began

    @property
    def _late(self) -> bool:
        return asyncio.get_running_loop().time() >= self._deadline

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` and return its result.

        Raises `DeadlineExceeded` if the deadline passes first, `RequestCancelled` if the call is
        cancelled, and whatever `work` raises.
        """
        self._client = own = asyncio.current_task()
        self._work = task = asyncio.create_task(work)
        if self.cancelled:
            task.cancel()
        try:
            async with asyncio.timeout_at(self._deadline) as limit:
                return await task
        except TimeoutError:
            if not limit.expired():
                raise  # the error was raised by the work
            raise DeadlineExceeded(f"the images were not done in {self._timeout_s:g} s") from None
        except asyncio.CancelledError:
            if not self.cancelled or (own and own.cancelling()):
                raise  # the client has gone
            raise RequestCancelled("the request was cancelled") from None
        finally:
            task.cancel()
