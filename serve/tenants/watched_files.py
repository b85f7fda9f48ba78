"""The files of the tenants' folder while the server runs: their last valid contents, and faults."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..errors import SettingsError
from .files import KEYS, TENANTS, FileStamp, KeyDigests, read_keys, read_tenants, stamp
from .tenant import Tenant

log = logging.getLogger("ray.serve")

T = TypeVar("T")


class WatchedFiles:
    """The last valid contents of `tenants.yaml` and `keys.json`; None before a file was read.

    `faults` says, by file name, why a file cannot be used at present. Each file is read by itself,
    so that a mistake in one file never delays a revocation in the other.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stamps: dict[str, FileStamp | None] = {}
        self.faults: dict[str, str] = {}
        self.tenants: dict[str, Tenant] | None = None
        self.keys: KeyDigests | None = None

    def read(self) -> bool:
        """Read the files that have changed; return whether the contents differ from before.

        The last valid contents of a file stay while the file has a fault. May block.
        """
        tenants = self._read(TENANTS, read_tenants, self.tenants)
        keys = self._read(KEYS, read_keys, self.keys)
        changed = (tenants, keys) != (self.tenants, self.keys)
        self.tenants, self.keys = tenants, keys
        return changed

    def _read(self, name: str, read: Callable[[Path], T], before: T | None) -> T | None:
        """The contents of the file `name`, which the function `read` reads if the file has changed.

        `before`: the contents so far. They are returned if the file is unchanged or has a fault.
        """
        file = self._folder / name
        found = stamp(file)
        if name in self._stamps and self._stamps[name] == found:
            return before
        self._stamps.pop(name, None)
        try:
            if found is None and before is not None:
                raise SettingsError(f"{file}: the file has disappeared")
            after = read(self._folder) if found else None
        except Exception as error:  # on any fault, keep the last valid contents
            # A file with wrong contents is not parsed again before it changes; a file that the disk
            # does not give is tried again.
            if found and not isinstance(error.__context__, OSError):
                self._stamps[name] = found
            self._note(name, error)
            return before
        self._stamps[name] = found
        self.faults.pop(name, None)
        if after is not None:
            log.info("tenants: %s was read", name)
        return after

    def _note(self, name: str, error: Exception) -> None:
        """Note and log a fault, unless it is the one that is known."""
        if self.faults.get(name) != str(error):
            log.error("tenants: keeping the last valid %s: %s", name, error)
        self.faults[name] = str(error)
