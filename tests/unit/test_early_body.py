"""Small bodies that are sent to an Ingress together with their request."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from serve.api.early_body import BODY, SMALL_BODY, EarlyBody
from serve.api.wire.paths import GENERATIONS

GONE: Message = {"type": "http.disconnect"}


def part(body: bytes, *, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


def passed_on(
    messages: Sequence[Message], size: int | str, path: str = GENERATIONS, wait_s: float = 60.0
) -> tuple[Any, list[Message]]:
    """The body in the scope that the application gets, and all messages that it receives.

    `messages`: what the client sends; nothing follows them. `size`: the stated length of the body.
    """
    scope: Scope = {
        "type": "http",
        "path": path,
        "headers": [(b"content-length", str(size).encode())],
    }
    found: list[Any] = []
    received: list[Message] = []
    waiting = list(messages)

    async def receive() -> Message:
        return waiting.pop(0) if waiting else await asyncio.get_running_loop().create_future()

    async def app(scope: Scope, receive: Receive, _: Send) -> None:
        found.append(scope.get(BODY))
        while True:
            received.append(await receive())

    async def send(_: Message) -> None:
        pass

    async def main() -> None:
        serving = asyncio.create_task(EarlyBody(app, wait_s)(scope, receive, send))
        while waiting or not found:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        serving.cancel()

    asyncio.run(main())
    return found[0], received


def test_a_small_body_comes_with_the_request() -> None:
    assert passed_on([part(b"{}"), GONE], 2) == (b"{}", [GONE])


@pytest.mark.parametrize(
    ("messages", "size", "path"),
    [
        ([part(b"{", more=True), part(b"}"), GONE], 2, GENERATIONS),  # in parts
        ([part(bytes(SMALL_BODY + 1)), GONE], SMALL_BODY + 1, GENERATIONS),
        ([part(b"{}"), GONE], 2, "/other"),
        ([part(b"{}"), GONE], "many", GENERATIONS),
        ([part(b""), GONE], 0, GENERATIONS),
        ([GONE], 2, GENERATIONS),  # the client has gone
    ],
)
def test_every_other_body_takes_the_usual_way(
    messages: list[Message], size: int | str, path: str
) -> None:
    assert passed_on(messages, size, path) == (None, messages)


def test_a_client_that_sends_no_body_is_not_waited_for() -> None:
    assert passed_on([], 2, wait_s=0.0) == (None, [])
