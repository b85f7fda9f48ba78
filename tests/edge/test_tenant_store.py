"""Tenants and keys in real SQLite and PostgreSQL: changes, files, audit, and what others read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, update

from serve.errors import Conflict, InvalidRequest, NotFound, OctetError
from serve.settings.application import sqlite_url
from serve.store import schema
from serve.store.database import Database
from serve.store.times import timestamp
from serve.tenants.administration import Administration
from serve.tenants.keys import TenantDirectory, digest, key_id
from serve.tenants.registry import TenantRegistry
from serve.tenants.tenant import Tenant
from serve.tenants.transaction import MOST_KEYS
from serve.usage.ledger import UsageLedger

from ..builders import usage_record
from .databases import NOW, emptied


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def admin(database: Database, clock: Clock) -> Administration:
    return Administration(database, clock)


@pytest.fixture
def reader(database: Database, url: str) -> Iterator[TenantRegistry]:
    """What another process reads."""
    with closing(Database(url)) as other:
        yield TenantRegistry(other)


def digests(**keys: str) -> dict[str, list[dict[str, str]]]:
    """The contents of a keys.json: one key for each tenant."""
    return {name: [{"sha256": digest(key), "created": "2026"}] for name, key in keys.items()}


def actions(admin: Administration) -> list[tuple[str, str]]:
    return [(entry.action, entry.tenant) for entry in admin.audit(limit=1000).items]


def test_others_read_only_what_has_changed(admin: Administration, reader: TenantRegistry) -> None:
    for name in ("a", "b", "c"):
        admin.create_tenant("me", name, {"weight": 2})
    changes = reader.read()
    assert changes
    assert changes.tenants.keys() == {"a", "b", "c"}
    assert reader.read() is None
    made = admin.create_key("me", "b", ["generate"])
    changes = reader.read()
    assert changes
    (access,) = changes.tenants.values()
    assert changes.tenants.keys() == {"b"}
    assert access
    assert [(key.id, key.scopes) for key in access.keys] == [(made.stored.id, ("generate",))]
    admin.change_tenant("me", "a", {"weight": None, "models": ["m"]})
    admin.delete_tenant("me", "c")
    changes = reader.read()
    assert changes
    assert changes.tenants.keys() == {"a", "c"}
    assert changes.tenants["c"] is None
    assert reader.tenants == {"a": Tenant(models=("m",)), "b": Tenant(weight=2)}


def test_a_key_is_kept_as_its_digest(admin: Administration, database: Database) -> None:
    admin.create_tenant("me", "a", {})
    secret = admin.create_key("me", "a").secret.rpartition("_")[2]
    tables = schema.KEYS, schema.TENANTS, schema.AUDIT
    rows = database.read(lambda c: [row for table in tables for row in c.execute(select(table))])
    assert len(rows) == 4
    assert secret not in str(rows)


def test_a_rotated_key_ends_after_its_overlap(
    admin: Administration, reader: TenantRegistry, clock: Clock
) -> None:
    admin.create_tenant("me", "a", {})
    old = admin.create_key("me", "a", ["read"])
    new = admin.rotate_key("me", old.stored.id, 60.0)
    assert new.stored.scopes == ("read",)
    directory = TenantDirectory()
    reader.read()
    directory.change(reader.whole)
    assert directory.owner(old.secret, clock.now + 59)
    assert directory.owner(old.secret, clock.now + 61) is None
    assert directory.owner(new.secret, clock.now + 10**6)
    with pytest.raises(Conflict, match=f"its successor is {new.stored.id}"):
        admin.rotate_key("me", old.stored.id, 60.0)  # it would end with the first overlap
    clock.now += 61
    with pytest.raises(Conflict, match="has expired"):
        admin.rotate_key("me", old.stored.id, 60.0)
    with pytest.raises(NotFound):
        admin.rotate_key("me", "nothing", 60.0)


def test_a_deleted_tenant_comes_back_without_its_keys(
    admin: Administration, reader: TenantRegistry
) -> None:
    admin.create_tenant("me", "a", {"weight": 2})
    admin.create_key("me", "a")
    admin.delete_tenant("me", "a")
    for change in (
        lambda: admin.delete_tenant("me", "a"),
        lambda: admin.change_tenant("me", "a", {"weight": 1}),
        lambda: admin.create_key("me", "a"),
        lambda: admin.tenant("a"),
    ):
        with pytest.raises(NotFound):
            change()
    admin.create_tenant("me", "a", {})
    assert (admin.tenant("a").limits, admin.keys("a").items) == ({}, [])
    reader.read()
    assert (reader.tenants, reader.keys) == ({"a": Tenant()}, {"a": ()})


def test_a_refused_change_changes_nothing(admin: Administration) -> None:
    admin.create_tenant("me", "a", {"weight": 2})
    before = actions(admin)
    for change, error in (
        (lambda: admin.create_tenant("me", "a", {}), Conflict),
        (lambda: admin.create_tenant("me", "b", {"weight": 0}), InvalidRequest),
        (lambda: admin.change_tenant("me", "a", {"request_burst": 2}), InvalidRequest),
        (lambda: admin.change_tenant("me", "a", {"weight": "2"}), InvalidRequest),
        (lambda: admin.create_key("me", "a", ["x"]), InvalidRequest),
    ):
        with pytest.raises(error):
            change()
    assert actions(admin) == before
    assert [one.id for one in admin.tenants().items] == ["a"]


def test_limits_of_a_newer_release_survive(
    admin: Administration, database: Database, reader: TenantRegistry
) -> None:
    admin.create_tenant("me", "a", {})
    newer = json.dumps({"weight": 2, "colour": "blue"})
    database.write(lambda c: c.execute(update(schema.TENANTS).values(limits=newer)))
    admin.change_tenant("me", "a", {"weight": 3})
    assert admin.tenant("a").limits == {"weight": 3, "colour": "blue"}
    reader.read()
    assert reader.tenants["a"] == Tenant(weight=3)


def test_a_tenant_has_at_most_so_many_keys(admin: Administration, clock: Clock) -> None:
    admin.create_tenant("me", "a", {})
    admin.create_key("me", "a", expires=timestamp(clock.now + 5))
    clock.now += 6  # a key that has expired does not count
    for _ in range(MOST_KEYS):
        last = admin.create_key("me", "a")
    with pytest.raises(Conflict, match="revoke some first"):
        admin.create_key("me", "a")
    admin.revoke_key("me", last.stored.id)
    admin.create_key("me", "a")


# -- files ----------------------------------------------------------------------------------------


def test_files_are_applied_as_differences(admin: Administration, reader: TenantRegistry) -> None:
    admin.create_tenant("me", "api", {})
    admin.create_tenant("me", "taken", {"weight": 3})
    files = {"a": Tenant(weight=2), "b": Tenant(), "taken": Tenant()}
    keys = digests(a="octet_a_1", b="octet_b_1", unknown="octet_unknown_1")
    dry = admin.apply("files", files, keys, dry_run=True)
    assert [(one.action, one.tenant) for one in dry] == [
        *(("create", "a"), ("create", "b"), ("adopt", "taken")),
        *(("add key", "a"), ("add key", "b")),
    ]
    assert dry[2].changes == {"weight": (3, None)}
    assert [one.id for one in admin.tenants().items] == ["api", "taken"]
    assert admin.apply("files", files, keys) == dry
    assert admin.apply("files", files, keys) == []
    with pytest.raises(Conflict, match=r"managed by tenants\.yaml"):
        admin.change_tenant("me", "a", {"weight": 1})
    with pytest.raises(Conflict):
        admin.delete_tenant("me", "a")

    after = admin.apply("files", {"a": Tenant(weight=4)}, digests(a="octet_a_2"))
    assert [(one.action, one.tenant) for one in after] == [
        *(("change", "a"), ("delete", "b"), ("delete", "taken")),
        *(("add key", "a"), ("revoke key", "a")),
    ]
    reader.read()
    assert reader.tenants == {"api": Tenant(), "a": Tenant(weight=4)}
    assert [key.id for key in reader.keys["a"]] == [key_id(digest("octet_a_2"))]


def test_files_of_an_earlier_release_are_applied(admin: Administration) -> None:
    """Its times of keys are longer than the column, which PostgreSQL refuses."""
    keys = {"a": [{"sha256": digest("octet_a_1"), "created": "2026-11-22T20:36:36+00:00"}]}
    keys["b"] = [{"sha256": digest("octet_b_1"), "created": "once upon a time in the west"}]
    admin.apply("files", {"a": Tenant(), "b": Tenant()}, keys)
    assert [key.created for key in admin.keys("a").items] == ["2026-11-22T20:36:36.000Z"]
    assert len(admin.keys("b").items) == 1


def test_files_are_handed_over_to_the_api(admin: Administration) -> None:
    files, keys = {"a": Tenant(weight=2), "b": Tenant()}, digests(a="octet_a_1")
    admin.apply("files", files, keys)
    handed = admin.apply("me", {"a": Tenant(weight=2)}, keys, managed_by="api")
    assert [(one.action, one.tenant) for one in handed] == [("adopt", "a")]
    assert admin.change_tenant("me", "a", {"weight": 3}).managed_by == "api"
    assert admin.tenant("b").managed_by == "file"  # what is not named stays
    gone = admin.apply("files", {}, {})
    assert [(one.action, one.tenant) for one in gone] == [("delete", "b")]
    assert [key.id for key in admin.keys("a").items] == [key_id(digest("octet_a_1"))]


def test_a_tenant_of_files_that_comes_back_has_its_keys_again(
    admin: Administration, reader: TenantRegistry
) -> None:
    """As after a file that was read while it was being written."""
    files, keys = {"a": Tenant(), "b": Tenant()}, digests(a="octet_a_1", b="octet_b_1")
    admin.apply("files", files, keys)
    admin.apply("files", {"b": Tenant()}, keys)
    reader.read()
    assert reader.keys.keys() == {"b"}
    admin.apply("files", files, keys)
    reader.read()
    assert [key.id for key in reader.keys["a"]] == [key_id(digest("octet_a_1"))]
    admin.apply("files", {"b": Tenant()}, keys)
    admin.create_tenant("me", "a", {})  # another tenant with the same id
    assert admin.keys("a").items == []


def test_a_revoked_key_of_a_file_stays_revoked(admin: Administration) -> None:
    files, keys = {"a": Tenant()}, digests(a="octet_a_1")
    admin.apply("files", files, keys)
    made = admin.create_key("me", "a")
    admin.revoke_key("me", key_id(digest("octet_a_1")))
    assert admin.apply("files", files, keys) == []
    assert admin.apply("files", files, {}) == []
    assert admin.apply("files", files, None) == []
    assert [key.id for key in admin.keys("a").items] == [made.stored.id]


# -- histories against a plain model --------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c"])
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("create"), NAMES, st.sampled_from([None, 2, 5])),
        st.tuples(st.just("change"), NAMES, st.sampled_from([None, 0, 3])),
        st.tuples(st.just("delete"), NAMES),
        st.tuples(st.just("key"), NAMES, st.sampled_from([None, 30])),
        st.tuples(st.just("revoke"), st.integers(0, 5)),
        st.tuples(st.just("rotate"), st.integers(0, 5), st.sampled_from([0, 30])),
        st.tuples(st.just("apply"), st.sets(NAMES)),
        st.tuples(st.just("charge"), NAMES, st.integers(1, 3)),
        st.tuples(st.just("wait"), st.sampled_from([10, 40])),
    ),
    max_size=15,
)


@dataclass
class Model:
    """What tenants, keys and sums should be: plain dictionaries and the rules of the docs."""

    now: float = NOW
    limits: dict[str, int | None] = field(default_factory=dict)  # monthly work, by tenant
    of_file: set[str] = field(default_factory=set)
    keys: dict[str, tuple[str, float | None]] = field(default_factory=dict)  # tenant, expiry
    spent: dict[str, float] = field(default_factory=dict)
    rotated: set[str] = field(default_factory=set)
    hidden: dict[str, dict[str, tuple[str, float | None]]] = field(default_factory=dict)

    def valid(self) -> dict[str, str]:
        """The tenant of each key that works now."""
        return {
            key: tenant
            for key, (tenant, ends) in self.keys.items()
            if ends is None or ends > self.now
        }

    def hide(self, tenant: str) -> None:
        """Let files delete a tenant: its keys work again if the files name it again."""
        mine = {key: of for key, of in self.keys.items() if of[0] == tenant}
        self.drop(tenant)
        self.hidden[tenant] = mine

    def drop(self, tenant: str) -> None:
        del self.limits[tenant]
        self.of_file.discard(tenant)
        self.keys = {key: of for key, of in self.keys.items() if of[0] != tenant}


def perform(
    operation: tuple[Any, ...], model: Model, admin: Administration, ledger: UsageLedger, call: str
) -> None:
    """Perform an operation on both; a refusal must be expected by the model, and the reverse."""
    name, *given = operation
    known = list(model.keys)
    refused = False
    try:
        match name:
            case "create":
                tenant, budget = given
                refused = tenant in model.limits
                admin.create_tenant(
                    "me", tenant, {} if budget is None else {"monthly_work": budget}
                )
                model.limits[tenant] = budget
            case "change":
                tenant, budget = given
                refused = tenant not in model.limits or tenant in model.of_file
                admin.change_tenant("me", tenant, {"monthly_work": budget})
                model.limits[tenant] = budget
            case "delete":
                (tenant,) = given
                refused = tenant not in model.limits or tenant in model.of_file
                admin.delete_tenant("me", tenant)
                model.drop(tenant)
            case "key":
                tenant, after_s = given
                refused = tenant not in model.limits
                ends = None if after_s is None else model.now + after_s
                until = None if ends is None else timestamp(ends)
                made = admin.create_key("me", tenant, expires=until)
                model.keys[made.secret] = tenant, ends
            case "revoke":
                refused = given[0] >= len(known)
                id = "none" if refused else key_id(digest(known[given[0]]))
                admin.revoke_key("me", id)
                del model.keys[known[given[0]]]
            case "rotate":
                old = known[given[0]] if given[0] < len(known) else ""
                refused = old not in model.valid() or old in model.rotated
                made = admin.rotate_key("me", key_id(digest(old)), given[1])
                tenant, ends = model.keys[old]
                model.keys[made.secret] = tenant, ends
                ends = model.now + given[1] if ends is None else min(ends, model.now + given[1])
                model.keys[old] = tenant, ends
                model.rotated.add(old)
            case "apply":
                (names,) = given
                admin.apply("files", {one: Tenant(monthly_work=7) for one in names}, None)
                for gone in model.of_file - names:
                    model.hide(gone)
                for name in names:
                    model.keys |= model.hidden.pop(name, {})
                model.of_file |= names
                model.limits |= dict.fromkeys(names, 7)
            case "charge":
                tenant, work_s = given
                ledger.append([usage_record(call, tenant=tenant, work_s=work_s)], model.now)
                model.spent[tenant] = model.spent.get(tenant, 0.0) + work_s
            case "wait":
                model.now += given[0]
    except OctetError:
        assert refused, operation
    else:
        assert not refused, operation


@pytest.mark.parametrize(
    "histories",
    [pytest.param(20, id="some"), pytest.param(500, id="many", marks=pytest.mark.long)],
)
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_histories_end_as_in_a_plain_model(
    kind: str, histories: int, request: pytest.FixtureRequest
) -> None:
    """A second process, which reads after each operation, knows what the model knows."""

    @given(operations=OPERATIONS)
    @settings(
        max_examples=histories,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    def check(operations: list[tuple[Any, ...]]) -> None:
        folder = request.getfixturevalue("tmp_path_factory").mktemp("history")
        address = sqlite_url(folder)
        if kind == "postgresql":
            address = emptied(request.getfixturevalue("postgres"))
        calls, model = itertools.count(), Model()
        with closing(Database(address)) as one, closing(Database(address)) as two:
            admin, ledger = Administration(one, lambda: model.now), UsageLedger(one, NOW)
            registry, directory = TenantRegistry(two), TenantDirectory()
            directory.change(registry.whole)
            for operation in operations:
                perform(operation, model, admin, ledger, f"c{next(calls)}")
                if changes := registry.read():
                    directory.change(changes)
                found = {name: one.monthly_work for name, one in registry.tenants.items()}
                assert found == model.limits
                owners = {key: directory.owner(key, model.now) for key in model.keys}
                assert {key: o.tenant for key, o in owners.items() if o} == model.valid()
            assert dict(UsageLedger(two, NOW).spent) == model.spent
            assert sum(len(keys) for keys in registry.keys.values()) == len(model.keys)

    check()
