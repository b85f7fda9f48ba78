"""Tenants over real HTTP, with the real Ingress and Dispatcher and images of plain colours."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.core.result import Ok
from starlette.routing import Route
from typer.testing import CliRunner

from bench.tenants import add_tenants
from serve.api.authentication import is_open
from serve.cli.main import app
from serve.settings.application import Settings
from serve.tenants.files import TENANTS

from ..full_disk import full_disk
from ..stored import store_in, usage_in
from ..wait import wait_for
from .conforms import CONFORMS
from .edge import WORK, Edge, started

GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"
PICTURE = (Path(__file__).parents[1] / "edits" / "plain.png").read_bytes()
A_HILL = {"prompt": "a hill"}
PRICE = WORK[0] + 28 * WORK[1]
# The images take 4 · 0.021 s.
LONG = {
    "prompt": "a hill",
    "num_inference_steps": 100,
    "n": 4,
    "timeout_s": 0.08,
}
TENANTS_OF_TESTS: dict[str, dict[str, Any]] = {
    "acme": {},
    "other": {},
    "elsewhere": {"models": ["sdxl"]},
    "hasty": {"timeout_s": 0.1},
    "slow": {"requests_per_s": 0.5, "request_burst": 2},
    "worker": {"work_per_s": PRICE, "work_burst": 2 * PRICE},
    "single": {"max_requests": 1},
    "clumsy": {"requests_per_s": 1},
    "flood": {"requests_per_s": 0.01, "request_burst": 1},
    "thrifty": {"monthly_work": 10 * PRICE},
    "boss": {"operator": True},
    "spent": {"monthly_work": 1.5 * PRICE},
}


class GuardedEdge:
    """An edge with authentication, and a client for each tenant's key."""

    def __init__(self, edge: Edge, folder: Path, keys: dict[str, str]) -> None:
        self.edge, self.folder, self.keys = edge, folder, keys
        self.tenants = folder / "tenants"

    def client(self, tenant: str, key: str = "") -> httpx.Client:
        headers = {"authorization": f"Bearer {key or self.keys[tenant]}"}
        return httpx.Client(base_url=self.edge.url, timeout=30, headers=headers)

    def generate(
        self,
        tenant: str,
        body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        key: str = "",
    ) -> httpx.Response:
        with self.client(tenant, key) as client:
            return client.post(GENERATE, json=body or A_HILL, headers=headers)

    def unfinished_request(self, tenant: str) -> socket.socket:
        """Begin a request whose body does not end; returns its connection."""
        connection = socket.create_connection(("127.0.0.1", self.edge.port))
        head = f"POST {GENERATE} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self.keys[tenant]}"
        connection.sendall(f'{head}\r\ncontent-length: 900000\r\n\r\n{{"prompt": '.encode())
        return connection

    def usage(self, tenant: str) -> list[dict[str, Any]]:
        return usage_in(self.folder, tenant)

    def admin(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        """What the admin API answers to an operator."""
        with self.client("boss") as boss:
            answer = boss.request(method, f"/admin/v1/{path}", json=body, params=query)
        assert answer.is_success, answer.text
        return answer.json()

    def add(self, tenant: str, **limits: Any) -> str:
        """Add a tenant by the API; return its key."""
        self.admin("POST", "tenants", {"id": tenant, **limits})
        key = self.keys[tenant] = self.admin("POST", "keys", {"tenant": tenant})["key"]
        return str(key)


@pytest.fixture(scope="module")
def guarded(laptop: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedEdge]:
    folder = tmp_path_factory.mktemp("data")
    (folder / "tenants").mkdir()
    keys = add_tenants(store_in(folder), TENANTS_OF_TESTS)
    changes = {
        "auth": "keys",
        "data_folder": str(folder),
        "tenants_folder": str(folder / "tenants"),
    }
    with started(laptop.model_copy(update=changes)) as edge:
        wait_for(lambda: edge.ingress._session.tenants is not None)
        yield GuardedEdge(edge, folder, keys)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


# -- authentication -------------------------------------------------------------------------------


def test_every_route_needs_a_key_except_the_open_ones(guarded: GuardedEdge) -> None:
    routes = list(guarded.edge.ingress.__serve_build_asgi_app__().routes)
    assert all(isinstance(route, Route) for route in routes)
    paths = {
        (route.path, method)
        for route in routes
        if isinstance(route, Route)
        for method in route.methods or ()
    }
    assert len(paths) > 10
    with httpx.Client(base_url=guarded.edge.url) as without_key:
        for path, method in [*sorted(paths), ("/v1", "GET"), ("/v1/files", "GET")]:
            for given in (path, path + "/x" if "{" not in path and path != "/" else path):
                answer = without_key.request(method, given)
                assert (answer.status_code == 401) != is_open(given), (method, given)
    opened = {path for path, _ in paths if is_open(path)}
    images = {f"/v1/files/{folder}/{{name:path}}" for folder in "tj"}
    assert opened == {"/", "/favicon.ico", "/health", "/ready"} | images


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer octet_acme_" + "0" * 40,
        "Basic {key}",
        "{key}",
        "Bearer x{key}",
    ],
)
def test_a_wrong_key_is_401(guarded: GuardedEdge, header: str) -> None:
    headers = {"authorization": header.format(key=guarded.keys["acme"])}
    answer = httpx.post(guarded.edge.url + GENERATE, json=A_HILL, headers=headers)
    assert code(answer) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-should-retry"] == "false"
    assert guarded.keys["acme"] not in answer.text


def test_the_openai_client_with_and_without_its_key(guarded: GuardedEdge) -> None:
    base = f"{guarded.edge.url}/v1"
    with openai.OpenAI(base_url=base, api_key=guarded.keys["acme"]) as client:
        assert client.images.generate(model="landscapes", prompt="a hill").data
    with (
        openai.OpenAI(base_url=base, api_key="sk-other") as client,
        pytest.raises(openai.AuthenticationError, match="API key"),
    ):
        client.models.list()


def test_keys_come_and_go_and_nothing_restarts(guarded: GuardedEdge) -> None:
    """A change of the API holds when its answer is there, at this server's Ingress too."""
    first = guarded.add("passing")

    def works(key: str) -> bool:
        with guarded.client("passing", key) as client:
            return client.get("/v1/models").status_code == 200

    wait_for(lambda: works(first))
    second = guarded.admin("POST", "keys", {"tenant": "passing"})
    wait_for(lambda: works(second["key"]))
    assert works(first)
    ids = {key["id"] for key in guarded.admin("GET", "keys", tenant="passing")["data"]}
    assert len(ids) == 2
    (old_id,) = ids - {second["id"]}
    third = guarded.admin("POST", f"keys/{old_id}/rotate", {"overlap_s": 0})
    wait_for(lambda: not works(first))
    assert works(second["key"])
    wait_for(lambda: works(third["key"]))
    guarded.admin("DELETE", f"keys/{second['id']}")
    wait_for(lambda: not works(second["key"]))
    guarded.admin("DELETE", "tenants/passing")
    wait_for(lambda: not works(third["key"]))
    actions = [one["action"] for one in guarded.admin("GET", "audit", tenant="passing")["data"]]
    assert Counter(actions) == {
        "create tenant": 1,
        "create key": 2,
        "rotate key": 1,
        "revoke key": 3,
        "delete tenant": 1,
    }


def test_a_key_does_what_its_scopes_allow(guarded: GuardedEdge) -> None:
    guarded.add("scoped")
    given = {"tenant": "scoped", "scopes": ["read"]}
    reader = guarded.admin("POST", "keys", given)["key"]
    writer = guarded.admin("POST", "keys", {**given, "scopes": ["generate"]})["key"]
    with guarded.client("scoped", reader) as client:
        wait_for(lambda: client.get("/v1/models").status_code == 200)
    refused = guarded.generate("scoped", key=reader)
    assert code(refused) == (403, "insufficient_scope")
    assert "needs the scope 'generate'" in refused.json()["error"]["message"]
    wait_for(lambda: guarded.generate("scoped", key=writer).status_code == 200)
    with guarded.client("scoped", writer) as client:
        assert code(client.get("/v1/models")) == (403, "insufficient_scope")
    weak = guarded.admin("POST", "keys", {"tenant": "boss", "scopes": ["read"]})["key"]
    with guarded.client("boss", weak) as client:
        wait_for(lambda: client.get("/v1/models").status_code == 200)
        assert client.get("/admin/v1/tenants").status_code == 404
        assert client.get("/v1/state").status_code == 404


def test_the_use_of_a_key_is_noted(guarded: GuardedEdge) -> None:
    guarded.add("seldom")
    (key,) = guarded.admin("GET", "keys", tenant="seldom")["data"]
    assert key["last_used_at"] is None
    wait_for(lambda: guarded.generate("seldom").status_code == 200)
    wait_for(lambda: guarded.admin("GET", "keys", tenant="seldom")["data"][0]["last_used_at"])
    (record,) = guarded.usage("seldom")
    assert (record["key_id"], record["release"]) == (key["id"], version("octet-serve"))


def test_lists_are_read_in_pages(guarded: GuardedEdge) -> None:
    names, page = [], guarded.admin("GET", "tenants", limit=3)
    while True:
        names += [one["id"] for one in page["data"]]
        if not page["has_more"]:
            break
        page = guarded.admin("GET", "tenants", limit=3, after=page["next"])
    assert names == sorted(names)
    assert set(TENANTS_OF_TESTS) <= set(names)
    assert guarded.admin("GET", "tenants/thrifty")["limits"] == {"monthly_work": 10 * PRICE}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("POST", "tenants", {}, 400, "id: must be given, as text"),
        ("POST", "tenants", [], 400, "must be a JSON object"),
        ("POST", "tenants", {"id": "ACME"}, 400, "an id is 1 to 63 characters"),
        ("POST", "tenants", {"id": "new", "wieght": 1}, 400, "did you mean 'weight'"),
        ("POST", "tenants", {"id": "new", "weight": "2"}, 400, "weight: "),
        ("POST", "tenants", {"id": "acme"}, 409, "'acme' exists already"),
        ("PATCH", "tenants/acme", {"weight": -1}, 400, "weight -1.0 must be"),
        ("PATCH", "tenants/acme", {"colour": 1}, 400, "unknown limit 'colour'"),
        ("PATCH", "tenants/acne", {"weight": 1}, 404, "did you mean 'acme'?"),
        ("DELETE", "tenants/nobody", None, 404, "tenant 'nobody' does not exist"),
        ("POST", "keys", {"tenant": "nobody"}, 404, "tenant 'nobody' does not exist"),
        ("POST", "keys", {"tenant": "acme", "scopes": ["all"]}, 400, "unknown scope 'all'"),
        ("POST", "keys", {"tenant": "acme", "scopes": []}, 400, "scopes is empty"),
        ("POST", "keys", {"tenant": "acme", "scopes": "read"}, 400, "scopes: must be a list"),
        ("POST", "keys", {"tenant": "acme", "expires_at": "soon"}, 400, "must be a time such as"),
        ("POST", "keys", {"tenant": "acme", "expires_at": "2001-01-01"}, 400, "is in the past"),
        ("POST", "keys", {"tenant": "acme", "expires_at": 7}, 400, "must be a time such as"),
        ("POST", "keys/0/rotate", {}, 404, "no valid key has the id '0'"),
        ("POST", "keys/0/rotate", {"overlap_s": True}, 400, "must be a number of seconds"),
        ("POST", "keys/0/rotate", {"overlap_s": -1}, 400, "must be between 0 and"),
        ("DELETE", "keys/0", None, 404, "no valid key has the id '0'"),
        ("GET", "tenants?limit=0", None, 400, "limit '0' must be a whole number"),
        ("GET", "tenants?tenant=a", None, 400, "unknown parameter 'tenant'"),
        ("GET", "audit?after=x", None, 400, "after 'x' must be a whole number"),
        ("POST", "apply", {"tenants": []}, 400, "tenants: must be an object"),
        ("POST", "apply", {"tenants": {"a": {"weight": 0}}}, 400, "weight 0.0 must be"),
        ("POST", "apply", {"tenants": {}, "keys": {"a": 1}}, 400, "contents of a keys.json"),
    ],
)
def test_wrong_changes_are_explained(
    guarded: GuardedEdge, method: str, path: str, body: Any, status: int, says: str
) -> None:
    with guarded.client("boss") as boss:
        answer = boss.request(method, f"/admin/v1/{path}", json=body)
    assert (answer.status_code, says in answer.json()["error"]["message"]) == (status, True), (
        answer.text
    )


def test_the_admin_api_is_what_the_openapi_document_says(guarded: GuardedEdge) -> None:
    headers = {"authorization": f"Bearer {guarded.keys['boss']}"}
    document = schemathesis.openapi.from_url(f"{guarded.edge.url}/openapi.json", headers=headers)
    results = document.get_all_operations()
    operations = [found.ok() for found in results if isinstance(found, Ok)]
    operations = [one for one in operations if one.path.startswith("/admin/")]
    assert len(operations) == 12
    statuses = set()
    for operation in operations:

        @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy())
        def call(case: Any) -> None:
            answer = case.call_and_validate(checks=CONFORMS, headers=headers)
            assert answer.status_code != 500
            statuses.add(answer.status_code)

        call()
    assert statuses >= {200, 400, 404}, statuses


def test_nobody_but_an_operator_learns_of_the_admin_api(guarded: GuardedEdge) -> None:
    routes = guarded.edge.ingress.__serve_build_asgi_app__().routes
    paths = [r for r in routes if isinstance(r, Route) and r.path.startswith("/admin/")]
    assert len(paths) > 10
    with guarded.client("acme") as acme:
        for route in paths:
            for method in route.methods or ():
                path = route.path.replace("{id}", "acme")
                answer = acme.request(method, path, json={"id": "x", "tenant": "acme"})
                assert answer.status_code == 404, (method, path)
    assert httpx.get(f"{guarded.edge.url}/admin/v1/usage").status_code == 401


def test_files_are_applied_and_the_api_leaves_them_alone(guarded: GuardedEdge) -> None:
    """Tenants of the folder come and change; what the API has made stays as it is."""
    file = guarded.tenants / TENANTS

    def limits() -> Any:
        found = guarded.admin("GET", "tenants", limit=1000)["data"]
        return {one["id"]: one["limits"] for one in found if one["managed_by"] == "file"}

    file.write_text("filed: {weight: 2}\nother-filed: {}\n")
    wait_for(lambda: limits() == {"filed": {"weight": 2}, "other-filed": {}})
    with guarded.client("boss") as boss:
        refused = boss.patch("/admin/v1/tenants/filed", json={"weight": 3})
        assert code(refused) == (409, "conflict")
        assert "managed by tenants.yaml" in refused.json()["error"]["message"]
    key = guarded.admin("POST", "keys", {"tenant": "filed"})["key"]
    file.write_text("filed: [")
    store = guarded.edge.dispatcher.store
    assert store
    wait_for(lambda: bool(store.file_faults))
    assert guarded.generate("filed", key=key).status_code == 200
    file.write_text("filed: {weight: 4}\n")
    wait_for(lambda: limits() == {"filed": {"weight": 4}})
    assert "acme" in [one["id"] for one in guarded.admin("GET", "tenants", limit=1000)["data"]]
    body = {"tenants": {}, "keys": {}, "dry_run": True}
    found = guarded.admin("POST", "apply", body)
    assert [(one["action"], one["tenant"]) for one in found["data"]] == [("delete", "filed")]
    assert not found["applied"]
    file.write_text("{}")
    wait_for(lambda: limits() == {})
    assert guarded.generate("filed", key=key).status_code == 401


def test_the_command_uses_the_same_api(guarded: GuardedEdge) -> None:
    def octet(*arguments: str) -> str:
        access = "--url", guarded.edge.url, "--key", guarded.keys["boss"]
        result = CliRunner().invoke(app, ["tenant", *arguments, *access], env={"COLUMNS": "160"})
        assert result.exit_code == 0, result.output
        return result.output

    key = octet("add", "remote", "--weight", "2").splitlines()[-1]
    wait_for(lambda: guarded.generate("remote", key=key).status_code == 200)
    octet("set", "remote", "--monthly-work", "0")
    wait_for(lambda: guarded.generate("remote", key=key).status_code == 429)
    assert "monthly_work 0" in octet("list")
    octet("revoke", "remote")
    wait_for(lambda: guarded.generate("remote", key=key).status_code == 401)
    assert "would change" in octet("apply", str(guarded.tenants), "--dry-run")
    octet("remove", "remote", "--yes")
    audit = octet("audit", "--tenant", "remote")
    assert all(word in audit for word in ("create tenant", "change tenant", "delete tenant"))
    assert "boss/" in audit


def test_a_key_that_is_revoked_during_the_body_is_refused(guarded: GuardedEdge) -> None:
    key = guarded.add("lengthy")
    with guarded.client("lengthy", key) as client:
        wait_for(lambda: client.get("/v1/models").status_code == 200)

        def body() -> Iterator[bytes]:
            yield b'{"prompt": '
            guarded.admin("DELETE", "tenants/lengthy")
            wait_for(lambda: guarded.generate("lengthy", key=key).status_code == 401)
            yield b'"a hill"}'

        assert code(client.post(GENERATE, content=body())) == (401, "invalid_api_key")


def test_an_admin_key_that_is_revoked_during_the_body_changes_nothing(
    guarded: GuardedEdge,
) -> None:
    made = guarded.admin("POST", "keys", {"tenant": "boss"})
    with guarded.client("boss", made["key"]) as thief:
        wait_for(lambda: thief.get("/v1/models").status_code == 200)

        def body() -> Iterator[bytes]:
            yield b'{"tenant": '
            guarded.admin("DELETE", f"keys/{made['id']}")
            with guarded.client("boss", made["key"]) as again:
                wait_for(lambda: again.get("/v1/models").status_code == 401)
            yield b'"boss"}'

        assert code(thief.post("/admin/v1/keys", content=body())) == (401, "invalid_api_key")


# -- tenants are kept apart -----------------------------------------------------------------------


def test_a_tenant_sees_its_own_models(guarded: GuardedEdge) -> None:
    with guarded.client("elsewhere") as client:
        assert client.get("/v1/models").json()["data"] == []
        assert code(client.get("/v1/models/landscapes")) == (404, "model_not_found")
    for body in (A_HILL, {**A_HILL, "model": "landscapes"}):
        answer = guarded.generate("elsewhere", body)
        assert code(answer) == (404, "model_not_found")
        assert "known: landscapes" not in answer.text


def test_request_ids_are_each_tenants_own(guarded: GuardedEdge) -> None:
    async def main() -> None:
        async with httpx.AsyncClient(base_url=guarded.edge.url, timeout=30) as client:

            def headers(tenant: str) -> dict[str, str]:
                return {"authorization": f"Bearer {guarded.keys[tenant]}", "x-request-id": "same"}

            body = {"prompt": "held"}
            both = [
                asyncio.create_task(client.post(GENERATE, json=body, headers=headers(tenant)))
                for tenant in ("acme", "other")
            ]
            for tenant in ("acme", "other"):
                await asyncio.to_thread(guarded.edge.wait_until_open, "same", tenant=tenant)
            again = await client.post(GENERATE, json=body, headers=headers("acme"))
            assert code(again) == (409, "request_id_in_use")
            foreign = await client.delete("/v1/requests/same", headers=headers("slow"))
            assert code(foreign) == (404, "not_found")
            assert (await client.delete("/v1/requests/same", headers=headers("acme"))).is_success
            acme, other = both
            assert code(await acme) == (499, "request_cancelled")
            holding.close()
            assert (await other).status_code == 200

    with ExitStack() as holding:
        holding.enter_context(guarded.edge.painter.holding())
        asyncio.run(main())


def test_a_request_that_kills_replicas_is_refused_until_an_operator_lifts_it(
    guarded: GuardedEdge,
) -> None:
    deadly = {"prompt": "deadly"}
    assert code(guarded.generate("acme", deadly)) == (503, "replica_failed")
    begun = guarded.edge.painter.begun
    wait_for(lambda: "refused for a while" in guarded.generate("acme", deadly).text)
    attempts = guarded.edge.painter.begun
    again = guarded.generate("acme", {**deadly, "seed": 7, "output_format": "jpeg"})
    assert code(again) == (503, "replica_failed")
    assert guarded.edge.painter.begun == attempts >= begun
    assert guarded.generate("acme", {"prompt": "another"}).status_code == 200
    with guarded.client("boss") as boss, guarded.client("acme") as acme:
        (entry,) = boss.get("/v1/state").json()["quarantined"]
        assert entry["tenant"] == "acme"
        path = f"/v1/quarantine/{entry['id']}"
        assert acme.delete(path).status_code == 404
        assert boss.delete("/v1/quarantine/unknown").status_code == 404
        assert boss.delete(path).status_code == 200
        wait_for(lambda: boss.get("/v1/state").json()["quarantined"] == [])
    wait_for(lambda: "refused for a while" not in guarded.generate("acme", deadly).text)
    assert guarded.edge.painter.begun > attempts


def slots_of(state: Any) -> int:
    slots: int = state["pools"]["landscapes-fp8"]["slots"]
    return slots


def test_the_servers_state_is_for_operators(guarded: GuardedEdge) -> None:
    with guarded.client("boss") as boss:
        wait_for(lambda: "acme" in str(boss.get("/v1/state").json()["tenants"]))
        # Other tests kill the replica, which is known again with its next heartbeat.
        wait_for(lambda: slots_of(boss.get("/v1/state").json()) == 4)
    with guarded.client("acme") as client:
        assert code(client.get("/v1/state")) == (404, "not_found")


def test_operators_export_usage_with_a_cursor(guarded: GuardedEdge) -> None:
    """Reading on from `next` yields each record once, in the order of the ids."""
    for seed in range(3):
        assert guarded.generate("acme", {**A_HILL, "seed": seed}).status_code == 200

    def read(**query: Any) -> Any:
        with guarded.client("boss") as boss:
            answer = boss.get("/admin/v1/usage", params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    found: list[dict[str, Any]] = []
    page = read(limit=2)
    while True:
        found += page["data"]
        assert page["next"] == found[-1]["id"]
        if not page["has_more"]:
            break
        page = read(limit=2, after=page["next"])
    assert found == usage_in(guarded.folder)
    assert read(after=page["next"]) == {
        "object": "list",
        "data": [],
        "has_more": False,
        "next": page["next"],
    }
    assert guarded.generate("acme", {**A_HILL, "seed": 99}).status_code == 200
    # Other tests' cancelled images may be recorded as late as this.
    newer = [(one["tenant"], one["outcome"]) for one in read(after=page["next"])["data"]]
    assert newer.count(("acme", "delivered")) == 1
    assert {one["tenant"] for one in read(tenant="acme", limit=1000)["data"]} == {"acme"}


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("after=x", "after 'x' must be a whole number from 0 to"),
        ("limit=0", "limit '0' must be a whole number from 1 to 1000"),
        ("limit=1001", "from 1 to 1000"),
        ("after=-1", "after '-1'"),
        ("after=99999999999999999999", "must be a whole number"),
        ("afer=1", "unknown parameter 'afer': did you mean 'after'?"),
    ],
)
def test_a_wrong_query_for_usage_is_explained(guarded: GuardedEdge, query: str, says: str) -> None:
    with guarded.client("boss") as boss:
        answer = boss.get(f"/admin/v1/usage?{query}")
    assert (answer.status_code, says in answer.json()["error"]["message"]) == (400, True)


def test_operators_cordon_nodes_with_the_command(guarded: GuardedEdge) -> None:
    url, boss = guarded.edge.url, guarded.keys["boss"]

    def octet(*arguments: str, key: str = boss) -> str:
        result = CliRunner().invoke(app, [*arguments, "--key", key], env={"COLUMNS": "160"})
        return f"{result.exit_code} {result.output}"

    assert "0 n is cordoned" in octet("node", "cordon", "n", "--url", url, "--reason", "noise")
    assert "cordoned: noise" in octet("top", url, "--once")
    state = json.loads(octet("top", url, "--json").partition(" ")[2])
    assert [node["cordoned"] for node in state["nodes"]] == ["noise"]
    assert "0 0 requests open" in octet("top", f"{url}/v1/", "--once")  # OpenAI's base URL
    assert "0 n is no longer cordoned" in octet("node", "uncordon", "n", "--url", url)
    assert "noise" not in octet("top", url, "--once")
    assert "1 octet: " in octet("node", "uncordon", "n", "--url", url)
    assert "does not begin the id of exactly one node" in octet("node", "cordon", "x", "--url", url)
    said = octet("node", "cordon", "n", "--url", url, key=guarded.keys["acme"])
    assert "the key is not an operator's" in said
    with guarded.client("boss") as client:
        for body in (b"[]", b'{"reason": 1}', b'{"why": "x"}', b"{"):
            answer = client.put("/v1/nodes/n/cordon", content=body)
            assert code(answer) == (400, "invalid_value")


# -- limits ---------------------------------------------------------------------------------------


def test_refusals_are_logged_without_what_the_client_sent(
    guarded: GuardedEdge, caplog: pytest.LogCaptureFixture
) -> None:
    def logged(request_id: str) -> dict[str, Any]:
        wait_for(lambda: any(r.__dict__.get("request") == request_id for r in caplog.records))
        record = next(r for r in caplog.records if r.__dict__.get("request") == request_id)
        return {name: record.__dict__[name] for name in ("tenant", "outcome", "status")}

    time.sleep(1)  # at most ten lines a second
    canary = {"prompt": "canary", "canary": 1}
    guarded.generate("acme", canary, headers={"x-request-id": "wrong"})
    upload = {"image": ("canary", b"canary", "canary/canary")}
    with guarded.client("acme") as client:
        client.post(EDIT, data=canary, files=upload, headers={"x-request-id": "wrong-edit"})
    httpx.post(guarded.edge.url + GENERATE, json=canary, headers={"x-request-id": "keyless"})
    for refused in ("wrong", "wrong-edit"):
        expected = {"tenant": "acme", "outcome": "invalid_value", "status": 400}
        assert logged(refused) == expected
    assert logged("keyless") == {"tenant": None, "outcome": "invalid_api_key", "status": 401}
    assert "canary" not in str([record.__dict__ for record in caplog.records])


def test_the_request_rate_is_kept_and_reported_in_headers(guarded: GuardedEdge) -> None:
    answers = [guarded.generate("slow") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "1"
    refused = answers[2]
    assert code(refused) == (429, "rate_limit_exceeded")
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert refused.headers["x-should-retry"] == "true"
    wait_s = int(refused.headers["retry-after-ms"]) / 1000
    assert 1 < wait_s <= 2.03
    assert int(refused.headers["retry-after"]) == math.ceil(wait_s)
    time.sleep(wait_s)
    assert guarded.generate("slow").status_code == 200  # after the time that the header named


def test_the_work_rate_is_kept(guarded: GuardedEdge) -> None:
    answers = [guarded.generate("worker", {**A_HILL, "n": 2}) for _ in range(2)]
    assert answers[0].status_code == 200
    assert code(answers[1]) == (429, "rate_limit_exceeded")
    assert answers[0].headers["x-ratelimit-remaining-work"] == "0"


def test_the_number_of_open_requests_is_kept(guarded: GuardedEdge) -> None:
    with ThreadPoolExecutor(1) as pool, guarded.edge.painter.holding():
        headers = {"x-request-id": "first"}
        first = pool.submit(guarded.generate, "single", {"prompt": "held"}, headers)
        guarded.edge.wait_until_open("first", tenant="single")
        assert [guarded.generate("single").status_code for _ in range(2)] == [429, 429]
    assert first.result().status_code == 200
    wait_for(lambda: guarded.generate("single").status_code == 200)


def test_unfinished_bodies_count_as_open_requests(guarded: GuardedEdge) -> None:
    """A body that never ends is no call yet, so the Dispatcher does not know of it."""
    with contextlib.closing(guarded.unfinished_request("single")):
        wait_for(lambda: guarded.generate("single").status_code == 429)
    wait_for(lambda: guarded.generate("single").status_code == 200)


def test_wrong_requests_have_a_rate_too(guarded: GuardedEdge) -> None:
    answers = [guarded.generate("clumsy", {"prompt": ""}) for _ in range(12)]
    assert [answer.status_code for answer in answers] == [400] * 10 + [429] * 2
    assert code(answers[-1]) == (429, "rate_limit_exceeded")
    assert int(answers[-1].headers["retry-after-ms"]) > 0


def test_a_flood_of_refused_requests_reaches_no_ingress(guarded: GuardedEdge) -> None:
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda _: guarded.generate("flood"), range(80)))
    assert Counter(answer.status_code for answer in answers) == {200: 1, 429: 79}
    passed = guarded.edge.passed
    refused = guarded.generate("flood", headers={"x-request-id": "mine"})
    assert code(refused) == (429, "rate_limit_exceeded")
    assert refused.headers["x-should-retry"] == "true"
    assert refused.headers["x-request-id"] == "mine"
    assert guarded.edge.passed == passed
    assert guarded.generate("acme").status_code == 200


def test_two_hundred_parallel_requests_with_a_budget_for_ten(guarded: GuardedEdge) -> None:
    async def main() -> list[httpx.Response]:
        headers = {"authorization": f"Bearer {guarded.keys['thrifty']}"}
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(
            base_url=guarded.edge.url, headers=headers, limits=limits, timeout=30
        ) as client:
            return await asyncio.gather(*(client.post(GENERATE, json=A_HILL) for _ in range(200)))

    answers = asyncio.run(main())
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(refused) == 190
    assert {code(answer) for answer in refused} == {(429, "insufficient_quota")}
    assert {answer.headers["x-should-retry"] for answer in refused} == {"false"}
    assert {answer.json()["error"]["type"] for answer in refused} == {"insufficient_quota"}
    assert len(guarded.usage("thrifty")) == 10
    assert guarded.generate("thrifty").status_code == 429


def test_a_tenants_own_deadline(guarded: GuardedEdge) -> None:
    assert code(guarded.generate("hasty", {"prompt": "slow"})) == (504, "deadline_exceeded")
    assert guarded.generate("hasty", {"prompt": "slow", "timeout_s": 20}).status_code == 200
    answers = [guarded.generate("hasty", LONG) for _ in range(9)]
    never = next(a for a in answers if a.status_code != 504)  # a busy machine may be late itself
    assert code(never) == (400, "timeout_too_short")
    assert never.json()["error"]["param"] == "timeout_s"
    assert never.headers["x-should-retry"] == "false"
    assert "retry-after" not in never.headers


def test_changed_limits_hold_without_a_restart(guarded: GuardedEdge) -> None:
    guarded.add("changing")
    wait_for(lambda: guarded.generate("changing").status_code == 200)
    guarded.admin("PATCH", "tenants/changing", {"monthly_work": 0})
    assert guarded.generate("changing").status_code == 429
    guarded.admin("PATCH", "tenants/changing", {"monthly_work": None})
    assert guarded.generate("changing").status_code == 200


# -- charges --------------------------------------------------------------------------------------


def test_every_delivered_image_is_charged_once_and_before_its_answer(guarded: GuardedEdge) -> None:
    before = len(guarded.usage("acme"))
    answer = guarded.generate("acme", {**A_HILL, "n": 3}, {"x-request-id": "mine"})
    assert answer.status_code == 200
    assert float(answer.headers["x-octet-eta-s"]) > 0
    records = guarded.usage("acme")[before:]
    assert [(r["request_id"], r["image"]) for r in records] == [("mine", i) for i in range(3)]
    assert {r["call"] for r in records} == {records[0]["call"]}
    assert {(r["model"], r["size"], r["steps"], r["outcome"]) for r in records} == {
        ("landscapes", "128x128", 28, "delivered")
    }
    assert sum(r["work_s"] for r in records) == pytest.approx(3 * PRICE)
    again = guarded.generate("acme", headers={"x-request-id": "mine"})  # the same id, another call
    assert again.status_code == 200
    assert len(guarded.usage("acme")) == before + 4


def test_repeated_images_are_recorded_and_cost_nothing(guarded: GuardedEdge) -> None:
    same = {**A_HILL, "seed": 7}
    assert guarded.generate("spent", same).headers["x-octet-cache"] == "miss"
    again = guarded.generate("spent", same)
    assert again.headers["x-octet-cache"] == "hit"
    left = "x-ratelimit-remaining-budget"
    assert again.headers[left] == guarded.generate("spent", same).headers[left]
    assert code(guarded.generate("spent")) == (429, "insufficient_quota")
    records = guarded.usage("spent")
    assert [record["outcome"] for record in records] == ["delivered", "hit", "hit"]
    assert [record["work_s"] > 0 for record in records] == [True, False, False]
    assert {(r["model"], r["precision"], r["size"], r["steps"]) for r in records} == {
        ("landscapes", "fp8", "128x128", 28)
    }
    # Each tenant has its own.
    assert guarded.generate("acme", same).headers["x-octet-cache"] == "miss"


def test_sharing_an_image_is_recorded_and_costs_nothing(guarded: GuardedEdge) -> None:
    same, names = {"prompt": "held", "seed": 70}, ("one", "two", "three")
    with ThreadPoolExecutor(3) as pool, guarded.edge.painter.holding():
        asked = [
            pool.submit(guarded.generate, "acme", same, {"x-request-id": name}) for name in names
        ]
        guarded.edge.wait_until_open(*names, tenant="acme")
    answers = [answer.result() for answer in asked]
    assert sorted(a.headers["x-octet-cache"] for a in answers) == ["miss", "shared", "shared"]
    outcomes = Counter(r["outcome"] for r in guarded.usage("acme")[-3:])
    assert outcomes == {"delivered": 1, "shared": 2}
    assert sum(r["work_s"] > 0 for r in guarded.usage("acme")[-3:]) == 1


def test_a_refused_request_does_not_end_the_shared_generation(guarded: GuardedEdge) -> None:
    """A request whose deadline is too short is refused, and the other one gets the image."""
    slow = {"prompt": "slow", "seed": 71, "num_inference_steps": 100}
    with ThreadPoolExecutor(2) as pool:
        hasty = pool.submit(guarded.generate, "acme", {**slow, "timeout_s": 0.015})
        patient = pool.submit(guarded.generate, "acme", slow)
    assert hasty.result().status_code in (400, 429, 503, 504)
    assert patient.result().status_code == 200


def test_the_rate_of_requests_holds_for_repeated_ones(guarded: GuardedEdge) -> None:
    same = {**A_HILL, "seed": 7}
    codes = [guarded.generate("slow", same).status_code for _ in range(3)]
    assert 429 in codes


def test_a_streamed_image_is_charged_too(guarded: GuardedEdge) -> None:
    before = len(guarded.usage("acme"))
    asked = {**A_HILL, "stream": True}
    with (
        guarded.client("acme") as client,
        client.stream("POST", GENERATE, json=asked) as answer,
    ):
        for line in answer.iter_lines():
            if line.startswith("event: image_generation.completed"):
                assert len(guarded.usage("acme")) == before + 1
    assert len(guarded.usage("acme")) == before + 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_image_costs_the_steps_that_were_done(
    guarded: GuardedEdge, stream: bool
) -> None:
    before = len(guarded.usage("acme"))
    body = {"prompt": "held", "stream": stream}
    begun = guarded.edge.painter.begun

    async def main() -> None:
        headers = {"authorization": f"Bearer {guarded.keys['acme']}", "x-request-id": "leaving"}
        async with httpx.AsyncClient(base_url=guarded.edge.url, headers=headers) as client:
            asked = asyncio.create_task(client.post(GENERATE, json=body))
            await asyncio.to_thread(wait_for, lambda: guarded.edge.painter.begun > begun)
            await client.delete("/v1/requests/leaving")
            await asyncio.wait([asked])

    with guarded.edge.painter.holding():
        asyncio.run(main())
    wait_for(lambda: len(guarded.usage("acme")) == before + 1)
    (record,) = guarded.usage("acme")[before:]
    assert (record["outcome"], record["steps"]) == ("cancelled", 14)
    assert record["work_s"] == pytest.approx(PRICE / 2)
    account = guarded.edge.dispatcher.admission.account("acme")
    wait_for(lambda: abs(account.reserved) < 1e-9)


def test_an_edit_costs_the_steps_that_it_runs(guarded: GuardedEdge) -> None:
    """Strength 0.5 runs 14 of 28 steps; the test's coefficients count nothing for the VAE."""
    before = len(guarded.usage("acme"))
    files = {"image": ("canary", PICTURE)}
    with guarded.client("acme") as client:
        answer = client.post(EDIT, data={"prompt": "night", "strength": "0.5"}, files=files)
    assert answer.status_code == 200
    (record,) = guarded.usage("acme")[before:]
    assert (record["size"], record["steps"], record["outcome"]) == ("96x64", 14, "delivered")
    assert record["work_s"] == pytest.approx(WORK.constant + 14 * WORK.step)


def test_a_cancelled_edit_costs_the_steps_that_were_done(guarded: GuardedEdge) -> None:
    before, begun = len(guarded.usage("acme")), guarded.edge.painter.begun
    data = {"prompt": "held", "strength": "0.5"}
    with (
        guarded.client("acme") as client,
        guarded.edge.painter.holding(),
        ThreadPoolExecutor(1) as pool,
    ):
        headers = {"x-request-id": "leaving-edit"}
        asked = pool.submit(
            client.post, EDIT, data=data, files={"image": ("a", PICTURE)}, headers=headers
        )
        wait_for(lambda: guarded.edge.painter.begun > begun)
        client.delete("/v1/requests/leaving-edit")
        assert asked.result().status_code == 499
    wait_for(lambda: len(guarded.usage("acme")) == before + 1)
    (record,) = guarded.usage("acme")[before:]
    assert (record["outcome"], record["steps"]) == ("cancelled", 7)
    assert record["work_s"] == pytest.approx((WORK.constant + 14 * WORK.step) / 2)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prompt": "broken"}, 500),
        ({"prompt": ""}, 400),
        (LONG, 400),
    ],
)
def test_failed_and_refused_requests_cost_nothing(
    guarded: GuardedEdge, body: dict[str, Any], status: int
) -> None:
    before = guarded.usage("acme")
    assert guarded.generate("acme", body).status_code == status
    time.sleep(0.6)  # a Generator reports stopped images with its heartbeat
    assert guarded.usage("acme") == before


def test_a_missed_deadline_costs_nothing_unless_the_client_shortened_it(
    guarded: GuardedEdge,
) -> None:
    before = len(guarded.usage("hasty"))
    assert guarded.generate("hasty", {"prompt": "slow"}).status_code == 504
    time.sleep(0.6)  # a Generator reports stopped images with its heartbeat
    assert len(guarded.usage("hasty")) == before
    assert guarded.generate("hasty", {"prompt": "slow", "timeout_s": 0.09}).status_code == 504
    wait_for(lambda: len(guarded.usage("hasty")) > before)
    (record,) = guarded.usage("hasty")[before:]
    assert (record["outcome"], record["steps"]) == ("cancelled", 14)


def test_an_image_is_delivered_once_it_can_be_charged_and_new_work_is_refused(
    guarded: GuardedEdge,
) -> None:
    before = len(guarded.usage("acme"))
    with ThreadPoolExecutor(1) as pool:
        with full_disk():
            asked = pool.submit(guarded.generate, "acme")
            wait_for(lambda: bool(guarded.edge.dispatcher.metering.fault))
            refused = guarded.generate("other")
            assert code(refused) == (503, "unavailable")
            assert refused.headers["x-should-retry"] == "true"
            assert int(refused.headers["retry-after"]) <= 6
            with guarded.client("acme") as client:
                assert client.get("/v1/models").status_code == 200
            assert not asked.done()
        assert asked.result().status_code == 200
    assert len(guarded.usage("acme")) == before + 1
    wait_for(lambda: guarded.generate("other").status_code == 200)


def test_the_openapi_document_says_which_routes_need_a_key(guarded: GuardedEdge) -> None:
    with guarded.client("acme") as client:
        paths = client.get("/openapi.json").json()["paths"]
    for path, methods in paths.items():
        for operation in methods.values():
            assert ("401" in operation["responses"]) == ("security" in operation) != is_open(path)
