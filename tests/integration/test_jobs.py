"""Jobs on real Ray while processes are killed."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import psutil
import pytest
from sqlalchemy import func, select

from serve.launch import RunningApplication
from serve.store.database import Database
from serve.store.schema import JOBS

from ..builders import ROOT
from ..job_journal import JobJournal, WebhookReceiver, some_of
from ..stored import store_in
from ..wait import wait_for
from .faulty import IDLE
from .test_faults import replicas

CONTROLLER = "ServeController"
QUICK = {"prompt": "dunes", "num_inference_steps": 2, "size": "64x64", "guidance_scale": IDLE}


@pytest.fixture
def journal(octet: RunningApplication) -> Iterator[JobJournal]:
    receiver = WebhookReceiver()
    yield JobJournal(octet.url, receiver)
    receiver.close()


def test_no_job_is_lost_or_charged_twice_when_processes_are_killed(
    octet: RunningApplication, journal: JobJournal
) -> None:
    """Some fifty jobs, while runner, Ingress and a Generator are killed, one each time."""
    folder = Path(str(octet.settings.data_folder))
    bodies = [{**QUICK, "seed": i, "n": 1 + (i % 7 == 0)} for i in range(44)]
    with closing(Database(**store_in(folder))) as database:
        sending = threading.Thread(target=journal.send_all, args=(bodies,))
        sending.start()
        wait_for(lambda: len(journal.promised) > 10)
        long = [journal.send({**QUICK, "num_inference_steps": 100}) for _ in range(5)]
        for deployment in ("Jobs", "Ingress", "Generator-landscapes-fp8"):
            # All others may have ended before this process looks at them.
            long.append(journal.send({**QUICK, "num_inference_steps": 100}))
            states = {id: journal.state(id) for id in list(journal.promised)}
            wait_for(lambda: any(journal.state(id) == "running" for id in list(journal.promised)))
            (pid,) = [pid for pid, name in replicas().items() if name == deployment]
            os.kill(pid, signal.SIGKILL)
            assert {"queued", "running"} & set(states.values())
            if deployment == "Jobs":
                journal.cancel([*long, *some_of(list(journal.promised), 3, seed=1)])
        sending.join()
        journal.cancel(long)
        ended = journal.check(database, lambda name: (folder / "images" / name).exists())
    assert ended["succeeded"] >= 40
    assert ended["cancelled"] >= 4
    assert ended.total() == 52


KILLS = 30
KILLED = (
    *("Jobs", "Ingress", "Dispatcher", "TextEncoder-landscapes"),
    *("Generator-landscapes-fp8", "Generator-landscapes-fp16", CONTROLLER),
)
REPORT = ROOT / "build" / "job-faults.md"


def processes(name: str) -> list[int]:
    """The ids of the processes of a deployment, or of Ray Serve's controller."""
    if name != CONTROLLER:
        return [pid for pid, found in replicas().items() if found == name]
    found = psutil.Process().children(recursive=True)
    return [one.pid for one in found if CONTROLLER in " ".join(cmdline(one))]


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:  # it has ended meanwhile
        return []


@pytest.mark.long
def test_thirty_random_kills(octet: RunningApplication, journal: JobJournal) -> None:
    """The next one is killed when the last one is back and images are done again.

    Writes a report.
    """
    folder = Path(str(octet.settings.data_folder))
    chance, killed = random.Random(25), Counter[str]()
    ended = threading.Event()

    def send() -> None:
        number = 0
        while not ended.is_set():
            bodies = [{**QUICK, "seed": number + i} for i in range(8)]
            ids = journal.send_all(bodies, clients=4)
            number += len(bodies)
            wait_for(partial(any_succeeded, journal, ids))

    began = time.monotonic()
    sending = threading.Thread(target=send)
    with closing(Database(**store_in(folder))) as database:
        sending.start()
        try:
            for _ in range(KILLS):
                wait_for(partial(has_done_more, database, succeeded(database)))
                name = chance.choice(KILLED)
                (pid,) = processes(name)
                os.kill(pid, signal.SIGKILL)
                killed[name] += 1
                wait_for(partial(is_back, name, pid))
        finally:
            ended.set()
            sending.join()
        states = journal.check(database, lambda name: (folder / "images" / name).exists())
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(report(journal, killed, states, time.monotonic() - began), encoding="utf-8")
    assert killed.total() == KILLS
    assert states == {"succeeded": len(journal.promised)}


def any_succeeded(journal: JobJournal, ids: list[str]) -> bool:
    return any(journal.state(id) == "succeeded" for id in ids)


def has_done_more(database: Database, than: int) -> bool:
    return succeeded(database) > than + 4


def is_back(name: str, before: int) -> bool:
    return any(pid != before for pid in processes(name))


def succeeded(database: Database) -> int:
    found = select(func.count()).where(JOBS.c.state == "succeeded")
    return int(database.read(lambda c: c.execute(found).scalar_one()))


def report(journal: JobJournal, killed: Counter[str], states: Counter[str], seconds: float) -> str:
    lines = [
        f"{killed.total()} processes were killed by SIGKILL in {seconds:.0f} s, each when the last "
        "one was back, while clients sent jobs. Each job was accepted once, ended once, was "
        "charged once, and its webhook heard of one end.",
        "",
        "| killed | times |",
        "|---|---|",
        *(f"| {name} | {times} |" for name, times in sorted(killed.items())),
        "",
        "| jobs | |",
        "|---|---|",
        *(f"| {state} | {number} |" for state, number in states.items()),
        *(f"| {name} | 0 |" for name in ("lost", "accepted or charged twice", "left open")),
        "",
        f"Requests that clients had to send again: {journal.refused.total()}.",
        "",
    ]
    return "\n".join(lines)
