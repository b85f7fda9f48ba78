"""The tenants' folder: who they are, and the digests of their keys.

`tenants.yaml` is written by hand or by `octet tenant`, `keys.json` by `octet tenant` alone. A key
itself is nowhere: it is shown once, and what is kept is its SHA-256. Keys are random, so a plain
digest cannot be searched for as that of a password can.

    tenants.yaml                            keys.json, readable by its owner alone
    acme:                                   {"acme": [{"sha256": "…", "created": "2026-11-22"}]}
      weight: 2
      requests_per_s: 5
"""

from __future__ import annotations

import fcntl
import json
import secrets
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
    """Raises `SettingsError` with one line per fault; a folder without the file has no tenants."""
    file = folder / TENANTS
    try:
        return _parse(file.read_text(encoding="utf-8"), file)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: {error}") from None


def read_keys(folder: Path) -> KeyDigests:
    """Raises `SettingsError`, also if others than its owner and group can read the file.

    Kubernetes gives a Secret to a pod's group.
    """
    file = folder / KEYS
    try:
        if file.stat().st_mode & 0o027:
            raise SettingsError(f"{file}: others can read or change it: chmod 600")
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
    """That a file has not changed, nor who may read it."""

    changed_ns: int
    status_changed_ns: int
    size: int
    inode: int


def stamp(file: Path) -> FileStamp | None:
    """None if there is no such file."""
    try:
        found = file.stat()
    except OSError:
        return None
    return FileStamp(found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)


# -- what `octet tenant` does ---------------------------------------------------------------------


def add_tenant(folder: Path, name: str, values: Mapping[str, Any]) -> str:
    """Append a tenant to the file, as it stands; returns its key. Raises `SettingsError`."""
    with _changing(folder):
        file = folder / TENANTS
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        if name in _parse(before, file):
            raise SettingsError(f"tenant '{name}' is there already")
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
    """A second key, beside the newest one; what was older ends. Raises `SettingsError`."""
    with _changing(folder):
        _known(folder, name)
        keys = read_keys(folder)
        key = _new_key(keys, name, keys.get(name, [])[-(VALID_KEYS - 1) :])
        _write_keys(folder, keys)
        return key


def revoke_keys(folder: Path, name: str, *, but_newest: bool = False) -> int:
    """End a tenant's keys; returns how many. Raises `SettingsError`."""
    with _changing(folder):
        keys = read_keys(folder)
        if name not in keys:
            _known(folder, name)
        kept = keys.get(name, [])[-1:] if but_newest else []
        ended = len(keys.get(name, [])) - len(kept)
        keys[name] = kept
        _write_keys(folder, keys)
        return ended


def _known(folder: Path, name: str) -> None:
    tenants = read_tenants(folder)
    if name not in tenants:
        raise SettingsError(f"tenant '{name}' does not exist: {did_you_mean(name, tenants)}")


def _new_key(keys: KeyDigests, name: str, kept: list[dict[str, str]]) -> str:
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
            raise SettingsError(f"{file}: tenant '{name}': an id is 1 to 63 of a-z 0-9 -")
        for key in entry if isinstance(entry, dict) else ():
            if entry[key] is None:
                raise SettingsError(f"{file}: {name}.{key} is empty: leave it out for no limit")
    given = {name: {} if entry is None else entry for name, entry in data.items()}
    try:  # as JSON, because there a list may be a tuple, and "yes" is no number
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
    """One change at a time, whoever else runs the command."""
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


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands there twice, of which YAML would take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' stands there twice")
        return super().construct_mapping(node, deep)
