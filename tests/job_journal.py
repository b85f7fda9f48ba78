"""What clients of jobs were promised, and the oracle that compares it with what came of it.

Every job that was accepted ends exactly once. Its images are charged once, and can be read, if it
has succeeded; else nothing is charged, but for the steps of a job that was cancelled. Nothing else
is charged. Webhooks hear of each end at least once, always with the same id.
"""

from __future__ import annotations

import json
import random
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
from sqlalchemy import select

from serve.jobs.job import OPEN, Job
from serve.jobs.retention import names_of
from serve.store.database import Database
from serve.store.schema import DELIVERIES, JOB_COUNTS, JOBS, USAGE

from .wait import wait_for

GENERATE, PATH = "/v1/images/generations", "/v1/jobs"
PAUSE_S = 0.2  # before a request is sent again that was not answered


class WebhookReceiver:
    """A server for webhooks. `got`: the ids of the messages about each job or batch."""

    def __init__(self) -> None:
        self.got: defaultdict[str, list[str]] = defaultdict(list)
        got = self.got

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                got[body["data"]["id"]].append(body["id"])
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Log nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class JobJournal:
    """Sends jobs, and notes what was promised. `promised`: the ids of all accepted jobs.

    A request that is not answered with 202 is sent again with the same Idempotency-Key, as clients
    are told to do.
    """

    def __init__(self, url: str, receiver: WebhookReceiver | None = None) -> None:
        self.url, self._receiver = url, receiver
        self.promised: dict[str, dict[str, Any]] = {}
        self.cancelled: set[str] = set()
        self.refused: Counter[str] = Counter()  # answers and errors after which it tried again
        self._endpoint = ""
        if receiver:
            self._endpoint = self._call("POST", "/v1/webhook_endpoints", {"url": receiver.url})[
                "id"
            ]

    def _call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Any:
        """Send a request until it is answered."""
        while True:
            try:
                answer = httpx.request(
                    method, self.url + path, json=body, headers=headers, timeout=30
                )
            except httpx.TransportError as error:
                self.refused[type(error).__name__] += 1
            else:
                if answer.status_code < 500 and answer.headers.get("x-should-retry") != "true":
                    return answer.json()
                self.refused[str(answer.status_code)] += 1
            time.sleep(PAUSE_S)

    def send(self, body: dict[str, Any]) -> str:
        """Send a job until it is accepted; return its id."""
        headers = {"prefer": "respond-async", "idempotency-key": uuid.uuid4().hex}
        id: str = self._call("POST", GENERATE, body, headers)["id"]
        self.promised[id] = body
        return id

    def send_all(self, bodies: Iterable[dict[str, Any]], clients: int = 8) -> list[str]:
        """Send jobs from several clients at a time."""
        with ThreadPoolExecutor(clients) as pool:
            return list(pool.map(self.send, bodies))

    def cancel(self, ids: Collection[str]) -> None:
        """Cancel jobs; those that have ended already stay as they are."""
        self.cancelled.update(ids)
        for id in ids:
            self._call("DELETE", f"{PATH}/{id}")

    def state(self, id: str) -> str:
        return str(self._call("GET", f"{PATH}/{id}")["status"])

    def check(
        self, database: Database, kept: Callable[[str], bool], *, errors: Collection[str] = ()
    ) -> Counter[str]:
        """The oracle, once all jobs have ended; returns how many have ended in each state.

        `kept`: whether a name is in the result store. `errors`: the codes with which jobs may fail.
        """
        wait_for(lambda: not _open(database))
        jobs = {job.id: job for job in _all_jobs(database)}
        assert jobs.keys() == self.promised.keys(), "a job was lost, or accepted twice"
        charges: defaultdict[str, list[Any]] = defaultdict(list)
        for row in database.read(lambda c: c.execute(select(USAGE)).all()):
            if row.call.startswith("job_"):
                charges[row.call.partition(".")[0]].append(row)
        assert not charges.keys() - jobs.keys(), "a job was charged that nobody has"
        for id, job in jobs.items():
            self._check_job(job, charges[id], kept, errors)
        left = database.read(lambda c: c.execute(select(JOB_COUNTS)).all())
        assert all((row.queued, row.running) == (0, 0) for row in left), left
        if self._receiver:
            self._check_webhooks(database, jobs)
        return Counter(job.state for job in jobs.values())

    def _check_job(
        self, job: Job, charges: list[Any], kept: Callable[[str], bool], errors: Collection[str]
    ) -> None:
        images = [(row.image, row.outcome) for row in charges]
        assert len({image for image, _ in images}) == len(images), (job, charges)
        if job.state == "succeeded":
            assert sorted(images) == [(i, "delivered") for i in range(job.images)], job
            assert {row.call for row in charges} == {job.call_id}
            assert all(kept(name) for name in names_of(job)), job
            shown = self._call("GET", f"{PATH}/{job.id}")
            for image in shown["result"]["data"]:
                url = self.url + "/v1/files" + image["url"].partition("/v1/files")[2]
                assert httpx.get(url, follow_redirects=True).status_code == 200
        elif job.state == "cancelled":
            assert job.id in self.cancelled
            assert {outcome for _, outcome in images} <= {"cancelled"}, charges
        else:
            assert charges == []
            assert job.state == "failed", job
            assert any(code in (job.error or "") for code in errors), job.error

    def _check_webhooks(self, database: Database, jobs: Collection[str]) -> None:
        assert self._receiver
        of = DELIVERIES.c.endpoint == self._endpoint
        wait_for(
            lambda: all(
                row.state == "delivered"
                for row in database.read(lambda c: c.execute(select(DELIVERIES).where(of)).all())
            )
        )
        got = self._receiver.got
        assert got.keys() == set(jobs)
        assert all(len(set(ids)) == 1 for ids in got.values()), "an end was told as two events"


def _open(database: Database) -> bool:
    found = select(JOBS.c.id).where(JOBS.c.state.in_(OPEN)).limit(1)
    return database.read(lambda c: c.execute(found).first()) is not None


def _all_jobs(database: Database) -> list[Job]:
    lane = JOBS.c.lane == "job"
    return [Job(*row) for row in database.read(lambda c: c.execute(select(JOBS).where(lane)).all())]


def some_of(ids: Collection[str], number: int, seed: int) -> list[str]:
    """A few of the ids, the same for the same seed."""
    return random.Random(seed).sample(sorted(ids), number)
