"""One image as it is asked for, and what comes back; valid by construction.

A call for n images with the seed s becomes n `ImageRequest`s with the seeds s, s + 1, …, s + n - 1.
Each of them is granted, generated and retried by itself.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Annotated, NamedTuple

from .errors import InvalidRequest

SIZE_MULTIPLE_PX = 16  # VAE factor 8 × patch size 2
MAX_SEED = 2**63 - 1
SHADOW = "shadow"  # the id of requests that are generated again, only to compare the images


class Precision(StrEnum):
    """The precision that a client asks for.

    `fp8` and `fp16` ask for a pool of that precision. The replicas of an fp16 pool run in bfloat16
    or float16, as their card allows. `auto` leaves the choice of the pool to Octet.
    """

    AUTO = "auto"
    FP8 = "fp8"
    FP16 = "fp16"


class Sampler(StrEnum):
    """The solver that denoises an image; the noise levels of its steps belong to it.

    `euler` is the solver of SD3.5's own code. `dpmpp_2m`, DPM-Solver++ 2M, comes as close to the
    exact solution with fewer steps.
    """

    EULER = "euler"
    DPMPP_2M = "dpmpp_2m"


class OutputFormat(StrEnum):
    """The image file formats that a client may ask for."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """The largest and smallest values that requests for a model may ask for.

    Raises `ValueError` for a limit that is not above 0.
    """

    min_size_px: Annotated[int, "Smallest side of an image."] = 64
    max_size_px: Annotated[int, "Largest side of an image."] = 2048
    max_pixels: Annotated[int, "Largest area of an image."] = 2048 * 2048
    max_steps: Annotated[int, "Largest number of denoising steps."] = 100
    max_guidance_scale: Annotated[float, "Largest strength of guidance."] = 30.0
    max_images: Annotated[int, "Largest number of images of one request, its `n`."] = 4
    max_prompt_chars: Annotated[int, "Largest length of a prompt."] = 32_000

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name} {getattr(self, field.name)} must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """How an image is made from a picture that the client has sent.

    `strength`: the part of the denoising steps that run, above 0 and at most 1; the higher, the
    less of the picture is left. `image_sha256`, `mask_sha256`: digests of the pixels of the picture
    and of its mask, which tell whether two requests are equal. The pixels themselves travel beside
    the request (`serve/edit_pixels.py`).
    """

    strength: float
    image_sha256: str
    mask_sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """One image to generate.

    `deterministic`: whether the image must be the same bit for bit, whatever else is in the batch.
    `output_compression`: the quality of a JPEG or WebP file, 0 to 100. `edit`: how the image is
    made from a picture; None for a generation. An edit may have any size. It is generated on a
    `canvas` with both sides rounded up to multiples of 16, and then cropped: 100 × 75 on 112 × 80.
    `preset`: the name of the model's preset that chose the sampler and the steps; "" without one.
    `routed_by`: the name of the model's rule that chose the precision; "" without one.

    Raises `InvalidRequest`, which names the field, if no model can ever generate one of the values.
    `check` compares the request with the limits of one model.
    """

    id: str
    model: str
    prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    negative_prompt: str = ""
    precision: Precision = Precision.AUTO
    output_format: OutputFormat = OutputFormat.PNG
    output_compression: int | None = None
    deterministic: bool = False
    edit: Edit | None = None
    sampler: Sampler = Sampler.EULER
    preset: str = ""
    routed_by: str = ""

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            _check_text(name, getattr(self, name))
        if not self.prompt.strip():
            raise InvalidRequest("prompt is empty: describe the image", param="prompt")
        if self.edit is None and self.canvas != (self.width, self.height):
            raise InvalidRequest(
                f"size '{self.size}': width and height must be multiples of {SIZE_MULTIPLE_PX}",
                param="size",
            )
        if not math.isfinite(self.guidance_scale) or self.guidance_scale < 0:
            raise InvalidRequest(
                f"guidance_scale {self.guidance_scale} must be a finite number, 0 or more",
                param="guidance_scale",
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise InvalidRequest(
                f"seed {self.seed} must be between 0 and {MAX_SEED}; image i of n has seed + i",
                param="seed",
            )
        if self.output_compression is not None:
            self._check_compression(self.output_compression)
        if self.edit and not 0 < self.edit.strength <= 1:
            raise InvalidRequest(
                f"strength {self.edit.strength:g} must be above 0 and at most 1", param="strength"
            )

    def _check_compression(self, quality: int) -> None:
        if not 0 <= quality <= 100:
            raise InvalidRequest(
                f"output_compression {quality} must be between 0 and 100",
                param="output_compression",
            )
        if self.output_format is OutputFormat.PNG and quality < 100:
            raise InvalidRequest(
                f"output_compression {quality}: a png is lossless; use it with jpeg or webp",
                param="output_compression",
            )

    @property
    def size(self) -> str:
        """The size as WIDTHxHEIGHT in pixels."""
        return f"{self.width}x{self.height}"

    @property
    def canvas(self) -> tuple[int, int]:
        """Width and height in px that the model generates: the size, rounded up to whole tokens."""
        return canvas_of(self.width, self.height)

    @property
    def first_step(self) -> int:
        """The number of steps that are left out at the beginning, because a picture is given.

        Computed as in diffusers' image-to-image pipelines, in floating-point numbers.
        """
        if self.edit is None:
            return 0
        steps = self.num_inference_steps
        return int(max(steps - min(steps * self.edit.strength, steps), 0))

    @property
    def steps(self) -> int:
        """The number of steps that run: `num_inference_steps`, for an edit usually fewer."""
        return self.num_inference_steps - self.first_step

    @property
    def guided(self) -> bool:
        """Return whether classifier-free guidance is on: two transformer rows instead of one."""
        return self.guidance_scale > 1

    def check(self, limits: ModelLimits) -> None:
        """Raise `InvalidRequest` where this request is outside a model's limits."""
        low, high = limits.min_size_px, limits.max_size_px
        if min(self.width, self.height) < low or max(self.canvas) > high:
            raise InvalidRequest(
                f"size '{self.size}': {self.model} generates images with sides from {low} to "
                f"{high} px",
                param="size",
            )
        if math.prod(self.canvas) > limits.max_pixels:
            raise InvalidRequest(
                f"size '{self.size}': {self.model} generates at most {limits.max_pixels} pixels, "
                f"with both sides rounded up to multiples of {SIZE_MULTIPLE_PX}",
                param="size",
            )
        if not 1 <= self.num_inference_steps <= limits.max_steps:
            raise InvalidRequest(
                f"num_inference_steps {self.num_inference_steps} must be between 1 and "
                f"{limits.max_steps}",
                param="num_inference_steps",
            )
        if self.edit and not self.steps:
            raise InvalidRequest(
                f"strength {self.edit.strength:g} is too small: not one of "
                f"{self.num_inference_steps} steps would run",
                param="strength",
            )
        if self.guidance_scale > limits.max_guidance_scale:
            raise InvalidRequest(
                f"guidance_scale {self.guidance_scale} must be at most {limits.max_guidance_scale}",
                param="guidance_scale",
            )
        for name in ("prompt", "negative_prompt"):
            length = len(getattr(self, name))
            if length > limits.max_prompt_chars:
                raise InvalidRequest(
                    f"{name} has {length} characters: at most {limits.max_prompt_chars}",
                    param=name,
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """The events that a client wants before its image is done: previews and progress.

    `progress`: whether to send an event for queue positions and steps. `partial_images`: the number
    of previews, 0 to 3.
    """

    progress: bool = False
    partial_images: int = 0


class Acknowledgement(StrEnum):
    """The first two messages of a replica about an image.

    `RECEIVED`: the replica has received the request. `STARTED`: the replica has begun the image. A
    request that must run alone waits between the two until the replica is empty. Every other
    request waits while such a request runs. `REFUSED`, as the only message: the image was granted a
    slot of another replica, which is not there any more.
    """

    REFUSED = "refused"
    RECEIVED = "received"
    STARTED = "started"


class Progress(NamedTuple):
    """How far an image is: its position in the queue, or how many of its steps are done.

    `queue_position`: 1 is next. `eta_s`: seconds until the image is finished, None if not known.
    """

    step: int
    steps: int
    eta_s: float | None = None
    queue_position: int | None = None


@dataclass(frozen=True, slots=True)
class PartialImage:
    """A preview as an encoded file; `index` counts from 0."""

    index: int
    image: bytes


OnProgress = Callable[[Progress | PartialImage], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds that each stage of one image took.

    `queue_s`: from the request to the grant of the last attempt. `text_s`: encoding the prompt.
    `latents_s`: turning the pixels of an edit into latents. `decode_s`: turning latents into
    pixels. `encode_s`: turning pixels into an image file.
    """

    queue_s: float = 0.0
    latents_s: float = 0.0
    text_s: float
    denoise_s: float
    decode_s: float
    encode_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageResult:
    """One finished image: the encoded file, and how it was generated.

    `precision`: the precision that ran (fp8, bf16, fp16 or fp32). `emulated`: whether FP8
    arithmetic ran without FP8 tensor cores. `text_tokens`: the number of text tokens that the
    transformer read, with padding. `work_s`: the work that the image really took, as measured, in
    seconds of its model's reference replica.
    """

    image: bytes
    seed: int
    precision: str
    emulated: bool
    text_tokens: int
    work_s: float
    timings: Timings


def canvas_of(width: int, height: int) -> tuple[int, int]:
    """Round both sides in px up to multiples of `SIZE_MULTIPLE_PX`."""
    return width + -width % SIZE_MULTIPLE_PX, height + -height % SIZE_MULTIPLE_PX


def _check_text(name: str, text: str) -> None:
    if "\x00" in text:
        raise InvalidRequest(f"{name} contains a NUL character", param=name)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name} contains a lone surrogate at character {error.start}", param=name
        ) from None
