"""The picture and the mask of an edit as files, as they wait for their job in the result store."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from ..edit_pixels import EditPixels


def files_of(edited: EditPixels) -> tuple[bytes, bytes | None]:
    """The picture and the mask as PNG files, which keep every pixel; takes up to seconds."""
    return _png(Image.fromarray(edited.image)), _mask(edited)


def _mask(edited: EditPixels) -> bytes | None:
    return None if edited.kept is None else _png(Image.fromarray(edited.kept))


def pixels_of(image: bytes, mask: bytes | None) -> EditPixels:
    """Read the files that `files_of` has made."""
    kept = None if mask is None else np.asarray(Image.open(io.BytesIO(mask)).convert("L"))
    return EditPixels(np.asarray(Image.open(io.BytesIO(image)).convert("RGB")), kept)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
