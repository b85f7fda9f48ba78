"""Models and pools come, change and go while requests are served; nothing else restarts."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import ray

from serve.launch import RunningApplication
from serve.settings.application import Settings

from ..wait import wait_for
from .faulty import TIMED

FIRST = {"Generator-landscapes-fp8", "Generator-landscapes-fp16"}
SECOND = f"Generator-{TIMED}-fp16"


def replicas() -> dict[str, set[int]]:
    """The process ids of the living replicas, by deployment."""
    found: dict[str, set[int]] = {}
    for actor in ray._private.state.actors().values():
        if actor["State"] == "ALIVE" and (actor["Name"] or "").startswith("SERVE_REPLICA"):
            found.setdefault(actor["Name"].split("#")[1], set()).add(actor["Pid"])
    return found


@contextmanager
def clients(url: str) -> Iterator[Counter[int]]:
    """Two clients that each send ten requests a second, at most, to the first model's FP8 pool.

    Yields the number of answers by status. Without a pause the clients would keep a core busy.
    """
    answers: Counter[int] = Counter()
    ended = threading.Event()
    body = {"prompt": "dunes", "num_inference_steps": 1, "size": "64x64", "precision": "fp8"}

    def ask() -> None:
        with httpx.Client(timeout=120) as client:
            while not ended.wait(0.1):
                answer = client.post(f"{url}/v1/images/generations", json=body)
                answers[answer.status_code] += 1

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def with_second_model(settings: Settings, slots: int) -> Settings:
    """The settings with a second model: a copy of the first one's 16-bit pool, with `slots`.

    Its Generators only wait, see `faulty`.
    """
    (model,) = settings.models
    pool = model.pools[1].model_copy(update={"min_replicas": 1, "slots": slots})
    copy: Any = {"id": TIMED, "pools": (pool,), "max_sequence_length": 16}
    return settings.model_copy(update={"models": (model, model.model_copy(update=copy))})


@pytest.fixture
def before(octet: RunningApplication) -> Iterator[Settings]:
    """The settings before the test, which hold again after it."""
    before = octet.settings
    yield before
    octet.apply(before)


def test_a_change_of_models_and_pools_restarts_nothing_else(
    octet: RunningApplication, url: str, before: Settings
) -> None:
    body = {"prompt": "dunes", "num_inference_steps": 1, "size": "64x64", "model": TIMED}

    def models() -> list[str]:
        return [one["id"] for one in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]]

    def second() -> httpx.Response:
        return httpx.post(f"{url}/v1/images/generations", json=body, timeout=120)

    wait_for(lambda: replicas().keys() >= FIRST)
    at_first = replicas()
    with clients(url) as answers:
        assert octet.apply(with_second_model(before, slots=4)) == [SECOND]
        wait_for(lambda: models() == ["landscapes", TIMED])
        assert second().status_code == 200  # it waits for the first replica of its pool
        ready = httpx.get(f"{url}/ready", timeout=60).json()
        assert (ready["status"], [*ready["models"]]) == ("ready", ["landscapes", TIMED])
        added = replicas()
        (old,) = added.pop(SECOND)
        assert added == at_first

        # Another number of slots takes a new replica of this pool alone.
        assert octet.apply(with_second_model(before, slots=2)) == [SECOND]
        wait_for(lambda: old not in replicas().get(SECOND, {old}))
        resized = replicas()
        del resized[SECOND]
        assert resized == at_first

        assert octet.apply(before) == []
        wait_for(lambda: models() == ["landscapes"])
        assert second().status_code == 404
        wait_for(lambda: SECOND not in replicas())
        assert replicas() == at_first

        # The model comes back. The Ingress has a handle of its earlier pool.
        assert octet.apply(with_second_model(before, slots=4)) == [SECOND]
        wait_for(lambda: models() == ["landscapes", TIMED])
        assert second().status_code == 200
        assert octet.apply(before) == []
        wait_for(lambda: SECOND not in replicas())
        assert replicas() == at_first
        count = answers[200]
        wait_for(lambda: answers[200] > count + 4)
    assert set(answers) == {200}
