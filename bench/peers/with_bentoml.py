"""BentoML with adaptive batching.

bentoml serve with_bentoml:LandscapesService
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import bentoml
from landscapes import Landscapes


@bentoml.service(
    workers=int(os.environ["PEER_WORKERS"]),
    threads=1,
    traffic={"timeout": 3600},
)
class LandscapesService:
    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._landscapes = self._thread.submit(Landscapes).result()

    @bentoml.api(
        batchable=True,
        max_batch_size=int(os.environ["PEER_BATCH"]),
        max_latency_ms=int(os.environ["PEER_LATENCY_MS"]),
    )
    def generate(self, requests: list[dict[str, Any]]) -> list[str]:
        return self._thread.submit(self._landscapes.images, requests).result()
