"""A PostgreSQL server for tests, which can be paused, killed and started again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import psutil
import pytest

from .ports import free_port
from .wait import wait_for

# Debian keeps the programs of each version in a folder of its own.
INSTALLED = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
BIN = INSTALLED[-1] if INSTALLED else Path(shutil.which("initdb") or "").parent
USER = "postgres" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root


class PostgresServer:
    """A PostgreSQL server on a free port.

    Skips the test if PostgreSQL is not installed; fails if the environment requires it.
    """

    def __init__(self) -> None:
        if not (BIN / "initdb").exists():
            if os.environ.get("REQUIRE_SERVERS"):
                pytest.fail("postgresql is not installed")
            pytest.skip("postgresql is not installed")
        self.port = free_port()
        self.url = f"postgresql://tester@127.0.0.1:{self.port}/postgres"
        self._folder = tempfile.TemporaryDirectory(prefix="tests-of-octet-")
        if USER:
            shutil.chown(self._folder.name, USER)
        self._data = f"{self._folder.name}/data"
        self._run("initdb", "-D", self._data, "-U", "tester", "--auth=trust", "-E", "UTF8")
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(  # noqa: S603 - PostgreSQL's own programs
            [BIN / program, *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            user=USER,
            cwd=self._folder.name,
        )

    def start(self) -> None:
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": self._folder.name}
        self._process = subprocess.Popen(  # noqa: S603 - PostgreSQL's own program
            [
                *(BIN / "postgres", "-D", self._data, "-p", str(self.port)),
                *(word for name, value in options.items() for word in ("-c", f"{name}={value}")),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=USER,
            cwd=self._folder.name,
        )
        wait_for(self._answers)

    def _answers(self) -> bool:
        done = subprocess.run(  # noqa: S603 - PostgreSQL's own program
            [BIN / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)], check=False
        )
        return done.returncode == 0

    def kill(self) -> None:
        """End the server and its sessions without a chance to write anything more."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        server = psutil.Process(self._process.pid)
        for process in (server, *server.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # a session that has just ended
                process.send_signal(number)

    def close(self) -> None:
        if self._process.poll() is None:
            self.resume()
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
        self._folder.cleanup()
