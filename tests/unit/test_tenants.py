"""The tenants' folder: valid and invalid files, and the tenant that a key belongs to."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from serve.errors import SettingsError
from serve.tenants import watched_files
from serve.tenants.files import (
    KEYS,
    TENANTS,
    add_tenant,
    read_keys,
    read_tenants,
    revoke_keys,
    rotate_key,
)
from serve.tenants.keys import KEY, tenant_directory, tenant_of
from serve.tenants.tenant import Tenant
from serve.tenants.watched_files import TenantFiles


def tenant_by_key(folder: Path, key: str) -> str | None:
    return tenant_of(key, tenant_directory(read_tenants(folder), read_keys(folder)))


def test_an_empty_folder_has_no_tenants(tmp_path: Path) -> None:
    assert read_tenants(tmp_path / "none") == {}
    assert tenant_by_key(tmp_path, "octet_acme_" + "0" * 40) is None


def test_a_key_is_shown_once_and_kept_as_its_digest(tmp_path: Path) -> None:
    key = add_tenant(tmp_path, "acme", {"weight": 2.0})
    assert KEY.fullmatch(key)
    assert key.startswith("octet_acme_")
    assert tenant_by_key(tmp_path, key) == "acme"
    assert read_tenants(tmp_path)["acme"].weight == 2
    secret = key.rpartition("_")[2]
    for file in tmp_path.iterdir():
        assert secret not in file.read_text()
    assert stat.S_IMODE((tmp_path / KEYS).stat().st_mode) == 0o600


def test_a_key_works_for_its_own_tenant_only(tmp_path: Path) -> None:
    acme, other = add_tenant(tmp_path, "acme", {}), add_tenant(tmp_path, "other", {})
    assert tenant_by_key(tmp_path, other) == "other"
    swapped = acme.replace("acme", "other")
    for wrong in (swapped, acme[:-1], acme + "0", acme.upper(), "", "octet_", "octet__", "é" * 60):
        assert tenant_by_key(tmp_path, wrong) is None


def test_two_keys_while_rotating_and_none_after_revoking(tmp_path: Path) -> None:
    first = add_tenant(tmp_path, "acme", {})
    second = rotate_key(tmp_path, "acme")
    assert [tenant_by_key(tmp_path, key) for key in (first, second)] == ["acme", "acme"]
    third = rotate_key(tmp_path, "acme")
    assert [tenant_by_key(tmp_path, key) for key in (first, second, third)] == [
        None,
        "acme",
        "acme",
    ]
    assert revoke_keys(tmp_path, "acme", but_newest=True) == 1
    assert [tenant_by_key(tmp_path, key) for key in (second, third)] == [None, "acme"]
    assert revoke_keys(tmp_path, "acme") == 1
    assert tenant_by_key(tmp_path, third) is None
    assert "acme" in read_tenants(tmp_path)


def test_a_removed_tenant_has_no_keys_and_a_new_one_inherits_none(
    tmp_path: Path,
) -> None:
    old = add_tenant(tmp_path, "acme", {})
    (tmp_path / TENANTS).write_text("")
    assert tenant_by_key(tmp_path, old) is None
    new = add_tenant(tmp_path, "acme", {})
    assert [tenant_by_key(tmp_path, key) for key in (old, new)] == [None, "acme"]


def test_adding_keeps_what_was_written_by_hand(tmp_path: Path) -> None:
    (tmp_path / TENANTS).write_text("# by hand\nacme:\n  weight: 2 # twice")
    add_tenant(tmp_path, "other", {"models": ["m"], "monthly_work": 10})
    text = (tmp_path / TENANTS).read_text()
    assert text.startswith("# by hand\nacme:\n  weight: 2 # twice\nother:\n")
    assert read_tenants(tmp_path)["other"].models == ("m",)
    with pytest.raises(SettingsError, match="'acme' exists already"):
        add_tenant(tmp_path, "acme", {})


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("acme: {wieght: 2}", "acme.wieght: unknown key: did you mean 'weight'"),
        ("acme: {weight: -1}", "acme: weight -1.0 must be"),
        ("acme: {weight: heavy}", "acme.weight: .*number.*heavy"),
        ("ACME: {}", "tenant 'ACME': an id is"),
        ("a_b: {}", "tenant 'a_b': an id is"),
        ("-a: {}", "tenant '-a': an id is"),
        ("1: {}", "tenant '1': an id is"),
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
        ("a: " + "[" * 1000, "not YAML"),
    ],
)
def test_faults_are_named(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / TENANTS).write_text(text)
    with pytest.raises(SettingsError, match=fault):
        read_tenants(tmp_path)


def test_nothing_is_written_if_the_tenant_would_be_wrong(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="weight"):
        add_tenant(tmp_path, "acme", {"weight": 0})
    assert not (tmp_path / TENANTS).exists()
    for change in (rotate_key, revoke_keys):
        with pytest.raises(SettingsError, match="'acme' does not exist"):
            change(tmp_path, "acme")


def test_keys_that_others_can_read_are_refused(tmp_path: Path) -> None:
    add_tenant(tmp_path, "acme", {})
    (tmp_path / KEYS).chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        read_keys(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", '{"a": [1]}', '{"a": [{"sha256": "x"}]}'])
def test_a_foreign_file_of_keys_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / KEYS).write_text(content)
    (tmp_path / KEYS).chmod(0o600)
    with pytest.raises(SettingsError, match="not a file of keys"):
        read_keys(tmp_path)


def test_changed_files_are_read_again(tmp_path: Path) -> None:
    files = TenantFiles(tmp_path)
    assert not files.read()
    key = add_tenant(tmp_path, "acme", {})
    assert files.read()
    assert not files.read()
    assert tenant_of(key, files.directory) == "acme"
    second = rotate_key(tmp_path, "acme")
    assert files.read()
    assert tenant_of(second, files.directory) == "acme"
    (tmp_path / TENANTS).write_text("acme:\n  weight: 3\n")
    assert files.read()
    assert files.tenants["acme"].weight == 3


def test_a_key_is_revoked_while_the_other_file_is_wrong(tmp_path: Path) -> None:
    key = add_tenant(tmp_path, "acme", {})
    files = TenantFiles(tmp_path)
    (tmp_path / TENANTS).write_text("acme: [")
    revoke_keys(tmp_path, "acme")
    assert files.read()
    assert tenant_of(key, files.directory) is None
    assert files.faults.keys() == {TENANTS}
    (tmp_path / TENANTS).write_text("acme: {}")
    files.read()
    assert files.faults == {}


def test_an_unreadable_file_is_read_again_later(tmp_path: Path) -> None:
    key = add_tenant(tmp_path, "acme", {})
    files = TenantFiles(tmp_path)
    revoke_keys(tmp_path, "acme")
    (tmp_path / KEYS).chmod(0o644)
    assert not files.read()
    assert "chmod 600" in files.faults[KEYS]
    (tmp_path / KEYS).chmod(0o600)
    assert files.read()
    assert tenant_of(key, files.directory) is None


def test_a_restart_finds_the_last_valid_files(tmp_path: Path) -> None:
    folder, copies = tmp_path / "tenants", tmp_path / "usage"
    copies.mkdir()
    key = add_tenant(folder, "acme", {"weight": 2.0})
    TenantFiles(folder, copies)
    (folder / TENANTS).write_text("acme: [")
    (folder / KEYS).unlink()
    with pytest.raises(SettingsError):
        TenantFiles(folder)
    again = TenantFiles(folder, copies)
    assert again.faults.keys() == {TENANTS, KEYS}
    assert tenant_of(key, again.directory) == "acme"
    assert again.tenants["acme"].weight == 2
    (folder / TENANTS).write_text("other: {}")
    assert again.read()
    assert again.faults.keys() == {KEYS}
    assert TenantFiles(folder, copies).tenants.keys() == {"other"}
    for name in (TENANTS, KEYS):
        assert stat.S_IMODE((copies / name).stat().st_mode) == 0o600


def test_a_faulty_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_tenant(tmp_path, "acme", {})
    files = TenantFiles(tmp_path)
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
    key = add_tenant(tmp_path / "mounted", "acme", {})
    files = TenantFiles(tmp_path / "mounted")
    (tmp_path / "mounted").rename(tmp_path / "gone")
    assert not files.read()
    assert tenant_of(key, files.directory) == "acme"
    assert files.faults.keys() == {TENANTS, KEYS}


def test_rewritten_files_keep_their_link_and_mode(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    real = tmp_path / "config" / TENANTS
    real.write_text("acme: {}\n")
    real.chmod(0o640)
    folder = tmp_path / "tenants"
    folder.mkdir()
    (folder / TENANTS).symlink_to(real)
    add_tenant(folder, "other", {})
    assert (folder / TENANTS).is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert "other" in read_tenants(folder)


def test_every_digest_is_compared(tmp_path: Path) -> None:
    """Both keys of a tenant work, and only their digests are stored."""
    keys = [add_tenant(tmp_path, "acme", {}), rotate_key(tmp_path, "acme")]
    kept = json.loads((tmp_path / KEYS).read_text())["acme"]
    assert len({key["sha256"] for key in kept}) == 2
    assert all(tenant_by_key(tmp_path, key) == "acme" for key in keys)
