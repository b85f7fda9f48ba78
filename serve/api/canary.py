"""The canary: some FP8 images are generated again in 16 bit, and both are compared.

An image is compared after it was delivered. Its shadow runs only in idle capacity
(`serve.dispatch.shadows`), so it delays and costs nobody anything; where there is none for
`WAIT_S`, the image is not compared.
"""

from __future__ import annotations

import asyncio
import io
import logging
import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from statistics import median

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
AT_ONCE = 4  # images of an Ingress that wait to be compared; their files are in memory
RECENT = 100  # comparisons of a model whose median is reported


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
        self._recent: dict[str, deque[float]] = {}  # SSIM, by model

    def offer(self, request: ImageRequest, result: ImageResult) -> None:
        """Take note of a generated image; perhaps compare it, in the background."""
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
            async with asyncio.timeout(self._wait_s) as limit:
                exact = await self._again(replace(request, id=SHADOW, precision=Precision.FP16))
            ssim = await asyncio.to_thread(_ssim, exact.image, result.image)
            recent = self._recent.setdefault(request.model, deque(maxlen=RECENT))
            recent.append(ssim)
            self._metrics.shadow_ssim(request.model, median(recent))
            outcome = "compared"
        except TimeoutError:
            outcome = "too_late" if limit.expired() else "failed"
        except Exception:  # the image itself was delivered
            log.warning("%s could not be compared with 16 bit", request.id, exc_info=True)
        finally:
            self._metrics.shadow(request.model, outcome)

    async def _again(self, shadow: ImageRequest) -> ImageResult:
        """Generate the shadow, anew whenever it had to make room for others."""
        pools = self._attempts.queued_image(shadow, StreamOptions()).pools
        while True:
            found = await self._session.shadows.run(
                pools, lambda lease: self._attempts.shadow(shadow, lease)
            )
            if found:
                return found


def _ssim(reference: bytes, tested: bytes) -> float:
    return distance(_pixels(reference), _pixels(tested)).ssim


def _pixels(file: bytes) -> Pixels:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))
