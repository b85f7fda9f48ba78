"""Faults while images are charged, with one oracle: the clients' journal against the database.

Each image that a client got is charged once, and each refusal not at all. Of an image whose client
hung up, at most one part is charged.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.api.timing import INGRESS_TIMING
from serve.settings.application import Settings, StoreSettings
from serve.store.database import Database
from serve.usage.ledger import UsageLedger, records

from ..dispatcher_process import POINTS, DispatcherProcess, RemoteDispatcher
from ..full_disk import full_disk
from ..in_process import PROMPT
from ..postgres_server import PostgresServer
from ..stored import store_in
from ..wait import wait_for
from .databases import emptied
from .edge import Edge, started

GENERATE = "/v1/images/generations"
CLIENTS = 8
LATE_S = 20.0  # by which a reversal is written; only a test that fails waits for so long
REAL_TIME = time.time
TIMING = replace(INGRESS_TIMING, dispatch=replace(PROMPT, record_s=3.0))


class Journal:
    """What clients asked for and got, by request id: a status, or None if they hung up."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(CLIENTS)]
        self.answers: dict[str, int | None] = {}

    def _ask(self, client: int) -> None:
        chance = random.Random(client)
        number = 0
        with httpx.Client(base_url=self._edge.url, timeout=60) as http:
            while not self._ended.is_set():
                number += 1
                id = f"{client}-{number}"
                kind = chance.choice(["plain", "plain", "plain", "same", "broken", "gone"])
                body: dict[str, Any] = {"prompt": f"image {id}"}
                if kind == "same":
                    body = {"prompt": "the same", "seed": 7}  # from the result cache, or shared
                elif kind == "broken":
                    body = {"prompt": "broken"}
                elif kind == "gone":
                    body = {"prompt": "slow"}
                headers = {"x-request-id": id}
                hasty = httpx.Timeout(0.2) if kind == "gone" else httpx.USE_CLIENT_DEFAULT
                try:
                    answer = http.post(GENERATE, json=body, headers=headers, timeout=hasty)
                    self.answers[id] = answer.status_code
                except httpx.TransportError:
                    self.answers[id] = None

    def count(self, status: int) -> int:
        """How many requests got this status so far."""
        return Counter(list(self.answers.values()))[status]

    def wait_for_more(self) -> None:
        """Wait until more images were delivered than there are clients."""
        before = self.count(200)
        wait_for(lambda: self.count(200) > before + CLIENTS)

    @contextmanager
    def kept(self) -> Iterator[Journal]:
        """Send requests until the block ends, and wait for their answers."""
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            for thread in self._threads:
                thread.join()


def check(journal: Journal, database: Database) -> None:
    """The oracle."""
    charges: dict[str, Counter[str]] = defaultdict(Counter)
    work: dict[str, float] = defaultdict(float)
    for record in records(database):
        charges[record["request_id"]][record["outcome"]] += 1
        work[record["request_id"]] += record["work_s"]
    for id, status in journal.answers.items():
        found = charges[id]
        charged = found["delivered"] + found["hit"] + found["shared"] - found["reversed"]
        if status == 200:
            assert (charged, found["cancelled"]) == (1, 0), (id, found)
            free = found["hit"] or found["shared"]
            assert (abs(work[id]) < 1e-9) == bool(free), (id, found)
        elif status is None:
            assert charged + found["cancelled"] in (0, 1), (id, found)
        else:
            assert (charged, found["cancelled"]) == (0, 0), (id, status, found)
            assert abs(work[id]) < 1e-9, (id, status, work[id])
    assert charges.keys() <= journal.answers.keys()
    spent = UsageLedger(database, time.time()).spent
    assert sum(spent.values()) == pytest.approx(sum(work.values()))


def settled(journal: Journal, database: Database) -> None:
    """Wait until the oracle holds: reversals of what was refused come a moment later."""
    deadline = time.monotonic() + LATE_S
    while True:
        try:
            return check(journal, database)
        except AssertionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@pytest.fixture
def stored(
    request: pytest.FixtureRequest, laptop: Settings, tmp_path: Path
) -> tuple[Settings, dict[str, Any], Path]:
    """Settings with a database in PostgreSQL, if a test asks for it, else in SQLite."""
    store = StoreSettings()
    if "postgres" in request.fixturenames:
        store = StoreSettings(url=emptied(request.getfixturevalue("postgres")), answer_s=1.0)
    settings = laptop.model_copy(update={"data_folder": str(tmp_path), "store": store})
    return settings, settings.database or store_in(tmp_path), tmp_path


def killed_at_all_points(
    settings: Settings, database: dict[str, Any], folder: Path, points: tuple[str, ...]
) -> None:
    """Let Dispatchers die one after the other, each at another point of a charge."""
    process = DispatcherProcess(folder, database)
    with started(settings, TIMING, remote=RemoteDispatcher(process.socket)) as edge:
        journal = Journal(edge)
        try:
            with journal.kept():
                for point in points:
                    process.start(point)
                    process.wait_until_it_died()
                process.start()
                journal.wait_for_more()
            with closing(Database(**database)) as opened:
                settled(journal, opened)
        finally:
            process.stop()
    assert journal.count(200) > len(points)


def test_the_dispatcher_is_killed_at_ten_points_of_a_charge(
    stored: tuple[Settings, dict[str, Any], Path],
) -> None:
    killed_at_all_points(*stored, POINTS)


@pytest.mark.long
@pytest.mark.usefixtures("postgres")
def test_the_dispatcher_is_killed_beside_postgresql(
    stored: tuple[Settings, dict[str, Any], Path],
) -> None:
    killed_at_all_points(*stored, POINTS)


@contextmanager
def charging(settings: Settings) -> Iterator[tuple[Edge, Journal]]:
    """A server with its own Dispatcher, and clients that send requests until the block ends."""
    with started(settings, TIMING, stored=True) as edge:
        wait_for(lambda: edge.dispatcher.metering.ledger is not None)
        with Journal(edge).kept() as journal:
            journal.wait_for_more()
            yield edge, journal
        with closing(Database(**(settings.database or {}))) as opened:
            settled(journal, opened)


def goes_and_comes_back(
    settings: Settings, go: Callable[[], None], come: Callable[[], None]
) -> None:
    """Let the database go while images are charged, and come back after new work is refused."""
    with charging(settings) as (edge, journal):
        go()
        wait_for(lambda: bool(edge.dispatcher.admission.database_fault))
        refused = journal.count(503)
        wait_for(lambda: journal.count(503) > refused + 2 * CLIENTS)
        assert httpx.get(f"{edge.url}/v1/models", timeout=2).status_code == 200
        come()
        wait_for(lambda: not edge.dispatcher.admission.database_fault)
        journal.wait_for_more()


def test_postgresql_is_killed_and_started_again(
    postgres: PostgresServer, stored: tuple[Settings, dict[str, Any], Path]
) -> None:
    goes_and_comes_back(stored[0], postgres.kill, postgres.start)


def test_postgresql_stops_answering_for_a_while(
    postgres: PostgresServer, stored: tuple[Settings, dict[str, Any], Path]
) -> None:
    goes_and_comes_back(stored[0], postgres.pause, postgres.resume)


@pytest.mark.long
def test_postgresql_stops_answering_for_20_seconds(
    postgres: PostgresServer, stored: tuple[Settings, dict[str, Any], Path]
) -> None:
    def come() -> None:
        time.sleep(20)
        postgres.resume()

    goes_and_comes_back(stored[0], postgres.pause, come)


def test_the_disk_of_sqlite_is_full_for_a_while(
    stored: tuple[Settings, dict[str, Any], Path],
) -> None:
    with ExitStack() as full:
        goes_and_comes_back(stored[0], lambda: full.enter_context(full_disk()), full.close)


def test_a_clock_that_is_set_back_charges_nothing_twice(
    stored: tuple[Settings, dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also over the turn of a month, which then has come already."""
    with charging(stored[0]) as (_, journal):
        for shift_s in (0.0, -3600.0, -40 * 86400.0, 0.0):
            monkeypatch.setattr("time.time", lambda by=shift_s: REAL_TIME() + by)
            journal.wait_for_more()
        monkeypatch.undo()
