"""Computing in a thread that ends afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


async def apart(compute: Callable[[], T]) -> T:
    """Call `compute` in a thread of its own, and return its result.

    On a CPU, OpenMP keeps workers for every living thread that has computed. As soon as they are
    more than the cores, none of them waits actively for its next task any more, which makes each of
    the many short computations of a model take longer. So what loads a model computes here, and the
    thread that runs it afterwards is the only one with workers.
    """
    thread = ThreadPoolExecutor(1)
    try:
        return await asyncio.wrap_future(thread.submit(compute))
    finally:
        thread.shutdown(wait=False)  # a caller that is cancelled must not hold up the event loop
