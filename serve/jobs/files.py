"""Files that tenants have uploaded, in the database. Each function is a part of a transaction."""

from __future__ import annotations

from typing import Literal, NamedTuple

from sqlalchemy import Connection, delete, func, insert, select, update

from ..store.schema import FILE_PARTS, FILES, next_numbers
from .job import new_id

PART_BYTES = 2**20


class StoredFile(NamedTuple):
    """A file. `bytes`: None if it is written when it is read. `lines`: how many of them hold text.

    `kind`: what a batch has made it for, or that it was uploaded. `batch`: that has made it.
    `whole`: 1 once all its parts are there. Times are Unix times.
    """

    id: str
    number: int
    tenant: str
    name: str
    purpose: str
    bytes: int | None
    lines: int
    kind: Literal["upload", "output", "error"]
    batch: str | None
    whole: int
    created: float
    expires: float | None


def new_upload(tenant: str, name: str, keep_s: float) -> StoredFile:
    """A file that is to be uploaded; `begin` sets its times."""
    return StoredFile(
        id=new_id("file"),
        number=0,
        tenant=tenant,
        name=name,
        purpose="batch",
        bytes=None,
        lines=0,
        kind="upload",
        batch=None,
        whole=0,
        created=0.0,
        expires=keep_s,
    )


def stored_bytes(connection: Connection, tenant: str) -> int:
    """The bytes of all files that a tenant has uploaded."""
    found = select(func.sum(FILES.c.bytes)).where(FILES.c.tenant == tenant)
    return int(connection.execute(found).scalar() or 0)


def begin(connection: Connection, now: float, file: StoredFile) -> None:
    """Begin an upload at the Unix time `now`. The file is not found before `finish`.

    `file`: its field `expires` says for how many seconds it is kept.
    """
    number = next_numbers(connection, FILES.name) + 1
    times = {"created": now, "expires": now + (file.expires or 0.0)}
    connection.execute(insert(FILES).values(**{**file._asdict(), **times, "number": number}))


def add_part(connection: Connection, id: str, part: int, content: bytes) -> None:
    """Store a part of a file; storing it twice makes no difference."""
    there = FILE_PARTS.c.file == id, FILE_PARTS.c.part == part
    connection.execute(delete(FILE_PARTS).where(*there))
    connection.execute(insert(FILE_PARTS).values(file=id, part=part, content=content))


def finish(
    connection: Connection, begun: StoredFile, size: int, lines: int, most: int
) -> StoredFile | None:
    """End an upload of so many bytes and lines.

    Returns None, and deletes the file, if the tenant's files would have more than `most` bytes.
    """
    if stored_bytes(connection, begun.tenant) + size > most:
        remove(connection, begun.id)
        return None
    values = {"bytes": size, "lines": lines, "whole": 1}
    row = connection.execute(
        update(FILES).where(FILES.c.id == begun.id).values(**values).returning(FILES)
    ).one()
    return StoredFile(*row)


def find(connection: Connection, id: str, tenant: str, now: float) -> StoredFile | None:
    """A tenant's file; None if it has none with this id, or it has expired by `now`."""
    there = FILES.c.id == id, FILES.c.tenant == tenant, FILES.c.whole == 1
    row = connection.execute(select(FILES).where(*there)).first()
    file = StoredFile(*row) if row else None
    return None if file and file.expires is not None and file.expires <= now else file


def remove(connection: Connection, id: str) -> None:
    """Delete a file; deleting it twice makes no difference."""
    connection.execute(delete(FILE_PARTS).where(FILE_PARTS.c.file == id))
    connection.execute(delete(FILES).where(FILES.c.id == id))


def read_part(connection: Connection, id: str, part: int) -> bytes | None:
    """A part of a file, from 0; None behind the last one."""
    there = FILE_PARTS.c.file == id, FILE_PARTS.c.part == part
    content = connection.execute(select(FILE_PARTS.c.content).where(*there)).scalar()
    return None if content is None else bytes(content)
