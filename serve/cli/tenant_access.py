"""Where `octet tenant` reads and changes tenants: the database of the settings, or a server's API.

Both have the same methods. The database is for the first operator, and for a server that is down;
the API is for all else, because it needs no access to the database.
"""

from __future__ import annotations

import getpass
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote, urlencode

from ..errors import OctetError, SettingsError
from ..settings.application import FrontSettings
from ..tenants.files import KEYS, KeyDigests, read_keys, read_tenants
from ..tenants.limits import given_limits
from .operator_client import call

PAGE = 1000
T = TypeVar("T")


class StoredTenants:
    """Tenants in the database of the settings. `place`: the database, for messages."""

    def __init__(self, settings: FrontSettings) -> None:
        """Raises `SettingsError` or `OSError` if there is no database, or it cannot be opened."""
        if settings.database is None:
            raise SettingsError("the settings name no database: set data_folder, or store: url")
        from ..store.database import Database  # SQLAlchemy takes half a second to import
        from ..tenants.administration import Administration

        self._database = Database(**settings.database)
        self._administration = Administration(self._database, time.time)
        self._actor = f"octet tenant, {getpass.getuser()}@{socket.gethostname()}"
        self.place = self._database.name

    def tenants(self) -> Iterator[dict[str, Any]]:
        """All tenants, as the API describes them."""
        from ..api.wire.admin import tenant_item

        for one in self._pages(self._administration.tenants):
            yield tenant_item(one).model_dump()

    def keys(self, tenant: str | None = None) -> Iterator[dict[str, Any]]:
        """All valid keys, or those of a tenant, as the API describes them."""
        from ..api.wire.admin import key_item

        def page(after: str, limit: int) -> Any:
            return self._administration.keys(tenant, after, limit)

        for one in self._pages(page):
            yield key_item(one).model_dump()

    def audit(self, tenant: str | None = None) -> Iterator[dict[str, Any]]:
        """All changes, or those of a tenant, oldest first."""

        def page(after: str, limit: int) -> Any:
            return self._administration.audit(int(after or 0), limit, tenant)

        for one in self._pages(page):
            yield one._asdict()

    def add(self, tenant: str, limits: Mapping[str, Any]) -> None:
        """Add a tenant."""
        with _refusals():
            self._administration.create_tenant(self._actor, tenant, limits)

    def change(self, tenant: str, changes: Mapping[str, Any]) -> None:
        """Change limits; None takes a limit away."""
        with _refusals():
            self._administration.change_tenant(self._actor, tenant, changes)

    def remove(self, tenant: str) -> None:
        """Delete a tenant, and revoke its keys."""
        with _refusals():
            self._administration.delete_tenant(self._actor, tenant)

    def new_key(self, tenant: str, scopes: Sequence[str], expires: str | None) -> str:
        """Make a key; return it."""
        with _refusals():
            return self._administration.create_key(self._actor, tenant, scopes, expires).secret

    def revoke(self, id: str) -> None:
        """Revoke a key."""
        with _refusals():
            self._administration.revoke_key(self._actor, id)

    def apply(
        self, folder: Path, managed_by: Literal["api", "file"], *, dry_run: bool
    ) -> list[dict[str, Any]]:
        """Apply the files of a folder; return the differences."""
        tenants, keys = read_tenants(folder), _keys_of(folder)
        with _refusals():
            found = self._administration.apply(
                self._actor, tenants, keys, managed_by=managed_by, dry_run=dry_run
            )
        return [one._asdict() for one in found]

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def _pages(self, read: Callable[[str, int], Any]) -> Iterator[Any]:
        after = ""
        while True:
            page = read(after, PAGE)
            yield from page.items
            if not page.has_more:
                return
            after = str(page.items[-1].id)


class RemoteTenants:
    """Tenants of a running server. `place`: its address, for messages."""

    def __init__(self, url: str, key: str) -> None:
        """`key`: API key of an operator."""
        self.place, self._key = url, key

    def tenants(self) -> Iterator[dict[str, Any]]:
        """All tenants."""
        return self._list("tenants")

    def keys(self, tenant: str | None = None) -> Iterator[dict[str, Any]]:
        """All valid keys, or those of a tenant."""
        return self._list("keys", tenant)

    def audit(self, tenant: str | None = None) -> Iterator[dict[str, Any]]:
        """All changes, or those of a tenant, oldest first."""
        return self._list("audit", tenant)

    def add(self, tenant: str, limits: Mapping[str, Any]) -> None:
        """Add a tenant."""
        self._call("tenants", "POST", {"id": tenant, **limits})

    def change(self, tenant: str, changes: Mapping[str, Any]) -> None:
        """Change limits; None takes a limit away."""
        self._call(f"tenants/{quote(tenant, safe='')}", "PATCH", dict(changes))

    def remove(self, tenant: str) -> None:
        """Delete a tenant, and revoke its keys."""
        self._call(f"tenants/{quote(tenant, safe='')}", "DELETE")

    def new_key(self, tenant: str, scopes: Sequence[str], expires: str | None) -> str:
        """Make a key; return it."""
        body = {"tenant": tenant, "scopes": list(scopes), "expires_at": expires}
        return str(self._call("keys", "POST", body)["key"])

    def revoke(self, id: str) -> None:
        """Revoke a key."""
        self._call(f"keys/{quote(id, safe='')}", "DELETE")

    def apply(
        self, folder: Path, managed_by: Literal["api", "file"], *, dry_run: bool
    ) -> list[dict[str, Any]]:
        """Apply the files of a folder; return the differences."""
        tenants = {name: given_limits(one) for name, one in read_tenants(folder).items()}
        options = {"managed_by": managed_by, "dry_run": dry_run}
        body = {"tenants": tenants, "keys": _keys_of(folder), **options}
        found: list[dict[str, Any]] = self._call("apply", "POST", body)["data"]
        return found

    def close(self) -> None:
        """Do nothing: there is no connection to close."""

    def _call(self, path: str, method: str = "GET", body: dict[str, Any] | None = None) -> Any:
        return call(self.place, self._key, f"/admin/v1/{path}", method, body)

    def _list(self, path: str, tenant: str | None = None) -> Iterator[dict[str, Any]]:
        query = {"limit": str(PAGE)} | ({"tenant": tenant} if tenant else {})
        while True:
            page = self._call(f"{path}?{urlencode(query)}")
            yield from page["data"]
            if not page["has_more"]:
                return
            query["after"] = page["next"]


def _keys_of(folder: Path) -> KeyDigests | None:
    """The digests of a folder's keys; None if it has no file of them, and then no key changes."""
    return read_keys(folder) if (folder / KEYS).exists() else None


@contextmanager
def _refusals() -> Iterator[None]:
    """Raise a refusal of the database as a `SettingsError`."""
    try:
        yield
    except OctetError as error:
        raise SettingsError(error.message) from None
