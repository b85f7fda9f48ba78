"""The report of a comparison: one HTML page that needs no other file."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .metrics import Pixels

TEMPLATE = Path(__file__).with_name("report.html")
SHOWN = 60  # of the worst images, shown from both sides; of all others a small one
LARGEST_PX, THUMB_PX = 768, 96
QUALITY = 90  # of the WebP files in the page; all numbers come from the images themselves
STRONGER = 4  # how much stronger than it is a difference is shown

Pair = Callable[[int], tuple[Pixels, Pixels]]


def report(found: Mapping[str, Any], pair: Pair, shown: int = SHOWN) -> str:
    """The page of a comparison as HTML.

    `found`: the comparison as JSON has it. `pair`: returns both sides of the image with an index.
    `shown`: how many of the worst images are in the page at full size.
    """
    by_ssim = sorted(found["images"], key=lambda image: image["ssim"])
    images = []
    for place, image in enumerate(by_ssim):
        reference, tested = pair(image["index"])
        if place < shown:
            urls = [_data_url(p, LARGEST_PX) for p in (reference, tested)]
            urls.append(_data_url(_difference(reference, tested), LARGEST_PX))
            images.append({**image, "shown": urls})
        else:
            images.append({**image, "thumb": _data_url(tested, THUMB_PX)})
    text = json.dumps({**found, "images": images}, ensure_ascii=False)
    # A prompt may hold "</script>", which would end the element that holds the data.
    return TEMPLATE.read_text("utf-8").replace("{{data}}", text.replace("<", "\\u003c"))


def _difference(reference: Pixels, tested: Pixels) -> Pixels:
    """Where two images differ, `STRONGER` times as strong as they do; equal parts are black."""
    apart = np.abs(reference.astype(int) - tested.astype(int)) * STRONGER
    found: Pixels = apart.clip(0, 255).astype(np.uint8)
    return found


def _data_url(pixels: Pixels, largest_px: int) -> str:
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((largest_px, largest_px))
    image.save(file, "webp", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
