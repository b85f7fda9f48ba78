"""How long an Ingress waits for its clients and the Dispatcher, and its own intervals.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..dispatch.protocol import TIMING, Timing

BODY_BYTES_PER_S = 125_000  # a slow mobile connection


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressTiming:
    """The times that an Ingress waits, in seconds.

    `dispatcher_s`: for the Dispatcher's answer to a call, such as a cancellation.
    `store_s`: for an answer of the Dispatcher that comes from the store.
    `body_s`: for a request body to arrive, and one second more for each `BODY_BYTES_PER_S` bytes
    that have arrived; and also for a next part of it to arrive.
    `keep_alive_s`: without an event, before an event stream sends a comment.
    `sweep_s`: between two sweeps that delete old stored images.
    `dispatch`: the timing of the session with the Dispatcher.
    """

    dispatcher_s: float = 2.0
    store_s: float = 6.0
    body_s: float = 30.0
    keep_alive_s: float = 10.0
    sweep_s: float = 10.0
    dispatch: Timing = TIMING


INGRESS_TIMING = IngressTiming()
