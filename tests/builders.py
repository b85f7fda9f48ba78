"""Builders of requests, results, records and settings; a test sets only the fields it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from serve.dispatch.protocol import Pools, QueuedImage
from serve.request import ImageRequest, ImageResult, Timings
from serve.settings.application import Settings
from serve.settings.file import load_settings
from serve.usage.record import UsageRecord

ROOT = Path(__file__).parents[1]
LAPTOP = ROOT / "examples" / "laptop.yaml"
DEMO_MODEL = ROOT / "demo" / "model"


def image_request(**changes: Any) -> ImageRequest:
    """A small valid request."""
    request = ImageRequest(
        id="a/0",
        model="m",
        prompt="dunes",
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=3.0,
        seed=7,
    )
    return replace(request, **changes)


def image_result(image: bytes = b"", **changes: Any) -> ImageResult:
    """The result of an image that took no time."""
    result = ImageResult(
        image=image,
        seed=7,
        precision="fp8",
        emulated=False,
        text_tokens=1,
        work_s=1.0,
        timings=Timings(text_s=0, denoise_s=0, decode_s=0, encode_s=0),
    )
    return replace(result, **changes)


def usage_record(call: str = "call", image: int = 0, **changes: Any) -> UsageRecord:
    """One delivered image of ten steps that costs one second of work."""
    record = UsageRecord(call, image, "t", "id", "m", "fp8", "64x64", 10, 1.0)
    return record._replace(**changes)


def queued_image(
    id: str = "",
    pools: Pools = ("p",),
    work_s: float = 1.0,
    *,
    call_id: str = "call",
    report_position: bool = False,
) -> QueuedImage:
    """A queued image of one second of work."""
    return QueuedImage(pools, work_s, report_position, id, call_id)


def laptop_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of the demo with overrides from `OCTET_…` variables."""
    return load_settings(LAPTOP, environ or {})
