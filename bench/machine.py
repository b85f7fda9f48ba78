"""The machine of a measurement, so that tables of different machines can be compared."""

from __future__ import annotations

import hashlib
import os
import platform
import time

PASSES = 20


def machine() -> str:
    """The machine in words: its architecture, the cores this process may use, and their speed."""
    cores = len(os.sched_getaffinity(0))
    return f"{platform.machine()}, {cores} core{'s' * (cores > 1)}, speed {speed():.2f}"


def speed() -> float:
    """Passes of a calibration loop in a millisecond of one core, by the fastest of `PASSES` runs.

    A run does what a server in Python does most: it handles dictionaries and strings, and hashes.
    Machines that give the same number are equally fast for this purpose.
    """
    best = min(_seconds(200) for _ in range(PASSES))
    return 200 / best / 1000


def _seconds(passes: int) -> float:
    began = time.process_time()
    for _ in range(passes):
        words = {f"key-{i}": i for i in range(100)}
        text = ",".join(sorted(words))
        hashlib.sha256(text.encode()).hexdigest()
    return time.process_time() - began
