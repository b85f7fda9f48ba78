"""The tenants' files while the server runs: their last valid contents, and present faults."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from ..atomic_file import replace_file
from ..errors import SettingsError
from .files import KEYS, TENANTS, FileStamp, read_keys, read_tenants, stamp
from .keys import KeyDigests, TenantDirectory, tenant_directory
from .tenant import Tenant

log = logging.getLogger("ray.serve")

T = TypeVar("T")


class TenantFiles:
    """The last valid contents of `tenants.yaml` and `keys.json`.

    `faults` says, by file name, why a file cannot be used at present. Each file is read by itself,
    so that a mistake in one file never delays a revocation in the other.
    """

    def __init__(self, folder: Path, copies: Path | None = None) -> None:
        """Read both files.

        `copies`: an existing folder in which the last valid contents are kept. A restart then finds
        them while a file has a fault. Raises `SettingsError` if a file has a fault and there is no
        copy of it.
        """
        self._folder, self._copies = folder, copies
        self._stamps: dict[str, FileStamp | None] = {}
        self.faults: dict[str, str] = {}  # by file name, until the file can be used again
        self.tenants: Mapping[str, Tenant] = self._first(TENANTS, read_tenants)
        self.keys: KeyDigests = self._first(KEYS, read_keys)
        if not self.tenants:
            log.error("%s: there are no tenants in %s: no tenant can call", folder, TENANTS)

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

    def _first(self, name: str, read: Callable[[Path], T]) -> T:
        """The contents of the file `name` at the start, or of its copy if the file has a fault."""
        copy = self._copies / name if self._copies else None
        copied = copy is not None and copy.exists()
        try:
            return self._parse(name, read, expected=copied)
        except SettingsError as error:
            if self._copies is None or not copied:
                raise
            self._note(name, error)
            return read(self._copies)

    def _read(self, name: str, read: Callable[[Path], T], before: T) -> T:
        """The contents of the file `name`, which the function `read` reads if the file has changed.

        `before`: the contents so far. They are returned if the file is unchanged or has a fault.
        """
        if name in self._stamps and self._stamps[name] == stamp(self._folder / name):
            return before
        try:
            after = self._parse(name, read, expected=bool(before))
        except Exception as error:  # on any fault, keep the last valid contents
            self._note(name, error)
            return before
        self.faults.pop(name, None)
        log.info("tenants: %s was read again", name)
        return after

    def _parse(self, name: str, read: Callable[[Path], T], *, expected: bool) -> T:
        """Read a file and copy it. Raises `SettingsError` for a fault.

        `expected`: whether it is a fault if the file does not exist. A file with wrong contents is
        not parsed again before it changes; a file that the disk does not give is tried again.
        """
        file = self._folder / name
        found = stamp(file)
        self._stamps.pop(name, None)
        if found is None and expected:
            raise SettingsError(f"{file}: the file has disappeared")
        try:
            contents = read(self._folder)
        except SettingsError as error:
            if not isinstance(error.__context__, OSError):
                self._stamps[name] = found
            raise
        self._stamps[name] = found
        if found:
            self._copy(file, found)
        return contents

    def _copy(self, file: Path, parsed: FileStamp) -> None:
        """Keep a copy of a file with valid contents, unless the file has changed since."""
        if self._copies is None:
            return
        try:
            copy, contents = self._copies / file.name, file.read_bytes()
            if stamp(file) == parsed and not (copy.exists() and copy.read_bytes() == contents):
                replace_file(copy, contents, sync=True)
        except OSError:
            log.warning("tenants: cannot keep a copy of %s", file.name, exc_info=True)

    def _note(self, name: str, error: Exception) -> None:
        """Note and log a fault, unless it is the one that is known."""
        if self.faults.get(name) != str(error):
            log.error("tenants: keeping the last valid %s: %s", name, error)
        self.faults[name] = str(error)
