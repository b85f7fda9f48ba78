"""The formats of the admin API: tenants, keys, and the audit of their changes.

Lists are read in pages: `after` is the id behind which a page begins, and `next` in the answer is
the value of `after` for the page that follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, Field, JsonValue
from pydantic_core import from_json

from ...errors import InvalidRequest, did_you_mean
from ...tenants.files import KeyDigests, check_digests
from ...tenants.keys import Scope
from ...tenants.limits import LimitsError, parse_tenants
from ...tenants.tenant import Tenant

MOST = 1000  # entries of a page
DEFAULT = 100
LAST_ID = 2**63 - 1


class Query(NamedTuple):
    """The entries behind `after`, at most `limit`; `tenant`: those of this tenant only."""

    after: str = ""
    limit: int = DEFAULT
    tenant: str | None = None

    @property
    def after_id(self) -> int:
        """`after` of a list whose ids are numbers."""
        return int(self.after or 0)


class TenantItem(BaseModel):
    """A tenant: its limits as they were given, and what manages it."""

    id: str
    object: Literal["tenant"] = "tenant"
    managed_by: Annotated[
        Literal["api", "file"],
        Field(description="`file`: tenants.yaml, and only it changes the tenant."),
    ]
    created_at: str
    limits: Annotated[
        dict[str, JsonValue], Field(description="The fields of docs/tenants.md that are given.")
    ]


class TenantList(BaseModel):
    """The response to `GET /admin/v1/tenants`."""

    object: Literal["list"] = "list"
    data: list[TenantItem]
    has_more: bool
    next: str


class DeletedTenant(BaseModel):
    """The response to `DELETE /admin/v1/tenants/ID`."""

    id: str
    object: Literal["tenant"] = "tenant"
    deleted: Literal[True] = True


class KeyItem(BaseModel):
    """An API key without the key itself."""

    id: str
    object: Literal["key"] = "key"
    tenant: str
    scopes: list[Scope]
    managed_by: Literal["api", "file"]
    created_at: str
    expires_at: str | None
    last_used_at: Annotated[str | None, Field(description="To the minute.")]


class NewKeyItem(KeyItem):
    """A key that was made just now; `key` is shown only this once."""

    key: str


class KeyList(BaseModel):
    """The response to `GET /admin/v1/keys`."""

    object: Literal["list"] = "list"
    data: list[KeyItem]
    has_more: bool
    next: str


class RevokedKey(BaseModel):
    """The response to `DELETE /admin/v1/keys/ID`."""

    id: str
    object: Literal["key"] = "key"
    revoked: Literal[True] = True


class AuditItem(BaseModel):
    """A change of a tenant or key; `actor`: TENANT/KEY of the operator, a command, or a file."""

    id: int
    time: str
    actor: str
    action: str
    tenant: str
    key_id: str | None
    details: dict[str, JsonValue]


class AuditList(BaseModel):
    """The response to `GET /admin/v1/audit`."""

    object: Literal["list"] = "list"
    data: list[AuditItem]
    has_more: bool
    next: str


class DifferenceItem(BaseModel):
    """A difference between files and database; `changes`: by field, the old and new value."""

    action: str
    tenant: str
    key_id: str | None
    changes: dict[str, tuple[JsonValue, JsonValue]]


class DifferenceList(BaseModel):
    """The response to `POST /admin/v1/apply`; `applied`: false for a dry run."""

    object: Literal["list"] = "list"
    data: list[DifferenceItem]
    applied: bool


def tenant_item(tenant: Any) -> TenantItem:
    """Describe a `StoredTenant`."""
    return TenantItem(
        id=tenant.id,
        managed_by=tenant.managed_by,
        created_at=tenant.created,
        limits=tenant.limits,
    )


def key_item(key: Any) -> KeyItem:
    """Describe a `StoredKey`."""
    return KeyItem(
        id=key.id,
        tenant=key.tenant,
        scopes=list(key.scopes),
        managed_by=key.managed_by,
        created_at=key.created,
        expires_at=key.expires,
        last_used_at=key.last_used,
    )


def new_key_item(made: Any) -> NewKeyItem:
    """Describe a `NewKey`."""
    return NewKeyItem(**key_item(made.stored).model_dump(), key=made.secret)


def next_of(items: Sequence[Any], after: str) -> str:
    """The value of `after` for the page behind these entries."""
    return str(items[-1].id) if items else after


# -- what operators send --------------------------------------------------------------------------


class TenantFiles(NamedTuple):
    """The contents of tenants.yaml and keys.json; see `Administration.apply`."""

    tenants: dict[str, Tenant]
    keys: KeyDigests | None
    managed_by: Literal["api", "file"]
    dry_run: bool


def parse_files(body: bytes) -> TenantFiles:
    """Parse the body of `POST /admin/v1/apply`. Raises `InvalidRequest`."""
    given = parse_body(body, "tenants", "keys", "managed_by", "dry_run")
    tenants, dry_run = given.get("tenants"), given.get("dry_run", False)
    if not isinstance(tenants, dict):
        raise InvalidRequest("tenants: must be an object of tenants by their id", param="tenants")
    if not isinstance(dry_run, bool):
        raise InvalidRequest("dry_run: must be true or false", param="dry_run")
    managed_by = given.get("managed_by", "file")
    if managed_by not in ("api", "file"):
        raise InvalidRequest("managed_by: must be api or file", param="managed_by")
    try:
        keys = None if given.get("keys") is None else check_digests(given["keys"])
        return TenantFiles(parse_tenants(tenants), keys, managed_by, dry_run)
    except LimitsError as error:
        where, what = error.faults[0]
        raise InvalidRequest(f"{where}: {what}", param="tenants") from None
    except ValueError:
        raise InvalidRequest("keys: must be the contents of a keys.json", param="keys") from None


def parse_query(query: Mapping[str, str], *, numbered: bool, of_tenant: bool) -> Query:
    """Parse the parameters of the URL of a list.

    `numbered`: its ids are numbers. `of_tenant`: it knows the parameter `tenant`. Raises
    `InvalidRequest` for an unknown or invalid parameter.
    """
    known = [name for name in Query._fields if name != "tenant" or of_tenant]
    for name in query:
        if name not in known:
            hint = did_you_mean(name, known)
            raise InvalidRequest(f"unknown parameter '{name}': {hint}", param=name)
    after = query.get("after", "0" if numbered else "")
    if numbered:
        after = str(_whole("after", after, 0, LAST_ID))
    limit = _whole("limit", query.get("limit", str(DEFAULT)), 1, MOST)
    return Query(after[:80], limit, query.get("tenant"))


def _whole(name: str, text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise InvalidRequest(
            f"{name} '{text[:40]}' must be a whole number from {least} to {most}", param=name
        )
    return int(text)


def parse_body(body: bytes, *known: str, needed: Sequence[str] = ()) -> dict[str, Any]:
    """Parse the JSON object of a request.

    `known`: its fields; without any, all are. `needed`: those that must be there, as text. Raises
    `InvalidRequest`.
    """
    try:
        found = from_json(body) if body else {}
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InvalidRequest("the body must be a JSON object")
    for name in found if known else ():
        if name not in known:
            hint = did_you_mean(str(name)[:80], known)
            raise InvalidRequest(f"unknown field '{str(name)[:80]}': {hint}", param=str(name)[:80])
    for name in needed:
        if not isinstance(found.get(name), str):
            raise InvalidRequest(f"{name}: must be given, as text", param=name)
    return found
