"""Files and batches with OpenAI's own client, over real HTTP, and webhooks to a real server."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch

from bench.tenants import add_tenants
from serve.settings.application import JobSettings, Settings

from ..stored import store_in, usage_in
from ..wait import wait_for
from .edge import Edge, started

GENERATE = "/v1/images/generations"
SLOTS = 8  # of the two pools together
TENANTS: dict[str, dict[str, Any]] = {"acme": {}, "other": {}, "poor": {"monthly_work": 0.01}}


class Server:
    """An Ingress, a runner of jobs, and OpenAI's client of each tenant."""

    def __init__(self, edge: Edge, folder: Path, keys: dict[str, str]) -> None:
        self.edge, self.folder, self.keys = edge, folder, keys
        self.clients = {
            name: openai.OpenAI(base_url=f"{edge.url}/v1", api_key=key, max_retries=0)
            for name, key in keys.items()
        }
        self.acme = self.clients["acme"]

    def upload(self, content: bytes, tenant: str = "acme") -> str:
        client = self.clients[tenant]
        return client.files.create(file=("lines.jsonl", content), purpose="batch").id

    def create(self, content: bytes, tenant: str = "acme", **more: Any) -> Batch:
        return self.clients[tenant].batches.create(
            input_file_id=self.upload(content, tenant),
            endpoint=GENERATE,  # type: ignore[arg-type]  # newer than this client
            completion_window="24h",
            **more,
        )

    def ended(self, id: str, tenant: str = "acme") -> Batch:
        """The batch once it has ended."""
        found: list[Batch] = []

        def has_ended() -> bool:
            found[:] = [self.clients[tenant].batches.retrieve(id)]
            return found[0].status in ("completed", "failed", "expired", "cancelled")

        wait_for(has_ended)
        return found[0]

    def lines(self, file: str | None, tenant: str = "acme") -> list[dict[str, Any]]:
        assert file
        text = self.clients[tenant].files.content(file).text
        return [json.loads(line) for line in text.splitlines()]

    def charged(self, batch: str) -> int:
        """How many images of a batch were charged."""
        records = usage_in(self.folder, "acme")
        assert len({(r["call"], r["image"]) for r in records}) == len(records)
        return sum(r["request_id"] == batch for r in records)


@pytest.fixture(scope="module")
def server(laptop: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("data")
    keys = add_tenants(store_in(folder), TENANTS)
    jobs = JobSettings(max_lines=300, max_file_bytes=5_000_000)
    changes = {"auth": "keys", "data_folder": str(folder), "jobs": jobs}
    with started(laptop.model_copy(update=changes), runners=1) as edge:
        wait_for(lambda: edge.ingress._session.tenants is not None)
        server = Server(edge, folder, keys)
        yield server
        for client in server.clients.values():
            client.close()


def line(custom_id: str, **body: Any) -> bytes:
    asked = {"custom_id": custom_id, "method": "POST", "url": GENERATE, "body": body}
    return json.dumps(asked).encode() + b"\n"


def test_the_official_client_runs_a_batch_from_upload_to_output(server: Server) -> None:
    content = b"".join(line(f"line-{i}", prompt=f"hill {i}", seed=i) for i in range(250))
    batch = server.create(content, metadata={"for": "a test"})
    assert (batch.object, batch.status, batch.metadata) == (
        "batch",
        "validating",
        {"for": "a test"},
    )
    done = server.ended(batch.id)
    assert done.status == "completed"
    assert done.request_counts
    assert (done.request_counts.total, done.request_counts.completed) == (250, 250)
    assert done.error_file_id is None
    assert done.in_progress_at
    assert done.completed_at
    found = server.lines(done.output_file_id)
    assert [one["custom_id"] for one in found] == [f"line-{i}" for i in range(250)]
    for i, one in enumerate(found):
        assert (one["response"]["status_code"], one["error"]) == (200, None)
        (image,) = one["response"]["body"]["data"]
        assert image["seed"] == i
    assert httpx.get(image["url"]).content.startswith(b"\x89PNG")
    assert server.charged(batch.id) == 250
    jobs = httpx.get(
        f"{server.edge.url}/v1/jobs",
        params={"batch_id": batch.id, "limit": "100"},
        headers={"authorization": f"Bearer {server.keys['acme']}"},
    ).json()
    assert len(jobs["data"]) == 100
    assert jobs["has_more"]


def test_lines_that_cannot_be_served_are_in_the_error_file(server: Server) -> None:
    content = b"\n".join(
        (
            line("good", prompt="a hill", response_format="b64_json"),
            b"",  # blank lines do not count
            line("unknown", prompt="x", sise="64x64"),
            line("deadly", prompt="deadly"),
            line("no-model", prompt="x", model="none").strip(),
        )
    )
    done = server.ended(server.create(content).id)
    assert done.status == "completed"
    counts = done.request_counts
    assert counts
    assert (counts.total, counts.completed, counts.failed) == (4, 1, 3)
    (good,) = server.lines(done.output_file_id)
    assert good["response"]["body"]["data"][0]["b64_json"]
    found = {
        one["custom_id"]: (
            one["response"]["status_code"],
            one["response"]["body"]["error"]["code"],
        )
        for one in server.lines(done.error_file_id)
    }
    assert found == {
        "unknown": (400, "invalid_value"),
        "deadly": (503, "replica_failed"),
        "no-model": (404, "model_not_found"),
    }


@pytest.mark.parametrize(
    ("content", "code", "at"),
    [
        (b"", "empty_file", None),
        (b"\n \n", "empty_file", None),
        (line("a", prompt="x") + b"no json\n", "invalid_json_line", 2),
        (b"[1]\n", "invalid_json_line", 1),
        (line("a", prompt="x") * 2, "duplicate_custom_id", 2),
        (b'{"custom_id": "a", "method": "POST", "url": "x"}', "missing_required_parameter", 1),
        (line("a").replace(b"POST", b"GET"), "invalid_method", 1),
        (line("a").replace(b"generations", b"edits"), "mismatched_url", 1),
        (line("").replace(b'""', b"5"), "invalid_custom_id", 1),
        (line("a").replace(b"{}", b"[]"), "invalid_body", 1),
        # PostgreSQL could not keep these.
        (line("a\0"), "invalid_custom_id", 1),
        (line("a\ud800"), "invalid_custom_id", 1),
        (line("a", prompt="x" * 2_000_000), "line_too_long", 1),
        (b"".join(line(str(i), prompt="x") for i in range(301)), "too_many_lines", None),
        (b"[" * 100_000 + b"\n", "invalid_json_line", 1),
    ],
)
def test_a_file_that_is_no_batch_is_refused_as_a_whole(
    server: Server, content: bytes, code: str, at: int | None
) -> None:
    done = server.ended(server.create(content).id)
    assert done.status == "failed"
    assert done.errors
    assert done.errors.data
    assert (done.errors.data[0].code, done.errors.data[0].line) == (code, at)
    assert done.output_file_id is done.error_file_id is None
    assert server.charged(done.id) == 0


def test_a_cancelled_batch_ends_and_says_so_of_each_line(server: Server) -> None:
    with server.edge.painter.holding():
        content = b"".join(line(str(i), prompt="held") for i in range(120))
        batch = server.create(content)
        wait_for(lambda: server.acme.batches.retrieve(batch.id).status == "in_progress")
        wait_for(lambda: bool(server.edge.dispatcher.grants.running_by_tenant()))
        assert server.acme.batches.cancel(batch.id).status in ("cancelling", "cancelled")
        done = server.ended(batch.id)
    assert done.status == "cancelled"
    found = server.lines(done.error_file_id)
    assert Counter(one["error"]["code"] for one in found) == {"batch_cancelled": 120}
    with pytest.raises(openai.ConflictError):
        server.acme.batches.cancel(server.ended(server.create(line("a", prompt="x")).id).id)


def test_a_batch_is_cancelled_although_its_tenant_may_have_nothing_waiting(
    server: Server,
) -> None:
    """Lines that end at once need no place among those that wait."""
    settings = server.edge.settings
    few = settings.jobs.model_copy(update={"max_queued": 150})
    with server.edge.painter.holding():
        server.edge.tune(settings.model_copy(update={"jobs": few}))
        batch = server.create(b"".join(line(str(i), prompt="held") for i in range(150)))
        wait_for(lambda: server.acme.batches.retrieve(batch.id).status == "in_progress")
        none = settings.jobs.model_copy(update={"max_queued": 1})
        server.edge.tune(settings.model_copy(update={"jobs": none}))
        server.acme.batches.cancel(batch.id)
        assert server.ended(batch.id).status == "cancelled"
        with pytest.raises(openai.BadRequestError, match="you may have 1 waiting"):
            server.create(line("a", prompt="x") + line("b", prompt="x"))
    server.edge.tune(settings)


def test_a_line_is_not_cancelled_alone(server: Server) -> None:
    with server.edge.painter.holding():
        batch = server.create(line("a", prompt="held"))
        headers = {"authorization": f"Bearer {server.keys['acme']}"}
        url, query = f"{server.edge.url}/v1/jobs", {"batch_id": batch.id}
        wait_for(lambda: bool(httpx.get(url, params=query, headers=headers).json()["data"]))
        (job,) = httpx.get(url, params=query, headers=headers).json()["data"]
        assert httpx.delete(f"{url}/{job['id']}", headers=headers).status_code == 409
    assert server.ended(batch.id).status == "completed"


def test_a_key_gets_the_same_batch_again(server: Server) -> None:
    file = server.upload(line("a", prompt="x"))
    given = {"endpoint": GENERATE, "completion_window": "24h"}
    made = [
        server.acme.batches.create(
            input_file_id=file,
            extra_headers={"idempotency-key": "batch-one"},
            **given,  # type: ignore[arg-type]
        )
        for _ in range(2)
    ]
    assert made[0].id == made[1].id
    with pytest.raises(openai.UnprocessableEntityError):
        server.acme.batches.create(
            input_file_id=server.upload(line("b", prompt="x")),
            extra_headers={"idempotency-key": "batch-one"},
            **given,  # type: ignore[arg-type]
        )
    server.ended(made[0].id)


def test_a_budget_ends_a_batch_in_its_middle(server: Server) -> None:
    content = b"".join(line(str(i), prompt="x", num_inference_steps=10) for i in range(5))  # 3 ms
    done = server.ended(server.create(content, "poor").id, "poor")
    counts = done.request_counts
    assert counts
    assert (counts.completed, counts.failed) == (3, 2)
    codes = [
        one["response"]["body"]["error"]["code"] for one in server.lines(done.error_file_id, "poor")
    ]
    assert codes == ["insufficient_quota"] * 2


def has_moved(server: Server, id: str, before: Any) -> bool:
    """Return whether more lines have ended than before, or all."""
    batch = server.acme.batches.retrieve(id)
    return batch.request_counts != before or batch.status == "completed"


def test_reading_goes_on_in_the_middle_of_a_file_after_a_death(server: Server) -> None:
    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, server.edge.loop).result()

    content = b"".join(line(f"line-{i}", prompt=f"hill {i}") for i in range(300))
    killed = 0
    batch = server.create(content)
    while killed < 3:
        counts = server.acme.batches.retrieve(batch.id).request_counts
        run(server.edge.end_runner(server.edge.jobs[0], killed=True))
        run(server.edge.add_runner())
        killed += 1
        wait_for(partial(has_moved, server, batch.id, counts))
    done = server.ended(batch.id)
    assert done.status == "completed"
    found = server.lines(done.output_file_id)
    assert [one["custom_id"] for one in found] == [f"line-{i}" for i in range(300)]
    assert server.charged(batch.id) == 300


def test_files_are_listed_read_and_deleted(server: Server) -> None:
    client = server.clients["other"]
    content = line("a", prompt="ä")
    id = server.upload(content, "other")
    (listed,) = client.files.list().data
    assert (listed.id, listed.bytes, listed.filename) == (id, len(content), "lines.jsonl")
    assert client.files.retrieve(id).purpose == "batch"
    assert client.files.content(id).content == content
    for tenant in ("acme", "poor"):
        with pytest.raises(openai.NotFoundError):
            server.clients[tenant].files.content(id)
    assert client.files.delete(id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(id)
    with pytest.raises(openai.BadRequestError, match="purpose must be batch"):
        client.files.create(file=("a", b"x"), purpose="assistants")
    with pytest.raises(openai.BadRequestError, match="none of your files"):
        client.batches.create(
            input_file_id=id,
            endpoint=GENERATE,  # type: ignore[arg-type]
            completion_window="24h",
        )


def test_a_file_that_a_batch_reads_stays(server: Server) -> None:
    with server.edge.painter.holding():
        batch = server.create(line("a", prompt="held"))
        with pytest.raises(openai.ConflictError):
            server.acme.files.delete(batch.input_file_id)
    server.ended(batch.id)
    assert server.acme.files.delete(batch.input_file_id).deleted


def test_a_tenant_may_keep_only_so_many_bytes(server: Server) -> None:
    settings, poor = server.edge.settings, server.clients["poor"]
    for file in poor.files.list():
        poor.files.delete(file.id)
    jobs = settings.jobs.model_copy(update={"max_stored_file_bytes": 100})
    server.edge.tune(settings.model_copy(update={"jobs": jobs}))
    try:
        id = server.upload(b"x" * 90, "poor")
        with pytest.raises(openai.APIStatusError) as refused:
            server.upload(b"x" * 90, "poor")
        assert refused.value.status_code == 413
        server.upload(b"x" * 10, "poor")
        with pytest.raises(openai.RateLimitError, match="delete some of them"):
            server.upload(b"x", "poor")
        poor.files.delete(id)
        server.upload(b"x", "poor")
    finally:
        server.edge.tune(settings)


def test_a_large_file_is_stored_in_parts(server: Server) -> None:
    content = b"".join(line(str(i), prompt="x" * 20_000) for i in range(200))  # 4 MB
    id = server.upload(content)
    assert server.acme.files.content(id).content == content
    too_large = b"x" * 6_000_000
    with pytest.raises(openai.APIStatusError) as refused:
        server.upload(too_large)
    assert refused.value.status_code == 413


def test_a_request_waits_for_no_more_than_the_running_images_of_a_batch(server: Server) -> None:
    painter, queue = server.edge.painter, server.edge.dispatcher.grants.queue
    key = {"authorization": f"Bearer {server.keys['acme']}"}
    with ThreadPoolExecutor(1) as pool:
        with painter.holding():
            batch = server.create(b"".join(line(str(i), prompt="held") for i in range(60)))
            wait_for(lambda: len(queue) >= SLOTS)
            assert {image.tenant for image in queue} == {"acme/batch"}
            before = len(painter.prompts)
            url, body = server.edge.url + GENERATE, {"prompt": "in a hurry"}
            answer = pool.submit(httpx.post, url, json=body, headers=key, timeout=30)
            wait_for(lambda: any(image.tenant == "acme" for image in queue))
        assert answer.result().status_code == 200
    assert painter.prompts[before:].index("in a hurry") < 2 * SLOTS
    assert server.ended(batch.id).status == "completed"


def test_batches_leave_free_slots_to_others(server: Server) -> None:
    painter, grants = server.edge.painter, server.edge.dispatcher.grants
    settings = server.edge.settings
    jobs = settings.jobs.model_copy(update={"batch_free_slots": 3})
    server.edge.tune(settings.model_copy(update={"jobs": jobs}))
    try:
        with painter.holding():
            batch = server.create(b"".join(line(str(i), prompt="held") for i in range(60)))
            wait_for(lambda: len(grants.queue) >= 2)  # two lines run, and as many wait
            assert [grants.free_slots(pool) for pool in grants.pools] == [3, 3]
            assert server.acme.images.generate(prompt="x").data  # finds a free slot
        assert server.ended(batch.id).status == "completed"
    finally:
        server.edge.tune(settings)
