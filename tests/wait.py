"""Waiting for an event."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 300.0  # only a test that fails waits for so long, however slow the machine is


def wait_for(truth: Callable[[], bool]) -> None:
    """Wait until `truth` returns True; the test fails if that takes longer than `PATIENCE_S`."""
    deadline = time.monotonic() + PATIENCE_S
    while not truth():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)
