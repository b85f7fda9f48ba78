"""The two sides of a comparison: each generates an image for a request, here or on a server."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..errors import SettingsError
from ..request import ImageRequest
from .local_model import LocalModel, OnStep
from .metrics import Pixels

AT_ONCE = 4  # requests to a server at the same time

Generated = Iterator[tuple[ImageRequest, Pixels]]


class Side(Protocol):
    """One side of a comparison.

    `label`: its name for people. `identity`: everything but the request that decides its images,
    as plain data for JSON.
    """

    @property
    def label(self) -> str: ...

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def asked(self, request: ImageRequest) -> ImageRequest:
        """The request as this side generates it, with its own sampler and steps."""

    def images(self, requests: Sequence[ImageRequest], on_step: OnStep | None) -> Generated:
        """Generate an image (height_px, width_px, 3) for each request, in their order.

        `on_step`: called after each step, if this side can tell of its steps.
        """


def digest(side: Side, request: ImageRequest) -> str:
    """A name for the image of a request: equal only for what gives the same image."""
    fields = {k: v for k, v in asdict(side.asked(request)).items() if k != "id"}
    text = json.dumps([version("octet-serve"), side.identity, fields], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class LocalSide:
    """A side that generates on this machine.

    `changes`: fields of the requests that this side replaces, such as its sampler. `load`: loads
    the model; called when the first image is missing.
    """

    label: str
    identity: Mapping[str, Any]
    changes: Mapping[str, Any]
    load: Callable[[], LocalModel]
    batch_images: int = 4

    def asked(self, request: ImageRequest) -> ImageRequest:
        return replace(request, **self.changes)

    def images(self, requests: Sequence[ImageRequest], on_step: OnStep | None) -> Generated:
        asked = [self.asked(request) for request in requests]
        return self.load().images(asked, self.batch_images, on_step or _ignore)


def _ignore(_request: ImageRequest, _state: Any) -> None:
    pass


@dataclass(frozen=True)
class ServerSide:
    """A side that a running server generates.

    `fields`: fields of the request's body, such as `precision`. `post`: sends a body to the
    server's path for generations and returns its answer; it raises `SettingsError` if that fails.
    """

    label: str
    identity: Mapping[str, Any]
    fields: Mapping[str, Any]
    post: Callable[[dict[str, Any]], dict[str, Any]]

    def asked(self, request: ImageRequest) -> ImageRequest:
        return request

    def images(self, requests: Sequence[ImageRequest], on_step: OnStep | None) -> Generated:
        with ThreadPoolExecutor(AT_ONCE) as threads:
            yield from zip(requests, threads.map(self._image, requests), strict=True)

    def _image(self, request: ImageRequest) -> Pixels:
        body = {
            "model": request.model,
            "prompt": request.prompt,
            "size": request.size,
            "seed": request.seed,
            "guidance_scale": request.guidance_scale,
            **self.fields,
        }
        item = self.post(body)["data"][0]
        wanted = self.fields.get("precision", "auto")
        if wanted != "auto" and (wanted == "fp8") != item["precision"].startswith("fp8"):
            raise SettingsError(f"{self.label}: the server generated in {item['precision']}")
        with Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))) as image:
            return np.asarray(image.convert("RGB"))
