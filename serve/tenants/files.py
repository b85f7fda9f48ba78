"""The files of a tenants' folder: the tenants with their limits, and the digests of their keys.

They are a way into the database for those who keep tenants under version control: `octet tenant
apply`, or the setting `tenants_folder`. Of a key only the SHA-256 is in the file.

    tenants.yaml                            keys.json, readable by its owner alone
    acme:                                   {"acme": [{"sha256": "…", "created": "2026-11-22"}]}
      weight: 2
      requests_per_s: 5
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..errors import SettingsError
from .limits import LimitsError, parse_tenants
from .tenant import Tenant

TENANTS, KEYS = "tenants.yaml", "keys.json"
SHA256 = re.compile("[0-9a-f]{64}")
# By tenant: the digest of each key, and when it was made.
KeyDigests = dict[str, list[dict[str, str]]]


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
        return check_digests(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise SettingsError(f"{file}: not a file of keys") from None


def check_digests(data: Any) -> KeyDigests:
    """Return data that is the contents of a `keys.json`. Raises `ValueError` for other data."""
    try:
        for owned in data.values():
            for key in owned:
                if not SHA256.fullmatch(key["sha256"]):
                    raise ValueError
                str.strip(key["created"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("not digests of keys by tenant") from None
    digests: KeyDigests = data
    return digests


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


def _parse(text: str, file: Path) -> dict[str, Tenant]:
    try:
        data = yaml.load(text, _UniqueKeys)  # noqa: S506 - it is a SafeLoader
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise SettingsError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if data is None:  # perhaps it is just being written
        raise SettingsError(f"{file}: there is nothing in it; for no tenants write {{}}")
    if not isinstance(data, dict):
        raise SettingsError(f"{file}: expected tenants by their id, found {type(data).__name__}")
    for name, entry in data.items():
        if not isinstance(name, str):
            raise SettingsError(f"{file}: tenant '{name}': an id is text: put it in quotes")
        for key in entry if isinstance(entry, dict) else ():
            if entry[key] is None:
                raise SettingsError(
                    f"{file}: {name}.{key} is empty: leave the key out for no limit"
                )
    given = {name: {} if entry is None else entry for name, entry in data.items()}
    try:
        return parse_tenants(given)
    except LimitsError as error:
        faults = (f"{file}: {where}: {what}" for where, what in error.faults)
        raise SettingsError("\n".join(faults)) from None


# The loader in C reads 10,000 tenants in a fraction of the time.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _UniqueKeys(_Loader):  # type: ignore[misc]  # chosen when the file is imported
    """A YAML loader that refuses duplicate keys, where YAML itself would take the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = Counter(self.construct_object(key, deep=True) for key, _ in node.value)
        if twice := [key for key, count in keys.items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"'{twice[0]}' is defined twice")
        return super().construct_mapping(node, deep)
