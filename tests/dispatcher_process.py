"""A Dispatcher in a process of its own, which can be killed at chosen points of a charge.

    python -m tests.dispatcher_process SOCKET DATABASE_JSON

For each line of its input, which is a point or empty, the process forks a Dispatcher, and prints a
line when it has died. Each call of a Dispatcher is one connection to a Unix socket: the name of the
method and its arguments, pickled; then its result, or the items of its stream. With a point the
Dispatcher kills itself when a charge gets there for the third time.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import pickle
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from .builders import ROOT

# From the arrival of a usage record to the confirmation that its session hears.
POINTS = (
    *("told", "queued", "append", "begun", "inserted", "summed", "before-commit"),
    *("committed", "before-confirm", "confirmed"),
)
PATIENCE_S = 60.0  # only a test that fails waits for so long
PASSES = 3  # of a point, until the process kills itself there


class RemoteDispatcher:
    """The methods of a Dispatcher in another process. A call fails while there is none."""

    def __init__(self, socket: Path) -> None:
        self._socket = str(socket)

    def __getattr__(self, method: str) -> Any:
        return self._stream if method == "session" else _Call(self._socket, method)

    async def _stream(self, *arguments: Any) -> AsyncIterator[Any]:
        reader, writer = await asyncio.open_unix_connection(self._socket)
        try:
            await _send(writer, ("session", arguments))
            while True:
                yield await _receive(reader)
        except asyncio.IncompleteReadError:
            raise ConnectionError("the dispatcher died") from None
        finally:
            writer.close()


class _Call:
    def __init__(self, socket: str, method: str) -> None:
        self._socket, self._method = socket, method

    async def __call__(self, *arguments: Any) -> Any:
        reader, writer = await asyncio.open_unix_connection(self._socket)
        try:
            await _send(writer, (self._method, arguments))
            result = await _receive(reader)
        except asyncio.IncompleteReadError:
            raise ConnectionError("the dispatcher died") from None
        finally:
            writer.close()
        if isinstance(result, Exception):
            raise result
        return result


async def _send(writer: asyncio.StreamWriter, message: object) -> None:
    content = pickle.dumps(message)
    writer.write(len(content).to_bytes(8, "big") + content)
    await writer.drain()


async def _receive(reader: asyncio.StreamReader) -> Any:
    size = int.from_bytes(await reader.readexactly(8), "big")
    return pickle.loads(await reader.readexactly(size))  # noqa: S301 - our own process


class DispatcherProcess:
    """Starts Dispatchers one after the other on the same socket and database."""

    def __init__(self, folder: Path, database: dict[str, Any]) -> None:
        self.socket = folder / "dispatcher"
        command = [sys.executable, "-W", "ignore", "-m", "tests.dispatcher_process"]
        self._process = subprocess.Popen(  # noqa: S603 - our own process
            [*command, str(self.socket), json.dumps(database)],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def start(self, point: str = "") -> None:
        """Start a Dispatcher that kills itself at a point; without one it lives on."""
        assert self._process.stdin
        self._process.stdin.write(point + "\n")
        self._process.stdin.flush()

    def wait_until_it_died(self) -> None:
        """Wait until the Dispatcher has killed itself."""
        assert self._process.stdout
        ready, *_ = select.select([self._process.stdout], [], [], PATIENCE_S)
        assert ready, "the Dispatcher did not get there"
        assert self._process.stdout.readline() == "died\n"

    def stop(self) -> None:
        """Kill the Dispatcher."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


# -- in the other process -------------------------------------------------------------------------


def kill_at(point: str) -> None:
    """Wrap what a charge passes through, so that the process kills itself at a point."""
    from serve.dispatch.dispatcher import Dispatcher
    from serve.dispatch.metering import Metering
    from serve.usage import ledger
    from serve.usage.ledger import UsageLedger

    passed = 0

    def reach() -> None:
        nonlocal passed
        passed += 1
        if passed >= PASSES:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(
        where: Any, name: str, *, after: bool, only: Callable[..., bool] | None = None
    ) -> None:
        inner = getattr(where, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            counts = only(*arguments) if only else True
            if not after and counts:
                reach()
            result = inner(*arguments, **named)
            if after and counts:
                reach()
            return result

        setattr(where, name, wrapped)

    def has_usages(_: Any, __: str, update: Any) -> bool:
        return bool(update.usages)

    places: dict[str, Callable[[], None]] = {
        "told": lambda: around(Dispatcher, "tell", after=False, only=has_usages),
        "queued": lambda: around(Metering, "charge", after=True),
        "append": lambda: around(UsageLedger, "append_soon", after=False),
        "begun": lambda: around(ledger, "_fresh", after=False),
        "inserted": lambda: around(ledger, "_insert", after=True),
        "summed": lambda: around(ledger, "_add_to_sums", after=True),
        "before-commit": lambda: around(ledger, "_Written", after=True),
        "committed": lambda: around(UsageLedger, "_learned", after=False),
        "before-confirm": lambda: around(Metering, "_confirm", after=False),
        "confirmed": lambda: around(Metering, "_confirm", after=True),
    }
    if point:
        places[point]()


async def _serve(socket: str, database: dict[str, Any]) -> None:
    from dataclasses import replace

    from .in_process import PROMPT, a_dispatcher

    pools = "landscapes-fp8", "landscapes-fp16"
    timing = replace(PROMPT, recovery_s=0.3, tenants_s=0.1, charge_retry_s=0.1)
    dispatcher = a_dispatcher(*pools, max_queued=100, database=database, timing=timing)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            method, arguments = await _receive(reader)
            work = getattr(dispatcher, method)(*arguments)
            if hasattr(work, "__anext__"):
                async for item in work:
                    await _send(writer, item)
                return
            try:
                result = await work
            except Exception as error:
                result = error
            await _send(writer, result)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_unix_server(answer, socket) as server:
        await server.serve_forever()


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, however it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main(socket: str, database: dict[str, Any]) -> None:
    die_with_parent()
    from serve.tenants import administration, registry  # noqa: F401 - imported before the forks
    from serve.usage import leases, ledger  # noqa: F401

    from . import in_process  # noqa: F401

    for line in sys.stdin:
        Path(socket).unlink(missing_ok=True)
        child = os.fork()
        if not child:
            die_with_parent()
            kill_at(line.strip())
            asyncio.run(_serve(socket, database))
        os.waitpid(child, 0)
        sys.stdout.write("died\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
