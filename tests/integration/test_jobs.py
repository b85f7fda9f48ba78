"""Jobs on real Ray while processes are killed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from serve.launch import RunningApplication
from serve.store.database import Database

from ..job_journal import JobJournal, WebhookReceiver, some_of
from ..stored import store_in
from ..wait import wait_for
from .faulty import IDLE
from .test_faults import replicas

QUICK = {"prompt": "dunes", "num_inference_steps": 2, "size": "64x64", "guidance_scale": IDLE}


@pytest.fixture
def journal(octet: RunningApplication) -> Iterator[JobJournal]:
    receiver = WebhookReceiver()
    yield JobJournal(octet.url, receiver)
    receiver.close()


def is_there(deployment: str) -> bool:
    return deployment in replicas().values()


def test_no_job_is_lost_or_charged_twice_when_processes_are_killed(
    octet: RunningApplication, journal: JobJournal
) -> None:
    """Fifty jobs in all states, while runner, Ingress and a Generator are killed, one each time."""
    folder = Path(str(octet.settings.data_folder))
    bodies = [{**QUICK, "seed": i, "n": 1 + (i % 7 == 0)} for i in range(44)]
    with closing(Database(**store_in(folder))) as database:
        sending = threading.Thread(target=journal.send_all, args=(bodies,))
        sending.start()
        wait_for(lambda: len(journal.promised) > 10)
        long = [journal.send({**QUICK, "num_inference_steps": 100}) for _ in range(6)]
        for deployment in ("Jobs", "Ingress", "Generator-landscapes-fp8"):
            states = {id: journal.state(id) for id in list(journal.promised)}
            wait_for(lambda: any(journal.state(id) == "running" for id in list(journal.promised)))
            (pid,) = [pid for pid, name in replicas().items() if name == deployment]
            os.kill(pid, signal.SIGKILL)
            assert {"queued", "running"} & set(states.values())
            wait_for(partial(is_there, deployment))
            if deployment == "Jobs":
                journal.cancel([*long, *some_of(list(journal.promised), 3, seed=1)])
        sending.join()
        ended = journal.check(database, lambda name: (folder / "images" / name).exists())
    assert ended["succeeded"] >= 40
    assert ended["cancelled"] >= 4
    assert ended.total() == 50
