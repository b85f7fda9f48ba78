"""Idempotency-Key over real HTTP, with real Ingresses and a real Dispatcher and database."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from bench.tenants import add_tenants
from serve.settings.application import Settings
from serve.store import answers
from serve.store.answers import Answer, Answers, Claim
from serve.store.database import Database
from serve.store.schema import ANSWERS
from serve.usage.ledger import UsageLedger

from ..builders import usage_record
from ..stored import store_in, usage_in
from ..wait import wait_for
from .databases import NOW
from .edge import Edge, started

GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"
PICTURE = (Path(__file__).parents[1] / "edits" / "plain.png").read_bytes()
A_HILL = {"prompt": "a hill"}
TENANTS: dict[str, dict[str, Any]] = {"acme": {}, "other": {}, "boss": {"operator": True}}


class Server:
    """Two Ingresses, a folder, and a key of each tenant."""

    def __init__(self, edge: Edge, folder: Path, keys: dict[str, str]) -> None:
        self.edge, self.folder, self.keys = edge, folder, keys

    def post(
        self,
        key: str,
        body: dict[str, Any] | None = None,
        *,
        tenant: str = "acme",
        path: str = GENERATE,
        ingress: int = 0,
        **more: Any,
    ) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.keys[tenant]}", "idempotency-key": key}
        url = self.edge.urls[ingress] + path
        given = more or {"json": A_HILL if body is None else body}
        return httpx.post(url, headers=headers, timeout=30, **given)

    def charged(self, tenant: str = "acme") -> int:
        return len(usage_in(self.folder, tenant))


@pytest.fixture(scope="module")
def server(laptop: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("data")
    keys = add_tenants(store_in(folder), TENANTS)
    changes = {"auth": "keys", "data_folder": str(folder)}
    with started(laptop.model_copy(update=changes), ingresses=2) as edge:
        wait_for(lambda: all(one._session.tenants is not None for one in edge.ingresses))
        yield Server(edge, folder, keys)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_a_repeated_request_gets_the_same_answer_and_is_charged_once(server: Server) -> None:
    before, generated = server.charged(), server.edge.painter.generated
    first = server.post("one")
    again = [server.post("one", ingress=i) for i in (0, 1)]
    assert first.status_code == 200
    assert "idempotent-replayed" not in first.headers
    for answer in again:
        assert (answer.status_code, answer.content) == (200, first.content)
        assert answer.headers["idempotent-replayed"] == "true"
        same = "content-type", "x-octet-eta-s", "x-octet-cache"
        assert [answer.headers[name] for name in same] == [first.headers[name] for name in same]
    assert server.edge.painter.generated == generated + 1
    assert server.charged() == before + 1
    assert server.post("two").content != first.content


def test_parallel_requests_with_one_key_generate_once(server: Server) -> None:
    generated = server.edge.painter.generated
    body = {"prompt": "held"}
    with ThreadPoolExecutor(12) as pool, server.edge.painter.holding():
        asked = [pool.submit(server.post, "many", body, ingress=i % 2) for i in range(12)]
        wait_for(lambda: sum(one.done() for one in asked) == 11)
    found = [one.result() for one in asked]
    assert sorted(one.status_code for one in found) == [200] + [409] * 11
    refused = next(one for one in found if one.status_code == 409)
    assert code(refused) == (409, "idempotency_key_in_use")
    assert refused.headers["x-should-retry"] == "true"
    assert server.edge.painter.generated == generated + 1
    (done,) = (one for one in found if one.status_code == 200)
    assert server.post("many", body).content == done.content


def test_another_request_with_the_key_is_refused(server: Server) -> None:
    assert server.post("reused").status_code == 200
    other = server.post("reused", {"prompt": "a lake"})
    assert code(other) == (422, "idempotency_key_reused")
    assert other.headers["x-should-retry"] == "false"
    edit = server.post("reused", path=EDIT, data={"prompt": "x"}, files={"image": ("a", PICTURE)})
    assert code(edit) == (422, "idempotency_key_reused")
    assert server.post("reused", tenant="other").status_code == 200  # keys are each tenant's own


def test_a_form_that_is_sent_again_with_another_boundary_is_the_same(server: Server) -> None:
    files = {"image": ("a.png", PICTURE, "image/png")}
    first, again = (
        server.post("form", path=EDIT, data={"prompt": "night"}, files=files) for _ in range(2)
    )
    assert first.status_code == 200
    assert again.content == first.content
    assert again.request.headers["content-type"] != first.request.headers["content-type"]


def test_retryable_errors_are_not_remembered_and_others_are(server: Server) -> None:
    broken = {"prompt": "broken"}
    begun = server.edge.painter.begun
    assert [server.post("broken", broken).status_code for _ in range(2)] == [500, 500]
    assert server.edge.painter.begun == begun + 1  # it is not tried again
    refused = {**A_HILL, "timeout_s": 0.001}
    first, second = (server.post("refused", refused) for _ in range(2))
    assert first.status_code in (400, 429, 503, 504)
    # On a slow machine the time may pass after the admission: such an answer is remembered.
    assert ("idempotent-replayed" in second.headers) == (first.status_code == 504)
    wrong = server.post("wrong", {"prompt": ""})
    assert code(wrong) == (400, "invalid_value")
    wait_for(lambda: server.post("wrong").status_code == 200)  # the key was not used up


def test_a_request_that_its_client_gave_up_may_be_sent_again(server: Server) -> None:
    body = {"prompt": "held"}
    with server.edge.painter.holding():
        headers = {"authorization": f"Bearer {server.keys['acme']}", "idempotency-key": "gone"}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.edge.url + GENERATE, json=body, headers=headers, timeout=0.5)
    wait_for(lambda: server.post("gone", body).status_code == 200)


@pytest.mark.parametrize("key", ["", "x" * 256, "two words", "a\tb"])
def test_a_wrong_key_is_explained(server: Server, key: str) -> None:
    answer = server.post(key)
    assert code(answer) == (400, "invalid_value")
    assert answer.json()["error"]["param"] == "idempotency-key"


def test_streams_have_no_key(server: Server) -> None:
    answer = server.post("stream", {**A_HILL, "stream": True})
    assert code(answer) == (400, "invalid_value")


def test_the_admin_api_knows_keys_too(server: Server) -> None:
    def post(path: str, key: str, body: dict[str, Any]) -> httpx.Response:
        return server.post(key, body, tenant="boss", path=f"/admin/v1/{path}")

    first, again = (post("tenants", "t", {"id": "fresh"}) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.content == first.content
    key, repeated = (post("keys", "k", {"tenant": "fresh"}) for _ in range(2))
    assert key.status_code == 201
    assert code(repeated) == (409, "conflict")
    with closing(Database(**store_in(server.folder))) as database:
        rows = database.read(lambda c: c.execute(select(ANSWERS)).all())
    secret = key.json()["key"].rpartition("_")[2].encode()
    assert secret not in repeated.content + b"".join(row.body for row in rows)


# -- the database alone ---------------------------------------------------------------------------


def claim(session: str = "s", call: str = "c", digest: str = "d", cluster: str = "x") -> Claim:
    return Claim("acme", "k", digest, call, cluster, session, 60.0)


ANSWER = Answer(200, {"a": "b"}, b"body")


def test_a_dead_ingress_is_followed_by_a_call_with_the_same_id(database: Database) -> None:
    store = Answers(database)
    assert store.claim(claim("one", "c1"), NOW, {"one", "two"}).call == "c1"
    assert store.claim(claim("two", "c2"), NOW, {"one", "two"}).state == "running"
    after = store.claim(claim("two", "c2"), NOW, {"two"})
    assert (after.state, after.call) == ("yours", "c1")
    store.finish(claim("one", "c1"), ANSWER, NOW)  # it was only paused: it comes too late
    assert store.claim(claim("two", "c3"), NOW, {"two"}).state == "running"
    store.finish(claim("two", "c3"), None, NOW)  # another request at the same Ingress
    assert store.claim(claim("two", "c3"), NOW, {"two"}).state == "running"
    store.finish(claim("two", "c2"), ANSWER, NOW)
    found = store.claim(claim("three"), NOW, {"three"})
    assert (found.state, found.answer) == ("answered", ANSWER)


def test_another_clusters_request_is_given_up_after_its_time(database: Database) -> None:
    store = Answers(database)
    store.claim(claim("one", "c1", cluster="a"), NOW, {"one"})
    assert store.claim(claim("two", cluster="b"), NOW + 59, {"two"}).state == "running"
    after = store.claim(claim("two", cluster="b"), NOW + 61, {"two"})
    assert (after.state, after.call) == ("yours", "c1")


def test_a_key_is_never_stuck_for_longer_than_its_request_may_take(database: Database) -> None:
    """The answer could not be remembered, and its Ingress lives."""
    store = Answers(database)
    store.claim(claim("one", "c1"), NOW, {"one"})
    assert store.claim(claim("one", "c2"), NOW + 59, {"one"}).state == "running"
    assert store.claim(claim("one", "c2"), NOW + 61, {"one"}).state == "yours"


def test_a_call_whose_charge_was_taken_back_is_not_used_again(database: Database) -> None:
    """A further record of it would never be written, so its image would be free."""
    store, ledger = Answers(database), UsageLedger(database, NOW)
    for key, charged in (("written", True), ("never written", False)):
        first = claim("one", f"call {key}")._replace(key=key)
        store.claim(first, NOW, {"one"})
        record = usage_record(f"call {key}", tenant="acme")
        ledger.append([record, record.reversal()] if charged else [record.reversal()], NOW)
        after = store.claim(first._replace(session="two", call="c2"), NOW, {"two"})
        assert (after.state, after.call) == ("yours", "c2")


def test_a_tenants_oldest_answers_make_room(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MOST_BYTES", 10)
    store = Answers(database)
    asked = [claim(call=f"c{i}")._replace(key=f"k{i}") for i in range(4)]
    for i, one in enumerate(asked):
        store.claim(one, NOW, {"s"})
        store.finish(one, ANSWER, NOW + i)
    again = [store.claim(one._replace(call="c9"), NOW, {"s"}).state for one in asked]
    assert again == ["yours", "yours", "answered", "answered"]


def test_an_answer_is_forgotten_after_a_day(database: Database) -> None:
    store = Answers(database)
    store.claim(claim(), NOW, {"s"})
    store.finish(claim(), ANSWER, NOW)
    store.forget_old(NOW + answers.KEPT_S - 1)
    assert store.claim(claim("t", digest="e"), NOW + answers.KEPT_S - 1, {"t"}).state == "other"
    fresh = store.claim(claim("t", "c2", "e"), NOW + answers.KEPT_S + 1, {"t"})
    assert (fresh.state, fresh.call) == ("yours", "c2")
    store.forget_old(NOW + 3 * answers.KEPT_S)
    assert store.claim(claim("u", "c3"), NOW, {"u"}).call == "c3"
