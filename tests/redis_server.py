"""A Redis server for tests, which can be paused, killed and started again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import pytest

PROGRAM = shutil.which("redis-server")


class RedisServer:
    """A Redis server on a free port.

    Skips the test if Redis is not installed; fails if the environment requires it.
    """

    def __init__(self) -> None:
        if PROGRAM is None:
            if os.environ.get("REQUIRE_SERVERS"):
                pytest.fail("redis-server is not installed")
            pytest.skip("redis-server is not installed")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = tempfile.TemporaryDirectory()
        self.start()

    def start(self) -> None:
        options = {
            "port": self.port,
            "bind": "127.0.0.1",
            "dir": self._folder.name,
            "save": "",
            "logfile": "log",
        }
        self._process = subprocess.Popen(  # noqa: S603 - found on the path
            [str(PROGRAM), *(text for k, v in options.items() for text in (f"--{k}", str(v)))]
        )
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            assert self._process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def pause(self) -> None:
        """Let the server accept connections without answering."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.resume()
        self.kill()
        self._folder.cleanup()
