"""Computing in a thread that ends afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


async def apart(compute: Callable[[], T]) -> T:
    """Call `compute` in a thread of its own, and return its result.

    On a CPU, OpenMP keeps worker threads for every living thread that has computed. With more
    workers than cores they no longer busy-wait for their next task, which slows down a model that
    runs many short computations. So models are loaded in a thread that ends. Then only the thread
    that runs the model has workers.
    """
    thread = ThreadPoolExecutor(1)
    try:
        return await asyncio.wrap_future(thread.submit(compute))
    finally:
        thread.shutdown(wait=False)  # a caller that is cancelled must not hold up the event loop
