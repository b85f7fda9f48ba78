"""The routes of batches, as in OpenAI's API."""

from __future__ import annotations

import json
import uuid

from sqlalchemy import Connection, select
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..dispatch.client.client_call import ClientCall
from ..dispatch.client.session import DispatchSession
from ..errors import (
    Conflict,
    IdempotencyKeyReused,
    InvalidRequest,
    OwnQueueFull,
)
from ..jobs import batch_rows, files
from ..jobs.acceptance import allowance
from ..jobs.batch_rows import Batch
from ..jobs.queries import page
from ..store.schema import BATCHES, FILES
from .idempotency import REPLAYED, REUSED, idempotent
from .route_context import RouteContext, json_answer, list_answer
from .wire.batches import (
    BatchItem,
    BatchList,
    NewBatchBody,
    batch_item,
    parse_batch,
)
from .wire.pages import parse_page

GIVEN = "input_file", "endpoint", "metadata", "output_expires_s"  # what a client has chosen
ADMISSION_S = 30.0


class BatchRoutes:
    """Answers requests about batches."""

    def __init__(
        self,
        context: RouteContext,
        session: DispatchSession,
    ) -> None:
        self._context, self._session = context, session
        self.routes = [
            Route("/v1/batches", self.batches, methods=["GET"]),
            Route("/v1/batches", self.create, methods=["POST"]),
            Route("/v1/batches/{id}", self.batch, methods=["GET"]),
            Route("/v1/batches/{id}/cancel", self.cancel, methods=["POST"]),
        ]

    async def create(self, http: Request) -> Response:
        """Answer `POST /v1/batches`. With an Idempotency-Key a batch is made once."""
        body = await self._context.body(http)
        keyed = idempotent(http, body)
        asked, tenant = parse_batch(body), http.scope["tenant"]
        jobs = self._context.live.jobs
        expiry = asked.output_expires_after
        if expiry and expiry.seconds > jobs.keep_s:
            raise InvalidRequest(
                f"output_expires_after.seconds {expiry.seconds} must be at most {jobs.keep_s}, "
                "for which this server keeps batches",
                param="output_expires_after.seconds",
            )
        id = f"batch_{keyed.id(tenant) if keyed else uuid.uuid4().hex}"
        key_id = http.scope.get("key_id", "")
        if there := await self._context.read(lambda connection: batch_rows.find(connection, id)):
            new = _new_batch(id, tenant, key_id, asked, there.created)
            if any(getattr(there, name) != getattr(new, name) for name in GIVEN):
                raise IdempotencyKeyReused(REUSED)
            return json_answer(await self._item(there), headers={REPLAYED: "true"})
        client = ClientCall(ADMISSION_S)
        call = self._session.open(
            tenant, id, (), ADMISSION_S, client, key_id=key_id, lane="acceptance"
        )
        try:
            await client.run(call.admitted())

            def make(connection: Connection, now: float) -> Batch:
                if there := batch_rows.find(connection, id):
                    return there
                file = files.find(connection, asked.input_file_id, tenant, now)
                if file is None:
                    raise InvalidRequest(
                        f"input_file_id '{asked.input_file_id[:80]}' is none of your files",
                        param="input_file_id",
                    )
                if file.kind != "upload":
                    raise InvalidRequest(
                        "input_file_id: this is the file of a batch", param="input_file_id"
                    )
                most = allowance(connection, tenant, jobs.max_queued, now)
                lines = min(file.lines, jobs.max_lines)
                if lines > most.limit:
                    raise InvalidRequest(
                        f"the file has {file.lines} lines, and you may have {most.limit} waiting",
                        param="input_file_id",
                    )
                left = most.jobs - batch_rows.unread_lines(connection, tenant)
                if lines > left:
                    raise OwnQueueFull(
                        f"the file has {file.lines} lines, and you may have {max(left, 0)} more "
                        "waiting: try again later"
                    )
                return batch_rows.create(connection, _new_batch(id, tenant, key_id, asked, now))

            batch = await self._context.write(make)
        finally:
            call.close()
        return json_answer(await self._item(batch))

    async def batches(self, http: Request) -> Response:
        """Answer `GET /v1/batches`: the tenant's batches, newest first."""
        asked, tenant = parse_page(http.query_params), http.scope["tenant"]
        rows = await self._context.read(
            lambda connection: page(connection, BATCHES, tenant, asked.after, asked.limit)
        )
        data = [await self._item(Batch(*row)) for row in rows[: asked.limit]]
        return list_answer(BatchList, data, has_more=len(rows) > asked.limit)

    async def batch(self, http: Request) -> Response:
        """Answer `GET /v1/batches/ID`."""
        return json_answer(await self._item(await self._batch(http)))

    async def cancel(self, http: Request) -> Response:
        """Answer `POST /v1/batches/ID/cancel`: its lines that wait or run end as cancelled."""
        batch = await self._batch(http)
        begun = await self._context.write(
            lambda connection, now: batch_rows.ask_to_cancel(connection, batch, now)
        )
        batch = await self._batch(http)
        if not begun and batch.state != "cancelled":
            raise Conflict(f"the batch has ended already: {batch.state}")
        return json_answer(await self._item(batch))

    async def _batch(self, http: Request) -> Batch:
        id, tenant = self._context.id(http), http.scope["tenant"]
        batch = await self._context.read(lambda connection: batch_rows.find(connection, id))
        if batch is None or batch.tenant != tenant:
            raise self._context.not_found(http)
        return batch

    async def _item(self, batch: Batch) -> BatchItem:
        made = await self._context.read(
            lambda connection: connection.execute(
                select(FILES.c.kind, FILES.c.id).where(FILES.c.batch == batch.id)
            ).all()
        )
        ids = {row.kind: row.id for row in made}
        return batch_item(batch, ids.get("output"), ids.get("error"))


def _new_batch(id: str, tenant: str, key_id: str, asked: NewBatchBody, now: float) -> Batch:
    expiry = asked.output_expires_after
    return batch_rows.new_batch(
        id,
        tenant,
        key_id,
        asked.endpoint,
        asked.input_file_id,
        now,
        metadata=json.dumps(asked.metadata),
        output_expires_s=expiry.seconds if expiry else None,
    )
