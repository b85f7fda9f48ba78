"""Repeated requests over HTTP, cached in the memory of an Ingress or in a real Redis."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, cast

import httpx
import pytest
from redis import Redis

from serve.results.cache.circuit_breaker import FAILURES
from serve.results.cache.redis import ANSWER_S, PREFIX
from serve.settings.application import CacheSettings, Settings

from ..redis_server import RedisServer
from ..wait import wait_for
from .edge import Edge, started

GENERATE = "/v1/images/generations"
Start = Callable[..., Edge]


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.close()


@pytest.fixture(params=["memory", "redis"])
def edge(request: pytest.FixtureRequest, laptop: Settings, tmp_path: Path) -> Iterator[Edge]:
    cache = CacheSettings()
    if request.param == "redis":
        cache = CacheSettings(redis_url=request.getfixturevalue("redis").url)
    with started(laptop.model_copy(update={"data_folder": str(tmp_path), "cache": cache})) as edge:
        yield edge


@pytest.fixture
def client(edge: Edge) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=edge.url, timeout=10) as client:
        yield client


def post(client: httpx.Client, *, headers: dict[str, str] | None = None, **body: Any) -> Any:
    body = {"prompt": "dunes", "seed": 7, **body}
    return client.post(GENERATE, json=body, headers=headers or {})


def cache_use(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.headers["x-octet-cache"])


def image(answer: httpx.Response, i: int = 0) -> bytes:
    return base64.b64decode(answer.json()["data"][i]["b64_json"])


def test_a_repeated_request_is_a_hit(edge: Edge, client: httpx.Client) -> None:
    first, second = post(client), post(client)
    assert (cache_use(first), cache_use(second)) == ("miss", "hit")
    assert {**first.json(), "created": 0} == {**second.json(), "created": 0}
    assert edge.painter.generated == 1
    assert cache_use(post(client, seed=8)) == "miss"
    assert cache_use(post(client, n=2)) == "miss"  # another call
    assert cache_use(again := post(client, n=2)) == "hit"
    assert [item["seed"] for item in again.json()["data"]] == [7, 8]
    assert image(again, 0) == image(first)


def test_without_a_seed_or_with_no_cache_an_image_is_generated(
    edge: Edge, client: httpx.Client
) -> None:
    post(client)
    assert cache_use(post(client, seed=None)) == "off"
    assert cache_use(post(client, headers={"cache-control": "max-age=0, No-Cache"})) == "off"
    assert cache_use(post(client, headers={"cache-control": "no-store"})) == "off"
    assert edge.painter.generated == 4
    assert cache_use(post(client, headers={"cache-control": "max-age=0"})) == "hit"


def test_a_hit_is_answered_as_a_url_and_as_a_stream(edge: Edge, client: httpx.Client) -> None:
    generated = image(post(client))
    url = post(client, response_format="url")
    assert cache_use(url) == "hit"
    assert httpx.get(url.json()["data"][0]["url"]).content == generated
    stream = post(client, stream=True, partial_images=2)
    assert cache_use(stream) == "hit"
    (event,) = [json.loads(line[6:]) for line in stream.text.splitlines() if line[:5] == "data:"]
    assert event["type"] == "image_generation.completed"
    assert base64.b64decode(event["b64_json"]) == generated
    assert edge.painter.generated == 1
    assert cache_use(post(client, seed=9, stream=True)) == "miss"
    wait_for(lambda: cache_use(post(client, seed=9)) == "hit")


def test_failed_requests_are_not_cached(edge: Edge, client: httpx.Client) -> None:
    for _ in range(2):
        with httpx.Client(base_url=edge.url) as own:
            assert post(own, prompt="broken").status_code == 500
    assert post(client, precision="fp32").status_code == 400
    assert not edge.ingress.reuse.in_flight


def test_equal_requests_at_the_same_time_are_one(edge: Edge, client: httpx.Client) -> None:
    names = [f"equal-{i}" for i in range(8)]
    with ThreadPoolExecutor(8) as pool, edge.painter.holding():
        asked = [pool.submit(post_held, client, name) for name in names]
        edge.wait_until_open(*names)
    answers = [answer.result() for answer in asked]
    assert Counter(map(cache_use, answers)) == {"miss": 1, "shared": 7}
    assert edge.painter.generated == 1
    assert len({image(answer) for answer in answers}) == 1
    wait_for(lambda: not edge.ingress.reuse.in_flight)


def post_held(client: httpx.Client, request_id: str) -> Any:
    return post(client, prompt="held", headers={"x-request-id": request_id})


def test_cancelling_one_of_several_equal_requests_ends_only_that_one(
    edge: Edge, client: httpx.Client
) -> None:
    with ThreadPoolExecutor(3) as pool, edge.painter.holding():
        first = pool.submit(post_held, client, "first")
        edge.wait_until_open("first")
        second, third = (pool.submit(post_held, client, name) for name in ("second", "third"))
        edge.wait_until_open("second", "third")
        for cancelled in ("first", "third"):
            assert client.delete(f"/v1/requests/{cancelled}").status_code == 200
        assert (first.result().status_code, third.result().status_code) == (499, 499)
    assert second.result().status_code == 200
    assert edge.painter.generated == 1


# -- Redis ----------------------------------------------------------------------------------------


@pytest.fixture
def shared(laptop: Settings, redis: RedisServer, tmp_path: Path) -> Settings:
    cache = CacheSettings(redis_url=redis.url)
    return laptop.model_copy(update={"data_folder": str(tmp_path), "cache": cache})


@pytest.fixture
def redis_client(redis: RedisServer) -> Iterator[Redis]:
    with Redis.from_url(redis.url) as client:
        client.flushall()
        yield client


def only_entry(redis_client: Redis) -> tuple[bytes, bytes]:
    """The only key in Redis, and its value."""
    (key,) = cast(list[bytes], redis_client.keys())
    return key, cast(bytes, redis_client.get(key))


def test_another_ingress_finds_the_cached_images(shared: Settings) -> None:
    with started(shared) as one, httpx.Client(base_url=one.url) as client:
        url = post(client, response_format="url").json()["data"][0]["url"]
        wait_for(lambda: cache_use(post(client)) == "hit")
    with started(shared) as other, httpx.Client(base_url=other.url) as client:
        again = post(client, response_format="url")
        assert cache_use(again) == "hit"
        path = again.json()["data"][0]["url"].partition("?")[0]
        assert (
            path.rpartition("/")[2] == url.partition("?")[0].rpartition("/")[2]
        )  # not stored again
        assert other.painter.generated == 0


def test_equal_requests_at_different_ingresses_are_one(
    shared: Settings, redis_client: Redis
) -> None:
    with (
        started(shared, ingresses=3) as edge,
        ExitStack() as opened,
        ThreadPoolExecutor(6) as pool,
    ):
        clients = [opened.enter_context(httpx.Client(base_url=url)) for url in edge.urls]
        names = [f"equal-{i}" for i in range(6)]
        with edge.painter.holding():
            asked = [pool.submit(post_held, clients[i % 3], name) for i, name in enumerate(names)]
            edge.wait_until_open(*names)
        answers = [answer.result() for answer in asked]
        assert Counter(map(cache_use, answers)) == {"miss": 1, "shared": 5}
        assert len({image(answer) for answer in answers}) == 1
        assert edge.painter.begun == 1
        wait_for(lambda: not any(ingress.reuse.in_flight for ingress in edge.ingresses))


def test_a_follower_generates_the_image_if_its_leader_is_cancelled(
    shared: Settings, redis_client: Redis
) -> None:
    with (
        started(shared, ingresses=2) as edge,
        ThreadPoolExecutor(2) as pool,
        httpx.Client(base_url=edge.urls[0]) as one,
        httpx.Client(base_url=edge.urls[1]) as other,
    ):
        with edge.painter.holding():
            leader = pool.submit(post_held, one, "leader")
            edge.wait_until_open("leader")
            follower = pool.submit(post_held, other, "follower")
            edge.wait_until_open("follower")
            assert edge.painter.begun == 1
            assert one.delete("/v1/requests/leader").status_code == 200
            assert leader.result().status_code == 499
            wait_for(lambda: edge.painter.begun == 2)
        assert cache_use(follower.result()) == "miss"
        wait_for(lambda: cache_use(post(one, prompt="held")) == "hit")


def test_redis_knows_neither_prompts_nor_images(shared: Settings, redis_client: Redis) -> None:
    with started(shared) as edge, httpx.Client(base_url=edge.url) as client:
        post(client, prompt="canary")
        wait_for(lambda: bool(redis_client.keys()))
        key, value = only_entry(redis_client)
    assert key.startswith(PREFIX.encode())
    assert b"canary" not in key + value
    assert len(value) < 500
    keep = shared.results
    most = keep.max_age_s - keep.link_expires_s
    assert most - 60 < redis_client.ttl(key) <= most


def test_a_deleted_or_changed_image_is_a_miss(
    shared: Settings, redis_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    with started(shared) as edge, httpx.Client(base_url=edge.url) as client:

        def cached() -> tuple[bytes, Any, Path]:
            """Wait until the image is cached; return its key, its entry and its file."""
            wait_for(lambda: cache_use(post(client)) == "hit")
            wait_for(lambda: not edge.ingress.reuse.in_flight and bool(redis_client.keys()))
            key, value = only_entry(redis_client)
            (entry,) = json.loads(value)
            return key, entry, Path(str(shared.data_folder)) / "images" / entry["name"]

        _, _, file = cached()
        file.unlink()
        assert cache_use(post(client)) == "miss"
        _, _, file = cached()
        file.write_bytes(b"another")
        assert cache_use(post(client)) == "miss"
        key, entry, _ = cached()
        for broken in (
            json.dumps([{**entry, "name": entry["name"].replace("anonymous", "other")}]),
            json.dumps([{**entry, "timings": {}}]),
            json.dumps({"name": "x"}),
            "not JSON",
            b"\xff",
        ):
            redis_client.set(key, broken)
            assert cache_use(post(client)) == "miss"
            cached()
    assert "a value that Octet did not write" in caplog.text


def load(edge: Edge, seconds: float) -> tuple[Counter[Any], list[float]]:
    """The answers to eight clients with repeated requests, and the seconds of each."""
    answers: Counter[Any] = Counter()
    took: list[float] = []

    def one(number: int) -> None:
        with httpx.Client(base_url=edge.url, timeout=10) as client:
            while time.monotonic() < until_s:
                began = time.monotonic()
                answer = post(client, seed=number)
                took.append(time.monotonic() - began)
                answers[answer.status_code, answer.headers.get("x-octet-cache")] += 1

    until_s = time.monotonic() + seconds
    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, took


def test_redis_may_hang_and_die_under_load(shared: Settings, redis: RedisServer) -> None:
    with started(shared) as edge, ThreadPoolExecutor(1) as pool:
        running = pool.submit(load, edge, 4)
        for harm, repair in ((redis.pause, redis.resume), (redis.kill, redis.start)):
            time.sleep(0.7)
            harm()
            time.sleep(0.7)
            repair()
        answers, _ = running.result()
        assert {status for status, _ in answers} == {200}
        assert answers[200, "hit"] > 10
        assert answers[200, "miss"] > 10

        # Redis hangs for good: a request waits a short time, and after some no other one does.
        redis.pause()
        try:
            answers, took = load(edge, 2)
        finally:
            redis.resume()
        assert {status for status, _ in answers} == {200}
        # Most requests do not ask Redis any more. One that waited for it takes that much longer.
        late = [s for s in took if s > median(took) + ANSWER_S]
        assert len(late) <= 3 * FAILURES * 8
        assert len(late) < len(took) / 4
        wait_for(lambda: load(edge, 0.2)[0][200, "hit"] > 0)


def test_passwords_come_from_a_file(redis: RedisServer, shared: Settings, tmp_path: Path) -> None:
    with Redis.from_url(redis.url) as admin:
        admin.config_set("requirepass", "secret")
        try:
            (tmp_path / "password").write_text("secret\n")
            file = str(tmp_path / "password")
            cache = CacheSettings(redis_url=redis.url, redis_password_file=file)
            settings = shared.model_copy(update={"cache": cache})
            with started(settings) as edge, httpx.Client(base_url=edge.url) as client:
                post(client)
                wait_for(lambda: cache_use(post(client)) == "hit")
        finally:
            admin.auth("secret")
            admin.config_set("requirepass", "")
