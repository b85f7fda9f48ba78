"""Jobs over real HTTP: accepted, run, watched, cancelled, and never lost."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from typer.testing import CliRunner

from bench.tenants import add_tenants
from serve.cli.main import app
from serve.jobs.claims import JobClaim, give_back
from serve.settings.application import Settings

from ..builders import ROOT
from ..stored import store_in, usage_in
from ..wait import wait_for
from .conforms import CONFORMS
from .edge import Edge, started

GENERATE, EDIT, JOBS = "/v1/images/generations", "/v1/images/edits", "/v1/jobs"
ASYNC = {"prefer": "respond-async"}
PICTURE = (Path(__file__).parents[1] / "edits" / "plain.png").read_bytes()
TENANTS: dict[str, dict[str, Any]] = {
    "acme": {},
    "other": {},
    "poor": {"monthly_work": 0.05},
    "few": {"max_queued_jobs": 2},
    "rated": {"requests_per_s": 0.001, "request_burst": 2},
}


class Server:
    """Two Ingresses and a runner of jobs, and a client of each tenant."""

    def __init__(self, edge: Edge, folder: Path, keys: dict[str, str]) -> None:
        self.edge, self.folder = edge, folder
        self.clients = {
            name: httpx.Client(
                base_url=edge.url, headers={"authorization": f"Bearer {key}"}, timeout=30
            )
            for name, key in keys.items()
        }
        self.acme = self.clients["acme"]

    def ended(self, id: str, tenant: str = "acme") -> dict[str, Any]:
        """The job once it has ended."""
        found: dict[str, Any] = {}

        def has_ended() -> bool:
            found.update(self.clients[tenant].get(f"{JOBS}/{id}").json())
            return found["completed_at"] is not None

        wait_for(has_ended)
        return found

    def usage(self, id: str, tenant: str = "acme") -> list[dict[str, Any]]:
        """The usage records of a job."""
        records = usage_in(self.folder, tenant)
        return [one for one in records if one["call"].startswith(f"{id}.")]


@pytest.fixture(scope="module")
def server(laptop: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("data")
    keys = add_tenants(store_in(folder), TENANTS)
    changes = {"auth": "keys", "data_folder": str(folder)}
    with started(laptop.model_copy(update=changes), ingresses=2, runners=1) as edge:
        wait_for(lambda: all(one._session.tenants is not None for one in edge.ingresses))
        server = Server(edge, folder, keys)
        yield server
        for client in server.clients.values():
            client.close()


def test_a_generation_that_prefers_it_becomes_a_job_and_is_charged_once(server: Server) -> None:
    body = {"prompt": "a hill", "n": 2, "seed": 5}
    accepted = server.acme.post(GENERATE, json=body, headers={**ASYNC, "x-request-id": "mine"})
    job = accepted.json()
    assert accepted.status_code == 202
    assert accepted.headers["location"] == f"{JOBS}/{job['id']}"
    assert accepted.headers["preference-applied"] == "respond-async"
    assert (job["status"], job["request_id"], job["result"]) == ("queued", "mine", None)
    done = server.ended(job["id"])
    assert done["status"] == "succeeded"
    assert [image["seed"] for image in done["result"]["data"]] == [5, 6]
    for image in done["result"]["data"]:
        assert httpx.get(image["url"]).content.startswith(b"\x89PNG")
    records = server.usage(job["id"])
    assert [(r["image"], r["outcome"], r["request_id"]) for r in records] == [
        (0, "delivered", "mine"),
        (1, "delivered", "mine"),
    ]
    assert all(record["work_s"] > 0 for record in records)


def accepted(answer: httpx.Response) -> str:
    assert answer.status_code == 202, answer.text
    id: str = answer.json()["id"]
    return id


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_a_job_is_posted_with_the_path_and_body_of_its_request(server: Server) -> None:
    body = {"prompt": "x", "response_format": "b64_json", "output_format": "webp"}
    id = accepted(server.acme.post(JOBS, json={"url": GENERATE, "body": body}))
    (image,) = server.ended(id)["result"]["data"]
    assert base64.b64decode(image["b64_json"]).startswith(b"RIFF")
    (listed,) = [j for j in server.acme.get(JOBS).json()["data"] if j["id"] == id]
    assert listed["result"]["data"][0]["url"].startswith("http")  # a list holds no images


def test_an_edit_becomes_a_job_with_its_picture_and_mask(server: Server) -> None:
    mask = (Path(__file__).parents[1] / "edits" / "mask_alpha.png").read_bytes()
    files = {"image": ("a.png", PICTURE), "mask": ("m.png", mask)}
    at_once = server.acme.post(EDIT, data={"prompt": "night", "seed": "3"}, files=files)
    id = accepted(
        server.acme.post(EDIT, data={"prompt": "night", "seed": "3"}, files=files, headers=ASYNC)
    )
    done = server.ended(id)
    assert (done["status"], done["endpoint"]) == ("succeeded", EDIT)
    image = httpx.get(done["result"]["data"][0]["url"]).content
    expected = base64.b64decode(at_once.json()["data"][0]["b64_json"])
    with Image.open(io.BytesIO(image)) as got, Image.open(io.BytesIO(expected)) as want:
        assert np.array_equal(np.asarray(got), np.asarray(want))
    url = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"
    asked = {"url": EDIT, "body": {"prompt": "night", "images": [{"image_url": url}]}}
    assert server.ended(accepted(server.acme.post(JOBS, json=asked)))["status"] == "succeeded"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"url": GENERATE}, "body is required"),
        ({"url": "/v1/images/generation", "body": {}}, "did you mean '/v1/images/generations'"),
        ({"url": GENERATE, "body": {"prompt": "x", "sise": "1"}}, "did you mean 'size'"),
        ({"url": GENERATE, "body": {"prompt": "x", "stream": True}}, "a job has no stream"),
        ({"url": GENERATE, "body": {"prompt": "x", "timeout_s": 86401}}, "at most 86400"),
        ({"url": GENERATE, "body": {"prompt": ""}}, "prompt is empty"),
        ({"url": EDIT, "body": {"prompt": "x"}}, "images is required"),
        ([], "object"),
    ],
)
def test_a_wrong_job_is_refused_at_once(server: Server, asked: Any, expected: str) -> None:
    answer = server.acme.post(JOBS, json=asked)
    assert code(answer) == (400, "invalid_value")
    assert expected in answer.json()["error"]["message"]


def test_a_job_may_take_longer_than_a_request(server: Server) -> None:
    body = {"prompt": "x", "timeout_s": 80000}
    assert code(server.acme.post(GENERATE, json=body)) == (400, "invalid_value")
    job = server.acme.post(GENERATE, json=body, headers=ASYNC).json()
    assert job["expires_at"] - job["created_at"] == pytest.approx(80000, abs=1)
    server.ended(job["id"])


def test_a_key_gets_the_same_job_again(server: Server) -> None:
    headers = {**ASYNC, "idempotency-key": "job-one"}
    body = {"prompt": "once"}
    first = accepted(server.acme.post(GENERATE, json=body, headers=headers))
    assert accepted(server.acme.post(GENERATE, json=body, headers=headers)) == first
    other = server.acme.post(GENERATE, json={"prompt": "twice"}, headers=headers)
    assert code(other) == (422, "idempotency_key_reused")
    server.ended(first)


def test_jobs_of_others_do_not_exist(server: Server) -> None:
    id = accepted(server.acme.post(GENERATE, json={"prompt": "mine"}, headers=ASYNC))
    other = server.clients["other"]
    for answer in (
        other.get(f"{JOBS}/{id}"),
        other.delete(f"{JOBS}/{id}"),
        other.get(f"{JOBS}/{id}/events"),
        other.get(f"{JOBS}/no-such-job"),
        other.get(f"{JOBS}/%00"),
        other.get("/v1/batches/%F0%9F%8E%A8"),
        other.get("/v1/files/file_0/content"),
        other.get("/v1/webhook_endpoints/we_0"),
    ):
        assert code(answer) == (404, "not_found")
    assert other.get(JOBS).json()["data"] == []
    assert server.ended(id)["status"] == "succeeded"


def test_jobs_are_listed_in_pages_the_newest_first(server: Server) -> None:
    client = server.clients["other"]
    ids = [
        accepted(client.post(GENERATE, json={"prompt": str(i)}, headers=ASYNC)) for i in range(5)
    ]
    for id in ids:
        server.ended(id, "other")
    found: list[str] = []
    after: dict[str, str] = {}
    pages = 0
    while True:
        page = client.get(JOBS, params={"limit": 2, **after}).json()
        found += [job["id"] for job in page["data"]]
        after, pages = {"after": page["last_id"]}, pages + 1
        if not page["has_more"]:
            break
    assert found == ids[::-1]
    assert pages == 3
    assert client.get(JOBS, params={"status": "failed"}).json()["data"] == []
    for wrong in (
        {"limit": "0"},
        {"limit": "x"},
        {"status": "done"},
        {"afer": "x"},
        {"after": "\0"},
    ):
        assert code(client.get(JOBS, params=wrong)) == (400, "invalid_value")


def test_a_failed_job_says_why_and_costs_nothing(server: Server) -> None:
    id = accepted(server.acme.post(GENERATE, json={"prompt": "deadly"}, headers=ASYNC))
    done = server.ended(id)
    assert (done["status"], done["result"]) == ("failed", None)
    assert done["error"]["code"] == "replica_failed"
    assert server.usage(id) == []


def test_a_job_that_breaks_the_runner_fails_after_three_claims(server: Server) -> None:
    id = accepted(server.acme.post(GENERATE, json={"prompt": "broken"}, headers=ASYNC))
    done = server.ended(id)
    assert (done["status"], done["error"]["code"]) == ("failed", "job_lost")
    assert server.usage(id) == []


def test_a_job_that_is_not_done_in_time_expires(server: Server) -> None:
    with server.edge.painter.holding():
        body = {"prompt": "held", "timeout_s": 0.5}
        id = accepted(server.acme.post(GENERATE, json=body, headers=ASYNC))
        assert server.ended(id)["status"] == "expired"
    assert server.usage(id) == []


def test_a_running_job_is_cancelled_and_pays_for_its_steps(server: Server) -> None:
    with server.edge.painter.holding():
        cancelled = server.edge.painter.cancelled
        body = {"prompt": "held", "num_inference_steps": 10}
        id = accepted(server.acme.post(GENERATE, json=body, headers=ASYNC))
        wait_for(lambda: server.acme.get(f"{JOBS}/{id}").json()["status"] == "running")
        answer = server.acme.delete(f"{JOBS}/{id}")
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
        wait_for(lambda: server.edge.painter.cancelled == cancelled + 1)
        wait_for(lambda: bool(server.usage(id)))
    assert [(r["outcome"], r["steps"]) for r in server.usage(id)] == [("cancelled", 5)]
    assert server.acme.delete(f"{JOBS}/{id}").json()["status"] == "cancelled"
    with httpx.Client() as client:
        assert client.get(server.edge.url + "/health").status_code == 200


def test_a_job_that_has_ended_is_not_cancelled(server: Server) -> None:
    id = accepted(server.acme.post(GENERATE, json={"prompt": "x"}, headers=ASYNC))
    server.ended(id)
    assert code(server.acme.delete(f"{JOBS}/{id}")) == (409, "conflict")


def test_a_waiting_job_is_cancelled_for_nothing(server: Server) -> None:
    with server.edge.painter.holding():
        ids = [
            accepted(server.acme.post(GENERATE, json={"prompt": "held"}, headers=ASYNC))
            for _ in range(40)
        ]
        wait_for(lambda: sum(server.edge.dispatcher.grants.running_by_tenant().values()) == 8)
        last = server.acme.get(f"{JOBS}/{ids[-1]}").json()
        assert last["status"] == "queued"
        assert last["queue_position"] > 1
        for id in reversed(ids):
            assert server.acme.delete(f"{JOBS}/{id}").json()["status"] == "cancelled"
    assert server.usage(ids[-1]) == []
    wait_for(lambda: not server.edge.jobs[0].runner.running)


def test_jobs_are_accepted_as_far_as_the_budget_holds_them(server: Server) -> None:
    poor = server.clients["poor"]
    with server.edge.painter.holding():
        body = {"prompt": "held", "num_inference_steps": 100}  # 0.021 s of work
        ids = [accepted(poor.post(GENERATE, json=body, headers=ASYNC)) for _ in range(2)]
        assert code(poor.post(GENERATE, json=body, headers=ASYNC)) == (429, "insufficient_quota")
        # What jobs will cost is kept for them.
        assert code(poor.post(GENERATE, json={**body, "prompt": "x"})) == (
            429,
            "insufficient_quota",
        )
    assert [server.ended(id, "poor")["status"] for id in ids] == ["succeeded"] * 2
    small = {"prompt": "x", "num_inference_steps": 10}
    wait_for(lambda: poor.post(GENERATE, json=small).status_code == 200)
    assert code(poor.post(GENERATE, json={**body, "prompt": "x"})) == (429, "insufficient_quota")


def test_a_tenant_may_have_only_so_many_jobs_waiting(server: Server) -> None:
    few = server.clients["few"]
    with server.edge.painter.holding():
        answers: list[httpx.Response] = []
        while len(answers) < 60 and (not answers or answers[-1].status_code == 202):
            answers.append(few.post(GENERATE, json={"prompt": "held"}, headers=ASYNC))
        assert code(answers[-1]) == (429, "queue_full")
        for answer in answers[:-1]:
            few.delete(f"{JOBS}/{answer.json()['id']}")


def test_the_request_rate_is_paid_at_the_acceptance(server: Server) -> None:
    rated = server.clients["rated"]
    ids = [accepted(rated.post(GENERATE, json={"prompt": "x"}, headers=ASYNC)) for _ in range(2)]
    refused = rated.post(GENERATE, json={"prompt": "x"}, headers=ASYNC)
    assert code(refused) == (429, "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) > 100
    assert [server.ended(id, "rated")["status"] for id in ids] == ["succeeded"] * 2


def events_of(client: httpx.Client, id: str, last: str = "") -> Iterator[dict[str, Any]]:
    headers = {"last-event-id": last} if last else {}
    with client.stream("GET", f"{JOBS}/{id}/events", headers=headers) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        event: dict[str, Any] = {}
        for line in stream.iter_lines():
            name, _, value = line.partition(": ")
            if name in ("id", "event"):
                event[name] = value
            elif name == "data":
                event["job"] = json.loads(value)
            elif not line and event:
                yield event
                event = {}


def test_a_job_tells_its_events_and_a_client_takes_them_up_again(server: Server) -> None:
    with server.edge.painter.holding():
        id = accepted(server.acme.post(GENERATE, json={"prompt": "held"}, headers=ASYNC))
        for event in events_of(server.acme, id):
            if event["event"] == "job.running":
                break
        wait_for(lambda: server.acme.get(f"{JOBS}/{id}").json()["progress"] == 0.0)
    seen = list(events_of(server.acme, id, event["id"]))
    assert event["id"] not in [one["id"] for one in seen]
    assert seen[-1]["event"] == "job.succeeded"
    assert seen[-1]["job"]["result"]["data"][0]["url"]
    again = server.acme.get(f"{JOBS}/{id}/events", headers={"last-event-id": seen[-1]["id"]})
    assert again.status_code == 204  # nothing more will come


def test_a_tenant_may_watch_only_so_many_jobs_at_a_time(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = server.edge.ingress._stored
    assert stored
    wait_for(lambda: not stored.jobs._streams)  # those of earlier tests have ended
    monkeypatch.setattr("serve.api.job_routes.MOST_STREAMS", 1)
    with server.edge.painter.holding():
        id = accepted(server.acme.post(GENERATE, json={"prompt": "held"}, headers=ASYNC))
        with server.acme.stream("GET", f"{JOBS}/{id}/events") as stream:
            assert stream.status_code == 200
            refused = server.acme.get(f"{JOBS}/{id}/events")
            assert code(refused) == (429, "rate_limit_exceeded")
    server.ended(id)
    wait_for(lambda: server.acme.get(f"{JOBS}/{id}/events").status_code == 200)


def run(server: Server, work: Any) -> Any:
    return asyncio.run_coroutine_threadsafe(work, server.edge.loop).result()


def test_a_runner_that_ends_gives_its_jobs_back_at_once(server: Server) -> None:
    with server.edge.painter.holding():
        id = accepted(server.acme.post(GENERATE, json={"prompt": "held"}, headers=ASYNC))
        wait_for(lambda: server.acme.get(f"{JOBS}/{id}").json()["status"] == "running")
        run(server, server.edge.end_runner(server.edge.jobs[0]))
        assert server.acme.get(f"{JOBS}/{id}").json()["status"] == "queued"
    run(server, server.edge.add_runner())
    assert server.ended(id)["status"] == "succeeded"
    assert [r["outcome"] for r in server.usage(id)] == ["delivered"]


def test_a_runner_that_is_killed_loses_no_job_and_none_is_charged_twice(server: Server) -> None:
    with server.edge.painter.holding():
        ids = [
            accepted(server.acme.post(GENERATE, json={"prompt": "held"}, headers=ASYNC))
            for _ in range(3)
        ]
        wait_for(
            lambda: all(server.acme.get(f"{JOBS}/{id}").json()["status"] == "running" for id in ids)
        )
        run(server, server.edge.end_runner(server.edge.jobs[0], killed=True))
        run(server, server.edge.add_runner())
        wait_for(lambda: len(server.edge.jobs[0].runner.running) == len(ids))
    for id in ids:
        assert server.ended(id)["status"] == "succeeded"
        assert [r["outcome"] for r in server.usage(id)] == ["delivered"]


def test_a_runner_that_was_paused_past_its_lease_ends_nothing(server: Server) -> None:
    jobs = server.edge.jobs[0]
    with server.edge.painter.holding():
        id = accepted(server.acme.post(GENERATE, json={"prompt": "held"}, headers=ASYNC))
        wait_for(lambda: server.acme.get(f"{JOBS}/{id}").json()["status"] == "running")
        (job,) = jobs.runner.running.values()

        async def lose() -> None:
            database = await jobs._database.opened()

            def work(connection: Any) -> None:
                now = database.now(connection)
                give_back(connection, [JobClaim(job.id, job.fence)], now, now, lost=True)

            await jobs._database.write(work)

        run(server, lose())
    assert server.ended(id)["status"] == "succeeded"
    (record,) = server.usage(id)
    assert record["call"] == f"{id}.{job.fence + 1}"  # only the later claim has charged


def test_answers_are_what_the_openapi_document_says(server: Server) -> None:
    key = server.acme.headers["authorization"]
    document = schemathesis.openapi.from_url(
        f"{server.edge.url}/openapi.json", headers={"authorization": key}
    )
    results = document.get_all_operations()
    operations = [found.ok() for found in results if isinstance(found, Ok)]
    starts = "/v1/jobs", "/v1/batches", "/v1/webhook_endpoints", "/v1/files/{id}"
    operations = [o for o in operations if o.path.startswith(starts) or o.path == "/v1/files"]
    assert len(operations) == 20
    statuses = set()
    for operation in operations:
        has_body = operation.method == "post"
        for mode in GenerationMode if has_body else [GenerationMode.POSITIVE]:

            @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
            @given(operation.as_strategy(generation_mode=mode))
            def call(case: Any) -> None:
                answer = case.call_and_validate(checks=CONFORMS, headers={"authorization": key})
                assert answer.status_code < 500
                statuses.add(answer.status_code)

            call()
    assert statuses >= {200, 400, 404}, statuses


# -- octet jobs -----------------------------------------------------------------------------------


def octet(server: Server, *words: str) -> tuple[int, str]:
    """The exit code and the output of `octet jobs WORDS` with the server's settings."""
    config = server.folder / "octet.yaml"
    laptop = (ROOT / "examples" / "laptop.yaml").read_text()
    laptop = laptop.replace("../demo/model", str(ROOT / "demo" / "model"))
    config.write_text(f"data_folder: {server.folder}\n{laptop}")
    command, *more = words
    result = CliRunner().invoke(app, ["jobs", command, str(config), *more], prog_name="octet")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_an_operator_sees_jobs_but_not_what_their_tenants_wrote(server: Server) -> None:
    asked = {"prompt": "a secret plan"}
    id = accepted(server.acme.post(GENERATE, json=asked, headers=ASYNC))
    server.ended(id)
    status, output = octet(server, "list", "--tenant", "acme", "--json", "--limit", "10000")
    (listed,) = [job for job in json.loads(output) if job["id"] == id]
    assert (status, listed["state"], listed["lane"]) == (0, "succeeded", "job")
    status, output = octet(server, "show", id)
    assert (status, json.loads(output)) == (0, listed)
    assert "secret" not in output
    assert octet(server, "list", "--tenant", "nobody", "--json") == (0, "[]\n")
    for command in ("retry", "cancel"):
        status, output = octet(server, command, id)
        assert status == 1
    assert "has ended already" in output


def test_an_operator_repeats_a_lost_job_and_cancels_it(server: Server) -> None:
    id = accepted(server.acme.post(GENERATE, json={"prompt": "broken"}, headers=ASYNC))
    assert server.ended(id)["error"]["code"] == "job_lost"
    _, output = octet(server, "dead", "--json")
    assert [(d["why"], d["tenant"]) for d in json.loads(output) if d["id"] == id] == [
        ("lost", "acme")
    ]
    assert octet(server, "retry", id)[0] == 0
    assert server.ended(id)["error"]["code"] == "job_lost"  # again, after three more claims
    with server.edge.painter.holding():
        held = accepted(server.acme.post(GENERATE, json={"prompt": "held"}, headers=ASYNC))
        wait_for(lambda: server.acme.get(f"{JOBS}/{held}").json()["status"] == "running")
        assert octet(server, "cancel", held)[0] == 0
        wait_for(lambda: bool(server.usage(held)))  # the runner has heard of it
    assert server.ended(held)["status"] == "cancelled"
