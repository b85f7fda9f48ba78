"""How long an Ingress waits for its clients, the Dispatcher and itself.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..dispatch.protocol import TIMING, Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressTiming:
    """All in seconds.

    `dispatcher_s`: for the Dispatcher's answer to a question. `body_s`: for a request body to
    arrive. `keep_alive_s`: between two signs of life in an event stream. `sweep_s`: between two
    sweeps of stored images. `dispatch`: the timing of the session with the Dispatcher.
    """

    dispatcher_s: float = 2.0
    body_s: float = 30.0
    keep_alive_s: float = 10.0
    sweep_s: float = 10.0
    dispatch: Timing = TIMING


INGRESS_TIMING = IngressTiming()
