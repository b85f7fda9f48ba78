"""The canary: some FP8 images are generated again in 16 bit, and both are compared.

An image is compared after it was delivered. Its shadow runs only in idle capacity
(`serve.dispatch.shadows`). Where there is none for long enough, the image is not compared.
"""

from __future__ import annotations

import asyncio
import io
import logging
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from PIL import Image

from ..dispatch.client.attempts import Attempts
from ..dispatch.client.session import DispatchSession
from ..quality.metrics import Pixels, distance
from ..request import SHADOW, ImageRequest, ImageResult, Precision, StreamOptions
from ..settings.application import Settings
from .ingress_metrics import IngressMetrics

log = logging.getLogger("ray.serve")

WAIT_S = 600.0  # for idle capacity
ATTEMPTS = 5  # to generate a shadow, which is stopped when its pool is needed
AT_ONCE = 4  # images of an Ingress that wait to be compared; their files are in memory


class Canary:
    """Compares a part of an Ingress's FP8 images with 16 bit."""

    def __init__(
        self,
        session: DispatchSession,
        attempts: Attempts,
        live: Callable[[], Settings],
        metrics: IngressMetrics,
        wait_s: float = WAIT_S,
    ) -> None:
        """`live`: returns the present settings. `wait_s`: as `WAIT_S`."""
        self._session, self._attempts, self._live = session, attempts, live
        self._metrics, self._wait_s = metrics, wait_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = ThreadPoolExecutor(1)  # comparing large images takes much memory

    def offer(self, request: ImageRequest, result: ImageResult) -> None:
        """Compare an FP8 image with 16 bit in the background, by the chance `shadow_percent`."""
        percent = next((m.shadow_percent for m in self._live().models if m.id == request.model), 0)
        if not result.precision.startswith("fp8") or request.edit or not percent:
            return
        if 100 * random.random() >= percent:  # noqa: S311 - which images does not matter
            return
        if len(self._tasks) >= AT_ONCE:
            self._metrics.shadow(request.model, "skipped")
            return
        task = asyncio.create_task(self._compare(request, result))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _compare(self, request: ImageRequest, result: ImageResult) -> None:
        outcome = "failed"
        try:
            exact = await self._again(replace(request, id=SHADOW, precision=Precision.FP16))
            if exact is None:
                outcome = "no_room"
                return
            loop = asyncio.get_running_loop()
            ssim = await loop.run_in_executor(self._thread, _ssim, exact.image, result.image)
            self._metrics.shadow_ssim(request.model, ssim)
            outcome = "compared"
        except Exception:  # the image itself was delivered
            log.warning("%s could not be compared with 16 bit", request.id, exc_info=True)
        finally:
            self._metrics.shadow(request.model, outcome)

    async def _again(self, shadow: ImageRequest) -> ImageResult | None:
        """Generate the shadow, again if it was stopped; None after `ATTEMPTS` or `wait_s`."""
        pools = self._attempts.queued_image(shadow, StreamOptions()).pools
        try:
            async with asyncio.timeout(self._wait_s) as limit:
                for _ in range(ATTEMPTS):
                    found = await self._session.shadows.run(
                        pools, lambda lease: self._attempts.shadow(shadow, lease)
                    )
                    if found:
                        return found
        except TimeoutError:
            if not limit.expired():
                raise
        return None


def _ssim(reference: bytes, tested: bytes) -> float:
    return distance(_pixels(reference), _pixels(tested)).ssim


def _pixels(file: bytes) -> Pixels:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))
