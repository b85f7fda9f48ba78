"""The application of `bench.timed` with requests that kill their replica."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

from bench.step_time import STEP_S
from bench.timed import TimedGenerator, TimedIngress, TimedTextEncoder, units
from serve.app import Parts, application
from serve.dispatch.protocol import Lease
from serve.request import Acknowledgement, ImageRequest, ImageResult, StreamOptions

DEADLY = 6.125  # the guidance scale of images whose second step kills the replica


class DeadlyGenerator(TimedGenerator):
    async def generate(
        self, request: ImageRequest, lease: Lease, options: StreamOptions, alone: bool
    ) -> AsyncIterator[Acknowledgement | ImageResult]:
        async for event in super().generate(request, lease, options, alone):
            yield event
            if event is Acknowledgement.STARTED and request.guidance_scale == DEADLY:
                await asyncio.sleep(STEP_S)
                os.kill(os.getpid(), signal.SIGKILL)


def build(args: dict[str, Any]) -> Any:
    parts = Parts(DeadlyGenerator, TimedTextEncoder, TimedIngress, units)
    return application(args, parts)
