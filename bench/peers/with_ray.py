"""Ray Serve's plain pattern: an ingress, and replicas that generate one image at a time."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from fastapi import FastAPI
from landscapes import Landscapes
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

WORKERS = int(os.environ["PEER_WORKERS"])
app = FastAPI()


@serve.deployment(
    num_replicas=WORKERS,
    max_ongoing_requests=int(os.environ["PEER_ONGOING"]),
    request_router_config=RequestRouterConfig(initial_backoff_s=0.005, max_backoff_s=0.02),
    ray_actor_options={"num_cpus": 0.5},
)
class Model:
    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._landscapes = self._thread.submit(Landscapes).result()

    async def generate(self, request: dict[str, Any]) -> str:
        loop = asyncio.get_running_loop()
        (image,) = await loop.run_in_executor(self._thread, self._landscapes.images, [request])
        return image


@serve.deployment(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
@serve.ingress(app)
class Ingress:
    def __init__(self, model: DeploymentHandle) -> None:
        self._model = model

    @app.post("/")
    async def generate(self, request: dict[str, Any]) -> dict[str, str]:
        return {"b64_json": await self._model.generate.remote(request)}


if __name__ == "__main__":
    ray.init(address="local", _temp_dir=os.environ["PEER_FOLDER"], include_dashboard=False)
    serve.start(http_options={"port": int(os.environ["PEER_PORT"])})
    serve.run(Ingress.bind(Model.bind()), blocking=True)
