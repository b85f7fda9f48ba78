"""Faults of the database, the disk, the bucket, Redis and the runner, with the oracle of jobs."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from bench.tenants import add_tenants
from serve.api.timing import INGRESS_TIMING
from serve.errors import NotFound
from serve.results.from_settings import open_store
from serve.settings.application import CacheSettings, Settings, StoreSettings
from serve.store.database import Database
from serve.usage.ledger import records

from ..full_disk import full_disk
from ..in_process import PROMPT
from ..job_journal import JobJournal, some_of
from ..postgres_server import PostgresServer
from ..redis_server import RedisServer
from ..s3 import FaultProxy, a_bucket, s3_server
from ..stored import store_in
from ..wait import wait_for
from .databases import emptied
from .edge import Edge, started

TIMING = replace(INGRESS_TIMING, dispatch=replace(PROMPT, record_s=3.0))
GENERATE = "/v1/images/generations"
JOBS = 50
MOST_WAITING = 100  # jobs beyond which clients wait, so that a long outage leaves no thousands


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest, laptop: Settings, tmp_path: Path) -> Settings:
    """A server with one database or the other, which gives up transactions after a second."""
    store = StoreSettings()
    if request.param == "postgresql":
        store = StoreSettings(url=emptied(request.getfixturevalue("postgres")), answer_s=1.0)
    return laptop.model_copy(update={"data_folder": str(tmp_path), "store": store})


@pytest.fixture
def on_postgres(laptop: Settings, tmp_path: Path, postgres: PostgresServer) -> Settings:
    store = StoreSettings(url=emptied(postgres), answer_s=1.0)
    return laptop.model_copy(update={"data_folder": str(tmp_path), "store": store})


@pytest.fixture
def on_sqlite(laptop: Settings, tmp_path: Path) -> Settings:
    return laptop.model_copy(update={"data_folder": str(tmp_path)})


class Jobs:
    """A server with jobs in all states, whose clients go on sending."""

    def __init__(self, edge: Edge) -> None:
        self.edge, self.journal = edge, JobJournal(edge.url)

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.edge.loop).result()

    def succeeded(self) -> int:
        """How many images were generated so far; a fault is over when there are more."""
        return self.edge.painter.generated

    def wait_for_more(self) -> None:
        before = self.edge.painter.generated
        wait_for(lambda: self.edge.painter.generated > before + 4)


def body(number: int) -> dict[str, Any]:
    """The request of a job: plain, slow, deadly or of two images."""
    prompts = "slow", "deadly", "plain", "slow", "plain"
    return {"prompt": prompts[number % 5], "n": 2 if number % 7 == 0 else 1, "seed": number}


@contextmanager
def jobs_under(settings: Settings, runners: int = 1) -> Iterator[Jobs]:
    """Send jobs until the block ends, and then hold them against the oracle."""
    with started(settings, TIMING, ingresses=2, runners=runners) as edge:
        wait_for(lambda: edge.dispatcher.metering.ledger is not None)
        jobs = Jobs(edge)
        ended = threading.Event()

        def send() -> None:
            number = 0
            while not ended.is_set() or number < JOBS:
                if number > edge.painter.generated + MOST_WAITING:
                    ended.wait(0.1)
                    continue
                jobs.journal.send_all(map(body, range(number, number + 10)))
                number += 10

        sending = threading.Thread(target=send)
        sending.start()
        try:
            wait_for(lambda: len(jobs.journal.promised) > 10)
            yield jobs
        finally:
            ended.set()
            sending.join()
        jobs.journal.cancel(some_of(jobs.journal.promised, 5, seed=1))
        store = open_store(settings, durable=True)

        def kept(name: str) -> bool:
            try:
                return bool(store.read(name))
            except NotFound:
                return False

        database_of = settings.database or store_in(Path(str(settings.data_folder)))
        with closing(Database(**{**database_of, "answer_s": 5.0})) as database, closing(store):
            states = jobs.journal.check(database, kept, errors=("replica_failed",))
        assert states["succeeded"] >= JOBS // 2
        assert states["failed"] >= 5


def comes_back(settings: Settings, go: Callable[[], None], come: Callable[[], None]) -> None:
    """Let something go while jobs run, until a client noticed, and come back."""
    with jobs_under(settings) as jobs:
        before = Counter(jobs.journal.refused)
        go()
        wait_for(lambda: jobs.journal.refused != before)
        come()
        jobs.wait_for_more()


def test_postgresql_is_killed_and_started_again(
    on_postgres: Settings, postgres: PostgresServer
) -> None:
    comes_back(on_postgres, postgres.kill, postgres.start)


def test_postgresql_stops_answering_for_a_while(
    on_postgres: Settings, postgres: PostgresServer
) -> None:
    comes_back(on_postgres, postgres.pause, postgres.resume)


@pytest.mark.long
def test_postgresql_stops_answering_for_20_seconds(
    on_postgres: Settings, postgres: PostgresServer
) -> None:
    def come() -> None:
        time.sleep(20)
        postgres.resume()

    comes_back(on_postgres, postgres.pause, come)


def test_the_disk_is_full_for_a_while(on_sqlite: Settings) -> None:
    """That of the database and of the images, which are on the same disk."""
    with ExitStack() as full:
        comes_back(on_sqlite, lambda: full.enter_context(full_disk()), full.close)


def runners_die(settings: Settings, runners: int) -> None:
    with jobs_under(settings, runners) as jobs:
        for _ in range(3):
            jobs.wait_for_more()
            jobs.run(jobs.edge.end_runner(jobs.edge.jobs[0], killed=True))
            jobs.run(jobs.edge.add_runner())


def test_runners_die_and_others_take_over(on_postgres: Settings) -> None:
    runners_die(on_postgres, 2)


@pytest.mark.long
def test_a_runner_dies_and_another_takes_over(on_sqlite: Settings) -> None:
    """The Dispatcher holds the dead runner's slots until its session ends."""
    runners_die(on_sqlite, 1)


def test_an_owner_is_paused_past_its_lease(settings: Settings) -> None:
    """Its loop stands still while another runner claims its jobs, and goes on afterwards."""
    with jobs_under(settings) as jobs:
        jobs.wait_for_more()
        (paused,) = jobs.edge.jobs

        async def lose() -> int:
            """Let the leases end of all that runs, as if the process had been stopped."""
            database = await paused._database.opened()
            from sqlalchemy import update

            from serve.store.schema import JOBS as TABLE

            running = TABLE.c.state == "running"
            return await paused._database.write(
                lambda c: (
                    c.execute(
                        update(TABLE).where(running).values(lease_until=database.now(c) - 1)
                    ).rowcount
                )
            )

        lost = 0
        while lost < 5:
            lost += jobs.run(lose())
            time.sleep(0.05)


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    with s3_server() as server:
        proxy = FaultProxy(server)
        yield proxy
        proxy.close()


@pytest.fixture
def on_s3(on_sqlite: Settings, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    bucket = a_bucket(proxy.upstream).model_copy(update={"endpoint_url": proxy.url})
    return on_sqlite.model_copy(update={"s3": bucket})


def objects(settings: Settings, proxy: FaultProxy) -> int:
    assert settings.s3
    client = boto3.client("s3", endpoint_url=proxy.upstream, region_name="us-east-1")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=settings.s3.bucket, Prefix="j/")
    return sum(len(page.get("Contents", ())) for page in pages)


@pytest.mark.parametrize("fault", ["refuse", "error", "lose_answers"])
def test_the_bucket_is_away_for_a_while(on_s3: Settings, proxy: FaultProxy, fault: Any) -> None:
    """Jobs wait for it with their images, and nothing is charged meanwhile."""
    with jobs_under(on_s3) as jobs:
        wait_for(lambda: objects(on_s3, proxy) > 3)
        proxy.fault = fault
        requests = proxy.requests
        wait_for(lambda: proxy.requests > requests + 5)
        stored = objects(on_s3, proxy)
        proxy.fault = "none"
        wait_for(lambda: objects(on_s3, proxy) > stored)
        assert jobs.edge.jobs[0].runner.running


@pytest.mark.long
@pytest.mark.parametrize("fault", ["refuse", "slow"])
def test_the_bucket_is_away_for_a_minute(on_s3: Settings, proxy: FaultProxy, fault: Any) -> None:
    with jobs_under(on_s3):
        wait_for(lambda: objects(on_s3, proxy) > 3)
        proxy.fault = fault
        time.sleep(60)
        proxy.fault = "none"


def test_redis_is_killed_and_stopped(on_s3: Settings) -> None:
    """Jobs do not need it; requests beside them miss the cache."""
    redis = RedisServer()
    cache = CacheSettings(redis_url=redis.url)
    try:
        with jobs_under(on_s3.model_copy(update={"cache": cache})) as jobs:
            redis.pause()
            jobs.wait_for_more()
            redis.resume()
            redis.kill()
            jobs.wait_for_more()
            redis.start()
            jobs.wait_for_more()
    finally:
        redis.close()


# -- budgets, with one database and the other -----------------------------------------------------


def test_a_budget_holds_for_requests_beside_accepted_jobs(settings: Settings) -> None:
    """With PostgreSQL the work of requests is leased from the budget, and jobs wait in it."""
    work_s = 0.001 + 28 * 0.0002  # of an image, see `WORK`
    limits = {"t": {"monthly_work": 10.2 * work_s}}
    keys = add_tenants(settings.database or {}, limits)
    headers = {"authorization": f"Bearer {keys['t']}"}
    with started(settings.model_copy(update={"auth": "keys"}), TIMING, runners=1) as edge:
        wait_for(lambda: edge.ingress._session.tenants is not None)
        wait_for(lambda: edge.dispatcher.metering.ledger is not None)
        with httpx.Client(base_url=edge.url, headers=headers, timeout=30) as client:

            def send(n: int, prompt: str, **more: str) -> httpx.Response:
                return client.post(GENERATE, json={"prompt": prompt, "n": n}, headers=more)

            with edge.painter.holding():
                jobs = [send(3, "held", prefer="respond-async") for _ in range(2)]
                assert [one.status_code for one in jobs] == [202, 202]  # 6 of 10
                wait_for(lambda: edge.dispatcher.grants.running_by_tenant()["t"] == 6)
                wait_for(lambda: send(4, "held", prefer="respond-async").status_code == 202)
                refused = send(1, "held", prefer="respond-async")
                assert refused.json()["error"]["code"] == "insufficient_quota"
                wait_for(lambda: send(1, "x").status_code == 429)
            ids = [one.json()["id"] for one in jobs]
            wait_for(lambda: all(succeeded(client, id) for id in ids))
        database_of = {**(settings.database or {}), "answer_s": 5.0}
        with closing(Database(**database_of)) as database:
            wait_for(lambda: len(list(records(database, tenant="t"))) == 10)


def succeeded(client: httpx.Client, id: str) -> bool:
    return bool(client.get(f"/v1/jobs/{id}").json()["status"] == "succeeded")
