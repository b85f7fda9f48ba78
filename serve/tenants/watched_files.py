"""The tenants' folder, looked at again and again: what could last be understood, and what not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from ..errors import SettingsError
from .files import KEYS, TENANTS, FileStamp, read_keys, read_tenants, stamp
from .keys import KeyDigests, TenantDirectory, tenant_directory
from .tenant import Tenant

log = logging.getLogger("ray.serve")

T = TypeVar("T")


class TenantFiles:
    """Each file for itself, so that a mistake in one never keeps a revocation in the other back."""

    def __init__(self, folder: Path) -> None:
        """Raises `SettingsError` for what the files hold."""
        self._folder = folder
        self._stamps: dict[str, FileStamp | None] = {
            name: self._stamp(name) for name in (TENANTS, KEYS)
        }
        self.tenants: Mapping[str, Tenant] = read_tenants(folder)
        self.keys: KeyDigests = read_keys(folder)
        self.faults: dict[str, str] = {}  # by file, until it can be read again
        if not (folder / TENANTS).exists():
            log.error("%s: there is no %s: nobody can call", folder, TENANTS)

    @property
    def directory(self) -> TenantDirectory:
        return tenant_directory(self.tenants, self.keys)

    def read(self) -> bool:
        """Look at the files, and read what has changed; may block. Whether there is news."""
        tenants = self._read(TENANTS, read_tenants, self.tenants)
        keys = self._read(KEYS, read_keys, self.keys)
        changed = (tenants, keys) != (self.tenants, self.keys)
        self.tenants, self.keys = tenants, keys
        return changed

    def _read(self, name: str, read: Callable[[Path], T], before: T) -> T:
        found = self._stamp(name)
        if found == self._stamps[name] and name not in self.faults:
            return before
        try:
            if found is None and before:
                raise SettingsError(f"{self._folder / name}: it was there, and is gone")
            after = read(self._folder)
        except Exception as error:  # whatever is in a file, who is served goes on being served
            if self.faults.get(name) != str(error):
                log.error("tenants: %s stays as it was: %s", name, error)
            self.faults[name] = str(error)
            return before
        self._stamps[name] = found
        self.faults.pop(name, None)
        log.info("tenants: %s read again", name)
        return after

    def _stamp(self, name: str) -> FileStamp | None:
        return stamp(self._folder / name)
