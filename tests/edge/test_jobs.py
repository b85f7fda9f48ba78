"""Jobs over real HTTP: accepted, run, watched, cancelled, and never lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.tenants import add_tenants
from serve.settings.application import Settings

from ..stored import store_in, usage_in
from ..wait import wait_for
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
