"""The files in the tenants' folder: the tenants with their limits, and the digests of their keys.

`tenants.yaml` is written by hand or by `octet tenant`, `keys.json` by `octet tenant` alone. A key
itself is kept nowhere: it is shown once, and its SHA-256 is kept. A plain digest suffices, because
keys are random and so cannot be guessed as passwords can.

    tenants.yaml                            keys.json, readable by its owner alone
    acme:                                   {"acme": [{"sha256": "…", "created": "2026-11-22"}]}
      weight: 2
      requests_per_s: 5
"""

from __future__ import annotations

import fcntl
import json
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import TypeAdapter, ValidationError

from ..atomic_file import replace_file
from ..errors import SettingsError, did_you_mean
from .keys import KEY_BYTES, VALID_KEYS, KeyDigests, digest
from .tenant import ID, Tenant

TENANTS, KEYS = "tenants.yaml", "keys.json"

_TENANTS = TypeAdapter(dict[str, Tenant])


def read_tenants(folder: Path) -> dict[str, Tenant]:
    """Read the tenants by their ids; a folder without `tenants.yaml` has no tenants.

    Raises `SettingsError`, with one line for each fault, if the file cannot be read or is not
    valid.
    """
    file = folder / TENANTS
    try:
        return _parse(file.read_text(encoding="utf-8"), file)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: {error}") from None


def read_keys(folder: Path) -> KeyDigests:
    """Read the digests of all keys, by tenant; a folder without `keys.json` has no keys.

    Raises `SettingsError` if the file cannot be read or is not valid, if other users can read it,
    or if its group can change it. The group may read it, because Kubernetes gives a Secret to a
    pod's group.
    """
    file = folder / KEYS
    try:
        if file.stat().st_mode & 0o027:
            raise SettingsError(
                f"{file}: other users can read the file, or its group can change it: chmod 600"
            )
        keys: KeyDigests = json.loads(file.read_text(encoding="utf-8"))
        for owned in keys.values():
            for key in owned:
                bytes.fromhex(key["sha256"])
                str.strip(key["created"])
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SettingsError(f"{file}: not a file of keys") from None
    return keys


class FileStamp(NamedTuple):
    """The facts by which a change of a file, or of its permissions, is noticed."""

    changed_ns: int
    status_changed_ns: int
    size: int
    inode: int


def stamp(file: Path) -> FileStamp | None:
    """The present stamp of a file; None if there is no such file."""
    try:
        status = file.stat()
    except OSError:
        return None
    return FileStamp(status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)


# -- changes that `octet tenant` makes ------------------------------------------------------------


def add_tenant(folder: Path, name: str, values: Mapping[str, Any]) -> str:
    """Append a tenant to `tenants.yaml`, and return the tenant's key.

    The text that the file holds already stays as it is. `values`: the tenant's share and limits.
    Raises `SettingsError` if the tenant exists, a value is not valid, or a file cannot be used.
    """
    with _changing(folder):
        file = folder / TENANTS
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        if name in _parse(before, file):
            raise SettingsError(f"tenant '{name}' exists already")
        entry = yaml.safe_dump({name: dict(values)}, sort_keys=False, allow_unicode=True)
        after = before + ("\n" if before and not before.endswith("\n") else "") + entry
        _parse(after, file)
        keys = read_keys(folder)
        key = _new_key(keys, name, [])
        mode = file.stat().st_mode & 0o777 if file.exists() else 0o644
        replace_file(file, after.encode(), mode=mode, sync=True, keep_owner=True)
        _write_keys(folder, keys)
        return key


def rotate_key(folder: Path, name: str) -> str:
    """Make a new key of a tenant, and return it.

    The newest of the old keys stays valid; the others are revoked. Raises `SettingsError` if there
    is no such tenant, or a file cannot be used.
    """
    with _changing(folder):
        _check_tenant(folder, name)
        keys = read_keys(folder)
        key = _new_key(keys, name, keys.get(name, [])[-(VALID_KEYS - 1) :])
        _write_keys(folder, keys)
        return key


def revoke_keys(folder: Path, name: str, *, but_newest: bool = False) -> int:
    """Revoke a tenant's keys; return the number of revoked keys.

    `but_newest`: keep the newest key. Raises `SettingsError` if there is no such tenant, or a file
    cannot be used.
    """
    with _changing(folder):
        keys = read_keys(folder)
        if name not in keys:
            _check_tenant(folder, name)
        kept = keys.get(name, [])[-1:] if but_newest else []
        revoked = len(keys.get(name, [])) - len(kept)
        keys[name] = kept
        _write_keys(folder, keys)
        return revoked


def _check_tenant(folder: Path, name: str) -> None:
    tenants = read_tenants(folder)
    if name not in tenants:
        raise SettingsError(f"tenant '{name}' does not exist: {did_you_mean(name, tenants)}")


def _new_key(keys: KeyDigests, name: str, kept: list[dict[str, str]]) -> str:
    """Make a new key of tenant `name`, and return it.

    Afterwards `keys` holds the digests `kept` and that of the new key for this tenant, and no
    others.
    """
    from datetime import datetime

    key = f"octet_{name}_{secrets.token_hex(KEY_BYTES)}"
    created = datetime.now(UTC).isoformat(timespec="seconds")
    keys[name] = [*kept, {"sha256": digest(key), "created": created}]
    return key


def _parse(text: str, file: Path) -> dict[str, Tenant]:
    try:
        data = yaml.load(text, _UniqueKeys)  # noqa: S506 - it is a SafeLoader
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise SettingsError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise SettingsError(f"{file}: expected tenants by their id, found {type(data).__name__}")
    for name, entry in data.items():
        if not (isinstance(name, str) and ID.fullmatch(name)):
            raise SettingsError(
                f"{file}: tenant '{name}': an id is 1 to 63 characters of a-z 0-9 -, and neither "
                "begins nor ends with -"
            )
        for key in entry if isinstance(entry, dict) else ():
            if entry[key] is None:
                raise SettingsError(
                    f"{file}: {name}.{key} is empty: leave the key out for no limit"
                )
    given = {name: {} if entry is None else entry for name, entry in data.items()}
    # Checked as JSON: there, strict validation takes a list for a tuple, but no text for a number.
    try:
        return _TENANTS.validate_json(json.dumps(given), strict=True)
    except (TypeError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise SettingsError(f"{file}: {error}") from None
        raise SettingsError("\n".join(f"{file}: {line}" for line in _faults(error))) from None


def _faults(error: ValidationError) -> Iterator[str]:
    known = [field.name for field in fields(Tenant)]
    for fault in error.errors():
        where = ".".join(map(str, fault["loc"]))
        if fault["type"] == "unexpected_keyword_argument":
            yield f"{where}: unknown key: {did_you_mean(str(fault['loc'][-1]), known)}"
        elif fault["type"] == "value_error":
            yield f"{where}: {fault['msg'].removeprefix('Value error, ')}"
        else:
            yield f"{where}: {fault['msg']} (found {fault['input']!r})"


@contextmanager
def _changing(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that commands change its files one after the other.

    Raises `SettingsError` if the folder or one of its files cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise SettingsError(f"{folder}: {error.strerror}") from None


def _write_keys(folder: Path, keys: KeyDigests) -> None:
    content = json.dumps(keys, indent=1) + "\n"
    replace_file(folder / KEYS, content.encode(), sync=True, keep_owner=True)


# The loader in C reads 10,000 tenants in a fraction of the time.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _UniqueKeys(_Loader):  # type: ignore[misc]  # chosen when the file is imported
    """A YAML loader that refuses duplicate keys, where YAML itself would take the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = Counter(self.construct_object(key, deep=True) for key, _ in node.value)
        if twice := [key for key, count in keys.items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"'{twice[0]}' is defined twice")
        return super().construct_mapping(node, deep)
