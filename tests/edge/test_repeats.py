"""Repeated requests over HTTP: from the memory of an Ingress, or through a real Redis."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from serve.results.cache.circuit_breaker import FAILURES
from serve.results.cache.redis import ANSWER_S, PREFIX
from serve.settings.application import CacheSettings, Settings

from ..redis_server import RedisServer
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


def ask(client: httpx.Client, *, headers: dict[str, str] | None = None, **body: Any) -> Any:
    body = {"prompt": "dunes", "seed": 7, **body}
    return client.post(GENERATE, json=body, headers=headers or {})


def use(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.headers["x-octet-cache"]


def image(answer: httpx.Response, i: int = 0) -> bytes:
    return base64.b64decode(answer.json()["data"][i]["b64_json"])


def test_the_second_time_it_is_there(edge: Edge, client: httpx.Client) -> None:
    first, second = ask(client), ask(client)
    assert (use(first), use(second)) == ("miss", "hit")
    assert {**first.json(), "created": 0} == {**second.json(), "created": 0}
    assert edge.painter.generated == 1
    assert use(ask(client, seed=8)) == "miss"
    assert use(ask(client, n=2)) == "miss"  # another call
    assert use(again := ask(client, n=2)) == "hit"
    assert [item["seed"] for item in again.json()["data"]] == [7, 8]
    assert image(again, 0) == image(first)


def test_without_a_seed_or_when_asked_not_to_it_is_drawn(edge: Edge, client: httpx.Client) -> None:
    ask(client)
    assert use(ask(client, seed=None)) == "off"
    assert use(ask(client, headers={"cache-control": "max-age=0, No-Cache"})) == "off"
    assert use(ask(client, headers={"cache-control": "no-store"})) == "off"
    assert edge.painter.generated == 4
    assert use(ask(client, headers={"cache-control": "max-age=0"})) == "hit"


def test_as_a_url_and_as_a_stream(edge: Edge, client: httpx.Client) -> None:
    drawn = image(ask(client))
    url = ask(client, response_format="url")
    assert use(url) == "hit"
    assert httpx.get(url.json()["data"][0]["url"]).content == drawn
    stream = ask(client, stream=True, partial_images=2)
    assert use(stream) == "hit"
    (event,) = [json.loads(line[6:]) for line in stream.text.splitlines() if line[:5] == "data:"]
    assert event["type"] == "image_generation.completed"
    assert base64.b64decode(event["b64_json"]) == drawn
    assert edge.painter.generated == 1
    assert use(ask(client, seed=9, stream=True)) == "miss"
    until(lambda: use(ask(client, seed=9)) == "hit")


def test_what_fails_is_not_remembered(edge: Edge, client: httpx.Client) -> None:
    for _ in range(2):
        with httpx.Client(base_url=edge.url) as own:
            assert ask(own, prompt="broken").status_code == 500
    assert ask(client, precision="fp32").status_code == 400
    assert not edge.ingress.reuse.in_flight


def slow(client: httpx.Client, **body: Any) -> Any:
    return ask(client, prompt="slow", **body)


def test_equal_requests_at_the_same_time_are_one(edge: Edge, client: httpx.Client) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: slow(client), range(8)))
    uses = Counter(map(use, answers))
    assert uses["miss"] == 1
    assert uses["shared"] + uses["hit"] == 7
    assert uses["shared"] > 3
    assert edge.painter.generated == 1
    assert len({image(answer) for answer in answers}) == 1
    until(lambda: not edge.ingress.reuse.in_flight)


def test_cancelling_one_of_them_ends_that_one(edge: Edge, client: httpx.Client) -> None:
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(slow, client, headers={"x-request-id": "first"})
        time.sleep(0.1)
        others = [
            pool.submit(slow, client, headers={"x-request-id": name})
            for name in ("second", "third")
        ]
        time.sleep(0.1)
        for name in ("first", "third"):
            assert client.delete(f"/v1/requests/{name}").status_code == 200
        codes = [answer.result().status_code for answer in (first, *others)]
    assert codes == [499, 200, 499]
    assert edge.painter.generated == 1


def until(truth: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# -- Redis ----------------------------------------------------------------------------------------


@pytest.fixture
def shared(laptop: Settings, redis: RedisServer, tmp_path: Path) -> Settings:
    cache = CacheSettings(redis_url=redis.url)
    return laptop.model_copy(update={"data_folder": str(tmp_path), "cache": cache})


@pytest.fixture
def told(redis: RedisServer) -> Iterator[Redis]:
    with Redis.from_url(redis.url) as told:
        told.flushall()
        yield told


def test_another_ingress_has_it_too(shared: Settings) -> None:
    with started(shared) as one, httpx.Client(base_url=one.url) as client:
        url = ask(client, response_format="url").json()["data"][0]["url"]
        until(lambda: use(ask(client)) == "hit")
    with started(shared) as other, httpx.Client(base_url=other.url) as client:
        again = ask(client, response_format="url")
        assert use(again) == "hit"
        path = again.json()["data"][0]["url"].partition("?")[0]
        assert (
            path.rpartition("/")[2] == url.partition("?")[0].rpartition("/")[2]
        )  # not stored again
        assert other.painter.generated == 0


def test_redis_knows_neither_prompts_nor_images(shared: Settings, told: Redis) -> None:
    with started(shared) as edge, httpx.Client(base_url=edge.url) as client:
        ask(client, prompt="canary")
        until(lambda: bool(told.keys()))
        (key,) = told.keys()
        value = told.get(key)
    assert key.startswith(PREFIX.encode())
    assert b"canary" not in key + value
    assert len(value) < 500
    keep = shared.results
    most = keep.max_age_s - keep.link_expires_s
    assert most - 60 < told.ttl(key) <= most


def test_an_image_that_is_gone_or_another_is_a_miss(
    shared: Settings, told: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    with started(shared) as edge, httpx.Client(base_url=edge.url) as client:

        def remembered() -> tuple[bytes, Any, Path]:
            in_flight = edge.ingress.reuse.in_flight  # they are written when they end
            until(lambda: use(ask(client)) == "hit" and not in_flight and bool(told.keys()))
            (key,) = told.keys()
            (entry,) = json.loads(told.get(key))
            return key, entry, Path(str(shared.data_folder)) / "images" / entry["name"]

        _, _, file = remembered()
        file.unlink()
        assert use(ask(client)) == "miss"
        _, _, file = remembered()
        file.write_bytes(b"another")
        assert use(ask(client)) == "miss"
        key, entry, _ = remembered()
        for broken in (
            json.dumps([{**entry, "name": entry["name"].replace("anonymous", "other")}]),
            json.dumps([{**entry, "timings": {}}]),
            json.dumps({"name": "x"}),
            "not JSON",
            b"\xff",
        ):
            told.set(key, broken)
            assert use(ask(client)) == "miss"
            remembered()
    assert "a value that Octet did not write" in caplog.text


def load(edge: Edge, seconds: float) -> tuple[Counter[Any], list[float]]:
    """What eight clients with repeated requests are answered, and how long that takes."""
    answers: Counter[Any] = Counter()
    took: list[float] = []

    def one(number: int) -> None:
        with httpx.Client(base_url=edge.url, timeout=10) as client:
            while time.monotonic() < until_s:
                began = time.monotonic()
                answer = ask(client, seed=number)
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

        # It hangs for good: waiting for it ends soon, and who has waited spares the others.
        redis.pause()
        try:
            answers, took = load(edge, 2)
        finally:
            redis.resume()
        assert {status for status, _ in answers} == {200}
        late = [s for s in took if s > ANSWER_S]
        assert len(late) <= 3 * FAILURES * 8
        assert len(late) < len(took) / 4
        until(lambda: load(edge, 0.2)[0][200, "hit"] > 0, 15)


def test_passwords_come_from_a_file(redis: RedisServer, shared: Settings, tmp_path: Path) -> None:
    with Redis.from_url(redis.url) as admin:
        admin.config_set("requirepass", "secret")
        try:
            (tmp_path / "password").write_text("secret\n")
            file = str(tmp_path / "password")
            cache = CacheSettings(redis_url=redis.url, redis_password_file=file)
            settings = shared.model_copy(update={"cache": cache})
            with started(settings) as edge, httpx.Client(base_url=edge.url) as client:
                ask(client)
                until(lambda: use(ask(client)) == "hit")
        finally:
            admin.auth("secret")
            admin.config_set("requirepass", "")
