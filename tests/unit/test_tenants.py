"""The tenants' files, valid and invalid, and the tenant that a key belongs to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve.errors import SettingsError
from serve.tenants import watched_files
from serve.tenants.files import KEYS, TENANTS, read_keys, read_tenants
from serve.tenants.keys import (
    ApiKey,
    TenantAccess,
    TenantChanges,
    TenantDirectory,
    access_of,
    digest,
    key_id,
)
from serve.tenants.tenant import Tenant
from serve.tenants.watched_files import WatchedFiles

NOW = 1000.0


def a_key(tenant: str, number: int) -> str:
    return f"octet_{tenant}_{number:040x}"


def access(*keys: ApiKey) -> TenantAccess:
    return access_of(Tenant(), keys)


def write(folder: Path, tenants: str, *keys: str) -> None:
    """Write both files; `keys`: of the tenant acme."""
    folder.mkdir(exist_ok=True)
    (folder / TENANTS).write_text(tenants)
    owned = [{"sha256": digest(key), "created": "2026-11-22"} for key in keys]
    (folder / KEYS).write_text(json.dumps({"acme": owned}))
    (folder / KEYS).chmod(0o600)


# -- keys -----------------------------------------------------------------------------------------


def test_a_key_works_for_its_own_tenant_only() -> None:
    acme, other = a_key("acme", 1), a_key("other", 2)
    directory = TenantDirectory()
    of = {"acme": access(ApiKey(digest(acme))), "other": access(ApiKey(digest(other)))}
    directory.change(TenantChanges(dict(of), whole=True))
    assert (found := directory.owner(other, NOW))
    assert (found.tenant, found.key.id) == ("other", key_id(digest(other)))
    swapped = acme.replace("acme", "other")
    for wrong in (swapped, acme[:-1], acme + "0", acme.upper(), "", "octet_", "octet__", "é" * 60):
        assert directory.owner(wrong, NOW) is None


def test_a_directory_follows_its_changes() -> None:
    first, second, third = (ApiKey(digest(a_key("acme", i))) for i in range(3))
    directory = TenantDirectory()

    def valid() -> list[bool]:
        return [directory.owner(a_key("acme", i), NOW) is not None for i in range(3)]

    directory.change(TenantChanges({"acme": access(first)}, whole=True))
    directory.change(TenantChanges({"acme": access(first, second)}))
    assert valid() == [True, True, False]
    directory.change(TenantChanges({"acme": access(second, third)}))
    assert valid() == [False, True, True]
    directory.change(TenantChanges({"acme": None}))
    assert valid() == [False, False, False]
    assert directory.get("acme") is None
    directory.change(TenantChanges({"acme": access(first)}))
    directory.change(TenantChanges({"other": access(second)}, whole=True))
    assert valid() == [False, True, False]


def test_a_key_ends_when_it_expires() -> None:
    directory = TenantDirectory()
    directory.change(TenantChanges({"acme": access(ApiKey(digest(a_key("acme", 1)), expires=NOW))}))
    assert directory.owner(a_key("acme", 1), NOW - 1)
    assert directory.owner(a_key("acme", 1), NOW) is None


# -- files ----------------------------------------------------------------------------------------


def test_an_empty_folder_has_no_tenants(tmp_path: Path) -> None:
    assert read_tenants(tmp_path / "none") == {}
    assert read_keys(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("acme: {wieght: 2}", "acme.wieght: unknown key: did you mean 'weight'"),
        ("acme: {weight: -1}", "acme: weight -1.0 must be"),
        ("acme: {weight: heavy}", "acme.weight: .*number.*heavy"),
        ("ACME: {}", "tenant 'ACME': an id is"),
        ("a_b: {}", "tenant 'a_b': an id is"),
        ("-a: {}", "tenant '-a': an id is"),
        ("1: {}", "tenant '1': an id is text"),
        ("[acme]", "expected tenants by their id, found list"),
        ("acme: [", "not YAML"),
        ("acme: 7", "acme: "),
        ("acme: false", "acme: "),
        ("acme: {}\nacme: {}", "'acme' is defined twice"),
        ("acme: {weight: 1, weight: 2}", "'weight' is defined twice"),
        ("acme: {models: }", "acme.models is empty"),
        ("acme: {monthly_work: off}", "acme.monthly_work: .*number"),
        ("acme: {max_requests: no}", "acme.max_requests: .*integer"),
        ("acme: {weight: .nan}", "weight nan"),
        ("acme: {operator: 1}", "acme.operator: .*boolean"),
        ("acme: {weight: 2026-13-45}", "not YAML"),
        ("acme: {weight: 2026-11-22}", "date"),
        ("a: !!bool x", "not YAML"),
        ("", "there is nothing in it; for no tenants write {}"),
        ("# nobody yet", "there is nothing in it"),
        ("a: " + "[" * 1000, "not YAML"),
    ],
)
def test_faults_are_named(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / TENANTS).write_text(text)
    with pytest.raises(SettingsError, match=fault):
        read_tenants(tmp_path)


def test_keys_that_others_can_read_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "acme: {}", a_key("acme", 1))
    (tmp_path / KEYS).chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        read_keys(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"a": [1]}', '{"a": [{"sha256": "x"}]}', '{"a": [{"sha256": "", "created": ""}]}'],
)
def test_a_foreign_file_of_keys_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / KEYS).write_text(content)
    (tmp_path / KEYS).chmod(0o600)
    with pytest.raises(SettingsError, match="not a file of keys"):
        read_keys(tmp_path)


# -- files while the server runs ------------------------------------------------------------------


def test_changed_files_are_read_again(tmp_path: Path) -> None:
    files = WatchedFiles(tmp_path)
    assert not files.read()
    assert files.tenants is None
    write(tmp_path, "acme: {}", a_key("acme", 1))
    assert files.read()
    assert not files.read()
    write(tmp_path, "acme: {weight: 3}", a_key("acme", 1))
    assert files.read()
    assert files.tenants == {"acme": Tenant(weight=3)}


def test_each_file_is_read_by_itself(tmp_path: Path) -> None:
    """A key is revoked while the other file is wrong."""
    write(tmp_path, "acme: {}", a_key("acme", 1))
    files = WatchedFiles(tmp_path)
    files.read()
    write(tmp_path, "acme: [")
    assert files.read()
    assert (files.tenants, files.keys) == ({"acme": Tenant()}, {"acme": []})
    assert files.faults.keys() == {TENANTS}
    (tmp_path / TENANTS).write_text("acme: {}")
    files.read()
    assert files.faults == {}


def test_an_unreadable_file_is_read_again_later(tmp_path: Path) -> None:
    write(tmp_path, "acme: {}", a_key("acme", 1))
    files = WatchedFiles(tmp_path)
    files.read()
    write(tmp_path, "acme: {}")
    (tmp_path / KEYS).chmod(0o644)
    assert not files.read()
    assert "chmod 600" in files.faults[KEYS]
    (tmp_path / KEYS).chmod(0o600)
    assert files.read()
    assert files.keys == {"acme": []}


def test_a_faulty_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "acme: {}")
    files = WatchedFiles(tmp_path)
    files.read()
    parsed: list[Path] = []

    def read(folder: Path) -> dict[str, Tenant]:
        parsed.append(folder)
        return read_tenants(folder)

    monkeypatch.setattr(watched_files, "read_tenants", read)
    (tmp_path / TENANTS).write_text("acme: [")
    for _ in range(3):
        assert not files.read()
    assert len(parsed) == 1


def test_a_lost_folder_keeps_the_known_tenants(tmp_path: Path) -> None:
    write(tmp_path / "mounted", "acme: {}", a_key("acme", 1))
    files = WatchedFiles(tmp_path / "mounted")
    files.read()
    (tmp_path / "mounted").rename(tmp_path / "gone")
    assert not files.read()
    assert files.tenants == {"acme": Tenant()}
    assert files.faults.keys() == {TENANTS, KEYS}
