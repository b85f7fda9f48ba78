"""Reading of a batch's file: checked as a whole, then turned into jobs a few lines at a time."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import Connection

from ..errors import InvalidRequest, OctetError, QuotaExceeded
from ..request import ImageRequest
from ..store.link import DatabaseLink
from . import batch_rows, files
from .acceptance import DUST, allowance
from .batch_rows import Batch, NewLine, Place
from .encoding import StoredError, StoredRequest, is_storable
from .job import NewJob, new_id

log = logging.getLogger("ray.serve")

UNEXPECTED = "an unexpected error in the server; its log holds the details"
LINES = 100  # that become jobs in one transaction
MOST_ERRORS = 50  # that are reported of a file
MOST_ID = 512  # characters of a `custom_id`
FIELDS = {"custom_id", "method", "url", "body"}


class ParsedRequest(NamedTuple):
    """A body that was parsed. `work_s`: the predicted work of all its images."""

    images: tuple[ImageRequest, ...]
    as_b64: bool
    work_s: float


# Parses a body in JSON for a tenant; raises an `OctetError` if it cannot be served.
ParseBody = Callable[[bytes, str], ParsedRequest]


class BatchReader:
    """Reads the files of batches, one at a time."""

    def __init__(
        self,
        database: DatabaseLink,
        parse: ParseBody,
        lease_s: float,
        limits: Callable[[], tuple[int, int, int]],
    ) -> None:
        """`limits`: returns the most lines of a batch, the most bytes of a line, and the most jobs
        that a tenant may have waiting.
        """
        self._database, self._parse, self._lease_s = database, parse, lease_s
        self._limits = limits
        # Its own, because the threads of the loop may all wait for names of webhooks.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    async def read_next(self) -> bool:
        """Read the file of the oldest batch that needs it; returns False if there is none.

        Another process may take over if this one is away for longer than its lease. Raises
        `OSError` if the database cannot be used.
        """
        batch = await self._write(batch_rows.take_reading)
        if batch is None:
            return False
        if batch.state == "validating":
            await self._check(batch)
        else:
            await self._store_lines(batch)
        return True

    async def _write(self, work: Callable[[Connection, float, float], Any]) -> Any:
        """Call `work` in a transaction, with the end of a lease that begins now, and the time."""
        database = await self._database.opened()

        def timed(connection: Connection) -> Any:
            now = database.now(connection)
            return work(connection, now + self._lease_s, now)

        return await self._database.write(timed)

    async def _part(self, batch: Batch, part: int) -> bytes | None:
        return await self._database.read(
            lambda connection: files.read_part(connection, batch.input_file, part)
        )

    # -- the whole file -------------------------------------------------------------------------

    async def _check(self, batch: Batch) -> None:
        """Begin the batch if each line of its file is a request, else end it."""
        most_lines, most_bytes, _ = self._limits()
        errors: list[dict[str, Any]] = []
        ids: set[str] = set()
        count, leased = 0, 0
        async for line, place in lines_of(partial(self._part, batch), Place(1, 0, 0), most_bytes):
            count += 1
            if count > most_lines:
                errors = [_fault("too_many_lines", f"a batch has at most {most_lines} lines", None)]
                break
            if fault := _fault_of(line, count, batch.endpoint, ids, most_bytes):
                errors.append(fault)
                if len(errors) == MOST_ERRORS:
                    break
            if place.part > leased:  # about a megabyte later
                leased = place.part
                await self._write(
                    lambda connection, until, _: batch_rows.lease_reading(
                        connection, batch.id, until
                    )
                )
        if not count:
            errors = [_fault("empty_file", "the file has no request", None)]
        if errors:
            await self._write(
                lambda connection, _, now: batch_rows.refuse(connection, batch.id, errors, now)
            )
            return
        # The lease ends now, so that the lines are read next.
        await self._write(
            lambda connection, _, now: batch_rows.begin(connection, batch.id, count, 0.0, now)
        )

    # -- its lines ------------------------------------------------------------------------------

    async def _store_lines(self, batch: Batch) -> None:
        place = Place(batch.next_line, batch.next_part, batch.next_byte)
        lines: list[bytes] = []
        places: list[Place] = []
        current: Batch | None = batch
        # No limit: the lines were checked, and the settings may have changed since.
        async for line, after in lines_of(partial(self._part, batch), place, sys.maxsize):
            lines.append(line)
            places.append(after)
            if len(lines) == LINES or after.line > batch.total:
                current = await self._store(current, lines, places) if current else None
                if current is None:
                    return
                lines, places = [], []

    async def _store(self, batch: Batch, lines: list[bytes], places: list[Place]) -> Batch | None:
        """Store lines as jobs; returns the batch then, or None if reading must end for now."""
        loop = asyncio.get_running_loop()
        made = await loop.run_in_executor(self._thread, self._lines, batch, lines)
        most_queued = self._limits()[2]

        def store(connection: Connection, until: float, now: float) -> Batch | None:
            there = batch_rows.find(connection, batch.id)
            allowed = allowance(connection, batch.tenant, most_queued, now)
            found = made
            if there and there.state == "cancelling":
                found = [line._replace(state="cancelled") for line in found]
            elif now >= batch.expires:
                found = [line._replace(state="expired") for line in found]
            found = _within(found, allowed.work_s)
            fitting = _as_many(found, allowed.jobs)
            if not fitting:  # later, when some of the tenant's jobs have ended
                return None
            after = places[fitting - 1]
            stored = batch_rows.add_lines(connection, batch, found[:fitting], after, until, now)
            return stored if fitting == len(found) else None

        stored: Batch | None = await self._write(store)
        return stored

    def _lines(self, batch: Batch, lines: list[bytes]) -> list[NewLine]:
        return [self._line(batch, batch.next_line + i, line) for i, line in enumerate(lines)]

    def _line(self, batch: Batch, number: int, line: bytes) -> NewLine:
        asked = json.loads(line)
        job = NewJob(
            id=new_id("job"),
            tenant=batch.tenant,
            lane="batch",
            endpoint="generations",
            model="",
            precision="",
            work_s=0.0,
            images=0,
            request="",
            digest="",
            request_id=batch.id,
            key_id=batch.key_id,
            created=batch.created,
            expires=batch.expires,
            batch=batch.id,
            line=number,
            custom_id=asked["custom_id"],
        )
        try:
            parsed = self._parse(json.dumps(asked["body"]).encode(), batch.tenant)
        except OctetError as error:
            return NewLine(job, "failed", StoredError.of(error).as_json())
        except Exception:  # a fault of this program must not hold up the batch
            log.exception("line %d of %s: an unexpected error", number, batch.id)
            return NewLine(job, "failed", StoredError.of(OctetError(UNEXPECTED)).as_json())
        first = parsed.images[0]
        stored = StoredRequest(parsed.images, parsed.as_b64)
        return NewLine(
            job._replace(
                model=first.model,
                precision=first.precision.value,
                work_s=parsed.work_s,
                images=len(parsed.images),
                request=stored.as_json(),
            )
        )


def _within(lines: list[NewLine], left_s: float | None) -> list[NewLine]:
    """The lines, of which those have failed that a budget with so much work left does not hold."""
    if left_s is None:
        return lines
    over = StoredError.of(QuotaExceeded("your budget of this month does not hold this line's work"))
    found = []
    for line in lines:
        if line.state == "queued" and line.job.work_s > left_s + DUST:
            line = NewLine(line.job, "failed", over.as_json())
        elif line.state == "queued":
            left_s -= line.job.work_s
        found.append(line)
    return found


def _as_many(lines: list[NewLine], most_waiting: int) -> int:
    """Count the first lines that may be stored if so many of them may wait."""
    for place, line in enumerate(lines):
        if line.state == "queued":
            most_waiting -= 1
        if most_waiting < 0:
            return place
    return len(lines)


async def lines_of(
    read_part: Callable[[int], Awaitable[bytes | None]], start: Place, most_bytes: int
) -> AsyncIterator[tuple[bytes, Place]]:
    """Yield the lines of a file that are not blank, each with the place behind it.

    `start`: where to begin; its line counts only lines that are not blank. Of a line that is longer
    than `most_bytes`, one byte more than that is yielded.
    """
    number, index, byte = start
    rest = b""
    part = await read_part(index)
    while part is not None:
        end = part.find(b"\n", byte)
        if end < 0:
            rest += part[byte : byte + most_bytes + 1 - len(rest)]
            index, byte = index + 1, 0
            part = await read_part(index)
            continue
        line = (rest + part[byte:end]).strip()
        rest, byte = b"", end + 1
        if line:
            number += 1
            yield line[: most_bytes + 1], Place(number, index, byte)
    if rest := rest.strip():
        yield rest, Place(number + 1, index, 0)


def _fault_of(
    line: bytes, number: int, endpoint: str, ids: set[str], most_bytes: int
) -> dict[str, Any] | None:
    """Return the fault of a line, or None. Adds its `custom_id` to `ids`."""
    if len(line) > most_bytes:
        return _fault("line_too_long", f"a line has at most {most_bytes} bytes", number)
    try:
        asked = json.loads(line)
        if not isinstance(asked, dict):
            raise InvalidRequest("it is no JSON object")
    except (ValueError, RecursionError, InvalidRequest) as error:
        return _fault("invalid_json_line", f"the line is not a JSON object: {error}", number)
    if missing := sorted(FIELDS - asked.keys()):
        return _fault("missing_required_parameter", f"{missing[0]} is required", number, missing[0])
    name = asked["custom_id"]
    if not (isinstance(name, str) and 1 <= len(name) <= MOST_ID and is_storable(name)):
        what = f"custom_id must be a text of 1 to {MOST_ID} characters"
        return _fault("invalid_custom_id", what, number, "custom_id")
    if name in ids:
        what = f"custom_id '{name[:80]}' is used twice"
        return _fault("duplicate_custom_id", what, number, "custom_id")
    ids.add(name)
    if asked["method"] != "POST":
        return _fault("invalid_method", "method must be POST", number, "method")
    if asked["url"] != endpoint:
        what = f"url must be {endpoint}, the endpoint of the batch"
        return _fault("mismatched_url", what, number, "url")
    if not isinstance(asked["body"], dict):
        return _fault("invalid_body", "body must be a JSON object", number, "body")
    return None


def _fault(code: str, message: str, line: int | None, param: str | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "line": line, "param": param}
