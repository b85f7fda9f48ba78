"""Reading of pictures that clients send: from the bytes of a file to pixels.

The content decides what a file is, not its name or declared type. Everything that is no plain PNG,
JPEG or WebP picture is refused, and what comes out does not depend on how a picture was stored:
orientation, colour profile, palette, transparency and depth are applied here.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from ...errors import InvalidRequest, Unavailable

# Pillow knows many more formats, some of which start other programs. A mask needs transparency.
FORMATS = {"image": ("PNG", "JPEG", "WEBP"), "mask": ("PNG", "WEBP")}
ANIMATED = "PNG", "WEBP"  # a JPEG may hold further pictures; only its first, the photo, is read
SRGB = ImageCms.createProfile("sRGB")
MASK_IS = "send a PNG or WebP file that is transparent where the picture is to be repainted"

# Parts of a file that each cost time, however small they are.
MOST_SCANS = 100  # of a JPEG; photos have 1 to 20
MOST_SEGMENTS = 5_000  # of a JPEG, and chunks of a PNG that hold no pixels
MOST_PIXEL_CHUNKS = 100_000  # of a PNG; libpng writes one for each 8 kB
JPEG_MARKER = re.compile(
    rb"\xff([\x01-\xcf\xd8-\xfe])"
)  # inside a scan, FF 00 and FF D0–D7 are none
JPEG_END, JPEG_SCAN, PNG_DEPTHS = 0xD9, 0xDA, {2: 85, 4: 17}


class Size(NamedTuple):
    """Width and height in px."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class Picture:
    """A picture whose pixels are loaded and upright, but not yet converted to a size and sRGB."""

    def __init__(self, data: bytes, param: str, max_pixels: int) -> None:
        """Open a file that holds a picture of at most `max_pixels` pixels, and load its pixels.

        `param`: the request's field, `image` or `mask`. Raises `InvalidRequest` if the data is no
        such picture, and `Unavailable` if there is not enough memory to load it.
        """
        self._param = param
        if not data:
            raise InvalidRequest(f"{param} is empty", param=param)
        with self._readable():
            _check_parts(data)
            with Image.open(io.BytesIO(data), formats=FORMATS[param]) as opened:
                self._check(opened, max_pixels)
                self._profile: bytes | None = opened.info.get("icc_profile")
                opened.load()
                _scale_transparent_level(opened, data)
                with contextlib.suppress(Exception):  # a damaged EXIF orientation is ignored
                    ImageOps.exif_transpose(opened, in_place=True)
                self._image = _eight_bit(opened)

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """Raise `InvalidRequest` for any error of the block, and `Unavailable` without memory."""
        param, formats = self._param, FORMATS[self._param]
        try:
            yield
        except InvalidRequest:
            raise
        except MemoryError:
            raise Unavailable(f"not enough memory to read {param} now") from None
        except Exception:  # a decoder may raise anything for data that it does not expect
            *others, last = (name.replace("WEBP", "WebP") for name in formats)
            raise InvalidRequest(
                f"{param} is no {', '.join(others)} or {last} picture that can be read", param=param
            ) from None

    def _check(self, opened: Image.Image, max_pixels: int) -> None:
        """Check what the header says, before any pixel is decoded."""
        param = self._param
        if opened.width * opened.height > max_pixels:
            raise InvalidRequest(f"{param} has more than {max_pixels} pixels", param=param)
        if opened.format in ANIMATED and getattr(opened, "is_animated", False):
            raise InvalidRequest(f"{param} is animated: send a single picture", param=param)

    @property
    def size(self) -> Size:
        return Size(*self._image.size)

    def colours(self, size: Size) -> NDArray[np.uint8]:
        """The pixels (height_px, width_px, 3) in sRGB, laid on white where they are transparent.

        The picture is scaled until it covers `size`, and its middle is cut out. Raises the errors
        of `__init__`.
        """
        with self._readable():
            image = self._image
            if image.has_transparency_data:
                image = image.convert("RGBA")
            elif image.mode not in ("L", "CMYK"):
                image = image.convert("RGB")
            image = _covering(image, size, Image.Resampling.LANCZOS)
            opacity = image.getchannel("A") if image.mode == "RGBA" else None
            colours = self._in_srgb(image.convert("RGB") if opacity else image)
            if opacity:
                white = Image.new("RGB", size, "white")
                white.paste(colours, mask=opacity)
                colours = white
            return np.asarray(colours)

    def _in_srgb(self, image: Image.Image) -> Image.Image:
        """Convert colours by the picture's profile, if it has one that can be used."""
        converted = None
        if self._profile:
            with contextlib.suppress(Exception):
                profile = ImageCms.ImageCmsProfile(io.BytesIO(self._profile))
                converted = ImageCms.profileToProfile(image, profile, SRGB, outputMode="RGB")
        return converted or image.convert("RGB")

    def alpha(self, size: Size) -> NDArray[np.uint8]:
        """The opacity of a mask's pixels (height_px, width_px), scaled and cropped as in `colours`.

        Raises `InvalidRequest` if the picture has no alpha channel.
        """
        with self._readable():
            if not self._image.has_transparency_data:
                raise InvalidRequest(f"mask has no alpha channel: {MASK_IS}", param=self._param)
            alpha = self._image.convert("RGBA").getchannel("A")
            # Lanczos would add transparency next to opaque pixels; this filter does not.
            return np.asarray(_covering(alpha, size, Image.Resampling.BILINEAR))


def _covering(image: Image.Image, size: Size, filter_: Image.Resampling) -> Image.Image:
    return image if image.size == size else ImageOps.fit(image, size, filter_)


def _check_parts(data: bytes) -> None:
    """Raise `ValueError` for a file with so many parts that reading it takes minutes.

    A progressive JPEG may repeat scans that are a few bytes long, each of which visits all pixels.
    Empty segments of a JPEG and chunks of a PNG cost a little each.
    """
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        _check_png(data)


def _check_jpeg(data: bytes) -> None:
    place, segments, scans = 2, 0, 0
    while (found := JPEG_MARKER.search(data, place)) and found[1][0] != JPEG_END:
        segments += 1
        scans += found[1][0] == JPEG_SCAN
        if segments > MOST_SEGMENTS or scans > MOST_SCANS:
            raise ValueError("too many segments or scans")
        length = int.from_bytes(data[found.end() : found.end() + 2])
        place = found.end() + max(length, 2)


def _check_png(data: bytes) -> None:
    place, others, pixels, kind = 8, 0, 0, b""
    while place + 8 <= len(data) and kind != b"IEND":
        length, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        if kind == b"IDAT":
            pixels += 1
        else:
            others += 1
        if others > MOST_SEGMENTS or pixels > MOST_PIXEL_CHUNKS:
            raise ValueError("too many chunks")
        place += 12 + length


def _scale_transparent_level(image: Image.Image, data: bytes) -> None:
    """Scale the level that counts as transparent in a PNG like Pillow scales the pixels.

    Pillow keeps this level as the file has it, even if a pixel has 2, 4 or 3 × 16 bits there.
    """
    level = image.info.get("transparency")
    if image.format != "PNG" or level is None:
        return
    depth = data[24]  # in the header, after width and height
    if image.mode == "L" and depth in PNG_DEPTHS:
        image.info["transparency"] = level * PNG_DEPTHS[depth]
    elif image.mode == "RGB" and depth == 16:
        image.info["transparency"] = tuple(channel >> 8 for channel in level)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Convert grey with 16 bits to 8 bits by its high byte.

    Pillow would clip such grey at 255 instead. It converts colours with 16 bits correctly.
    """
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image)
    grey = Image.fromarray((levels >> 8).astype(np.uint8))
    if (transparent := image.info.get("transparency")) is None:
        return grey
    opacity = Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, opacity))
