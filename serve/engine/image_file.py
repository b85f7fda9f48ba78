"""Encoding of pixels as image files. A PNG file carries the request that generated it."""

from __future__ import annotations

import io
import json

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..request import ImageRequest, OutputFormat

# zlib's level. The usual 6 saves 13 % of the bytes and takes five times as long
# (`bench/image_files.py`).
PNG_LEVEL = 1
JPEG_QUALITY = 95
WEBP_QUALITY = 90


def parameters(request: ImageRequest, precision: str) -> tuple[str, str]:
    """The keyword and the text of the PNG chunk that says how an image was generated.

    The text of `parameters` is the JSON body that generates the same image again when sent to
    /v1/images/generations. The text of `edit_parameters` holds the fields that do so for an edit,
    together with the same picture and mask. Neither of these is in the file, nor are their digests.
    A preset stands there as its sampler and steps, so that it may change in the settings.
    """
    body: dict[str, object] = {
        "model": request.model,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "size": request.size,
        "seed": request.seed,
        "num_inference_steps": request.num_inference_steps,
        "sampler": request.sampler,
        "guidance_scale": request.guidance_scale,
        "precision": "fp8" if precision == "fp8" else "fp16",
        "deterministic": request.deterministic,
    }
    if request.edit:
        body["strength"] = request.edit.strength
    keyword = "edit_parameters" if request.edit else "parameters"
    return keyword, json.dumps(body, ensure_ascii=False)


def encode_image(pixels: NDArray[np.uint8], request: ImageRequest, precision: str) -> bytes:
    """Encode pixels (height_px, width_px, 3) in the format that the request asks for."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    quality = request.output_compression
    if request.output_format is OutputFormat.PNG:
        chunks = PngInfo()
        chunks.add_text("Software", "Octet")
        chunks.add_itxt(*parameters(request, precision))
        image.save(file, "png", pnginfo=chunks, compress_level=PNG_LEVEL)
    elif request.output_format is OutputFormat.JPEG:
        image.save(file, "jpeg", quality=JPEG_QUALITY if quality is None else quality)
    else:
        image.save(file, "webp", quality=WEBP_QUALITY if quality is None else quality)
    return file.getvalue()
