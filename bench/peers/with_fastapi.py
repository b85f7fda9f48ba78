"""FastAPI and diffusers: each worker process generates one image at a time.

uvicorn --workers 2 with_fastapi:app
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI
from landscapes import Landscapes

app = FastAPI()
thread = ThreadPoolExecutor(1)
landscapes = thread.submit(Landscapes).result()


@app.post("/")
async def generate(request: dict[str, Any]) -> dict[str, str]:
    loop = asyncio.get_running_loop()
    (image,) = await loop.run_in_executor(thread, landscapes.images, [request])
    return {"b64_json": image}
