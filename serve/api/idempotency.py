"""Requests with the header Idempotency-Key, which are answered once however often they are sent.

As with Stripe and in the draft of the IETF (draft-ietf-httpapi-idempotency-key-header): the same
key and request get the same answer for a day; while it is being answered, 409; another request with
the same key, 422. An error after which a client should try again is not remembered.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from ..dispatch.client.session import DispatchSession
from ..errors import (
    IdempotencyKeyInUse,
    IdempotencyKeyReused,
    InvalidRequest,
    OctetError,
    Unavailable,
)
from .generations import JsonAnswer
from .timing import IngressTiming
from .wire.http_errors import UNEXPECTED, error_answer

if TYPE_CHECKING:
    from ..store.answers import Answer, Claim, Claimed

log = logging.getLogger("ray.serve")

HEADER = "idempotency-key"
REPLAYED = "idempotent-replayed"  # the header of an answer to a repeated request
REUSED = f"another request was sent with this {HEADER}"
KEY = re.compile(r"[\x21-\x7e]{1,255}")
BOUNDARY = re.compile(r"boundary=\"?([^\";]+)")
SPARE_S = 60.0  # for which a request may take longer than its deadline


class IdempotentRequest:
    """A request with a key. `digest`: SHA-256 of what it asks for."""

    def __init__(self, key: str, digest: str) -> None:
        self.key, self.digest = key, digest

    def id(self, tenant: str) -> str:
        """The same hexadecimal text whenever the tenant uses this key.

        What is stored under this id is stored once. So nothing else has to be remembered of the
        key, also if the answer to the first attempt was that nobody knows whether it is stored.
        """
        return hashlib.sha256(f"{tenant}\n{self.key}".encode()).hexdigest()[:32]


def idempotent(http: Request, body: bytes) -> IdempotentRequest | None:
    """The key of a request and the digest of what it asks for; None if it has no key.

    Raises `InvalidRequest` for a key that is not 1 to 255 visible ASCII characters.
    """
    if (key := http.headers.get(HEADER)) is None:
        return None
    if not KEY.fullmatch(key):
        raise InvalidRequest(
            f"{HEADER}: must be 1 to 255 visible ASCII characters, without spaces", param=HEADER
        )
    # A client that sends a form again chooses another boundary.
    if boundary := BOUNDARY.search(http.headers.get("content-type", "")):
        body = body.replace(boundary[1].encode(), b"")
    asked = f"{http.method} {http.url.path}\n".encode() + body
    return IdempotentRequest(key, hashlib.sha256(asked).hexdigest())


class Idempotency:
    """Answers requests with a key once; the Dispatcher keeps their answers in the database."""

    def __init__(
        self,
        session: DispatchSession,
        dispatcher: Any,
        timing: IngressTiming,
        on_refusal: Callable[[OctetError, Scope], None],
        on_replay: Callable[[Scope, int], None],
    ) -> None:
        """`dispatcher`: a Ray Serve handle of the `Dispatcher`.

        `on_refusal` is called for each request that is refused here, `on_replay` with the status of
        each that gets a remembered answer.
        """
        self._session, self._dispatcher, self._timing = session, dispatcher, timing
        self._on_refusal, self._on_replay = on_refusal, on_replay
        self._tasks: set[asyncio.Task[None]] = set()  # tasks that nobody awaits

    async def answer(
        self,
        asked: IdempotentRequest,
        http: Request,
        takes_s: float,
        work: Callable[[str], Awaitable[Response]],
        remembered: Callable[[Response], Response] = lambda response: response,
    ) -> Response:
        """Answer a request by `work`, or with the answer that it got before.

        `takes_s`: how long the answer may take. `work`: gets the id that a call for images must
        have. `remembered`: returns what a repeated request is to be answered. Raises what `work`
        raises, `IdempotencyKeyInUse`, `IdempotencyKeyReused`, and `Unavailable` without the
        database.
        """
        from ..store.answers import Claim

        claim = Claim(
            http.scope["tenant"],
            asked.key,
            asked.digest,
            uuid.uuid4().hex,
            cluster="",
            session=self._session.name,
            takes_s=takes_s + SPARE_S,
        )
        try:
            found = await self._claimed(claim)
        except OctetError as error:
            self._on_refusal(error, http.scope)
            raise
        if found.answer:
            self._on_replay(http.scope, found.answer.status)
            headers = {**found.answer.headers, REPLAYED: "true"}
            return Response(found.answer.body, found.answer.status, headers)
        try:
            response = await work(found.call)
        except Exception as error:
            said = error if isinstance(error, OctetError) else OctetError(UNEXPECTED)
            if said.status >= 500 and not said.retryable:
                await self._remember(claim, error_answer(said))
            else:
                self._forget(claim)
            raise
        except BaseException:  # the client has gone
            self._forget(claim)
            raise
        try:
            await self._in_background(self._remember(claim, remembered(response)))
        except BaseException:  # the client has gone, and nobody sends this response
            if isinstance(response, JsonAnswer):
                response.close()
            raise
        return response

    async def _claimed(self, claim: Claim) -> Claimed:
        """Claim a request. Raises the error of a request that cannot be answered now."""
        try:
            found: Claimed | None = await self._call("claim", claim)
        except BaseException:  # whether it was claimed is not known
            self._forget(claim)
            raise
        if found is None:
            raise InvalidRequest(
                f"{HEADER}: this server keeps nothing, so it cannot remember answers", param=HEADER
            )
        if found.state == "running":
            raise IdempotencyKeyInUse(f"a request with this {HEADER} is still being answered")
        if found.state == "other":
            raise IdempotencyKeyReused(REUSED)
        return found

    async def _remember(self, claim: Claim, response: Response) -> None:
        """Remember an answer. If that fails, the key stays in use for as long as it may take."""
        from ..store.answers import Answer

        headers = {k: v for k, v in response.headers.items() if k != "content-length"}
        answer = Answer(response.status_code, headers, bytes(response.body))
        try:
            await self._call("answered", claim, answer)
        except Unavailable:
            log.warning("an answer could not be remembered for its Idempotency-Key")

    async def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Await work that goes on if this is cancelled."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)

    def _forget(self, claim: Claim) -> None:
        """Forget a request in the background, because its task may be cancelled."""

        async def forget() -> None:
            try:
                await self._call("answered", claim, None)
            except Unavailable:
                log.warning("an Idempotency-Key stays in use: the database does not answer")

        task = asyncio.create_task(forget())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _call(self, method: str, claim: Claim, *answer: Answer | None) -> Any:
        """Call a method of the Dispatcher. Raises `Unavailable` if it or the database is away."""
        try:
            async with asyncio.timeout(self._timing.store_s):
                return await getattr(self._dispatcher, method).remote(claim, *answer)
        except (TimeoutError, OSError, RayError, RayServeException):
            raise Unavailable(
                f"{HEADER}: it cannot be looked up at the moment: try again"
            ) from None
