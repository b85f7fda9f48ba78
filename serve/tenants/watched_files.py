"""The tenants' files while the server runs: their last valid contents, and present faults."""

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
    """The last valid contents of `tenants.yaml` and `keys.json`.

    `faults` says, by file name, why a file cannot be read at present. Each file is read by itself,
    so that a mistake in one file never delays a revocation in the other.
    """

    def __init__(self, folder: Path) -> None:
        """Read both files. Raises `SettingsError` if one of them is not valid."""
        self._folder = folder
        self._stamps: dict[str, FileStamp | None] = {
            name: self._stamp(name) for name in (TENANTS, KEYS)
        }
        self.tenants: Mapping[str, Tenant] = read_tenants(folder)
        self.keys: KeyDigests = read_keys(folder)
        self.faults: dict[str, str] = {}  # by file name, until the file can be read again
        if not (folder / TENANTS).exists():
            log.error("%s: there is no %s: no tenant can call", folder, TENANTS)

    @property
    def directory(self) -> TenantDirectory:
        """The parts of both files that Ingresses have to know."""
        return tenant_directory(self.tenants, self.keys)

    def read(self) -> bool:
        """Read the files that have changed; return whether the contents differ from before.

        The last valid contents of a file stay while the file has a fault. May block.
        """
        tenants = self._read(TENANTS, read_tenants, self.tenants)
        keys = self._read(KEYS, read_keys, self.keys)
        changed = (tenants, keys) != (self.tenants, self.keys)
        self.tenants, self.keys = tenants, keys
        return changed

    def _read(self, name: str, read: Callable[[Path], T], before: T) -> T:
        """The contents of the file `name`, which the function `read` reads if the file has changed.

        `before`: the contents so far. They are returned if the file is unchanged or has a fault.
        """
        found = self._stamp(name)
        if found == self._stamps[name] and name not in self.faults:
            return before
        try:
            if found is None and before:
                raise SettingsError(f"{self._folder / name}: the file has disappeared")
            after = read(self._folder)
        except Exception as error:  # on any fault, keep the last valid contents
            if self.faults.get(name) != str(error):
                log.error("tenants: keeping the last valid %s: %s", name, error)
            self.faults[name] = str(error)
            return before
        self._stamps[name] = found
        self.faults.pop(name, None)
        log.info("tenants: %s was read again", name)
        return after

    def _stamp(self, name: str) -> FileStamp | None:
        return stamp(self._folder / name)
