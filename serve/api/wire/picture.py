"""Reading of pictures that clients send: from the bytes of a file to pixels.

The content decides what a file is, not its name or declared type. Everything that is no plain PNG,
JPEG or WebP picture is refused, and what comes out does not depend on how a picture was stored:
orientation, colour profile, palette, transparency and depth are applied here.
"""

from __future__ import annotations

import contextlib
import io
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from ...errors import InvalidRequest, Unavailable

FORMATS = "PNG", "JPEG", "WEBP"  # Pillow knows many more, some of which start other programs
ANIMATED = "PNG", "WEBP"  # a JPEG of a phone holds further pictures too, but the first is the photo
SRGB = ImageCms.createProfile("sRGB")
MASK_IS = (
    "a mask is a PNG with an alpha channel, and the picture is repainted where it is transparent"
)


class Size(NamedTuple):
    """Width and height in px."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class Picture:
    """A picture that was opened: its pixels are loaded and upright, but not yet converted.

    `param`: the name of the request's field, for errors.
    """

    def __init__(self, data: bytes, param: str, max_pixels: int) -> None:
        """Open a picture of at most `max_pixels` pixels, and load its pixels.

        Raises `InvalidRequest` if the data is no such picture, and `Unavailable` if there is not
        enough memory to load it.
        """
        self._param = param
        if not data:
            raise InvalidRequest(f"{param} is empty", param=param)
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                self._check(opened, max_pixels)
                self._profile: bytes | None = opened.info.get("icc_profile")
                opened.load()
                with contextlib.suppress(Exception):  # a broken note about the orientation
                    ImageOps.exif_transpose(opened, in_place=True)
                self._image = _eight_bit(opened)
        except InvalidRequest:
            raise
        except Image.DecompressionBombError:  # Pillow's own limit, which is far above ours
            raise self._too_many_pixels(max_pixels) from None
        except MemoryError:
            raise Unavailable(f"not enough memory to read {param} now") from None
        except Exception:  # a decoder may raise anything for data that it does not expect
            raise InvalidRequest(
                f"{param} is no PNG, JPEG or WebP picture that can be read", param=param
            ) from None

    def _check(self, opened: Image.Image, max_pixels: int) -> None:
        """Check what the header says, before any pixel is decoded."""
        if opened.width * opened.height > max_pixels:
            raise self._too_many_pixels(max_pixels)
        if opened.format in ANIMATED and getattr(opened, "is_animated", False):
            raise InvalidRequest(
                f"{self._param} is animated: send a single picture", param=self._param
            )

    def _too_many_pixels(self, max_pixels: int) -> InvalidRequest:
        param = self._param
        return InvalidRequest(f"{param} has more than {max_pixels} pixels", param=param)

    @property
    def size(self) -> Size:
        return Size(*self._image.size)

    def colours(self, size: Size) -> NDArray[np.uint8]:
        """The pixels (height_px, width_px, 3) in sRGB, laid on white where they are transparent.

        The picture is scaled until it covers `size`, and its middle is cut out.
        """
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
        if self._profile:
            with contextlib.suppress(Exception):
                profile = ImageCms.ImageCmsProfile(io.BytesIO(self._profile))
                found = ImageCms.profileToProfile(image, profile, SRGB, outputMode="RGB")
                assert found  # noqa: S101 - only None if the image is changed in place
                return found
        return image.convert("RGB")

    def alpha(self, size: Size) -> NDArray[np.uint8]:
        """The opacity of a mask's pixels (height_px, width_px), cut out as by `colours`.

        Raises `InvalidRequest` if the picture has no alpha channel.
        """
        if not self._image.has_transparency_data:
            raise InvalidRequest(
                f"{self._param} has no alpha channel: {MASK_IS}", param=self._param
            )
        alpha = self._image.convert("RGBA").getchannel("A")
        # This filter adds no transparency where there is none nearby, as Lanczos' does.
        return np.asarray(_covering(alpha, size, Image.Resampling.BILINEAR))


def _covering(image: Image.Image, size: Size, filter_: Image.Resampling) -> Image.Image:
    return image if image.size == size else ImageOps.fit(image, size, filter_)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Take the high byte of a grey picture with 16 bits, where Pillow would cut off at 255.

    Pillow does the same itself for colours with 16 bits.
    """
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image)
    grey = Image.fromarray((levels >> 8).astype(np.uint8))
    if (transparent := image.info.get("transparency")) is None:
        return grey
    opacity = Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, opacity))
