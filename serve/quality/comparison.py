"""A comparison of two sides: the distances of their images, by category, and a verdict.

Beside a side in FP8, bfloat16 is compared with float32 too, on the same prompts and seeds: rounding
to fewer bits always changes images, and this shows how much of it 16 bit does by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..models.checkpoints import CheckpointError
from ..request import ImageRequest
from .image_folder import ImageFolder
from .metrics import Distance, Pixels, Spread, distance
from .optional_metrics import OptionalMetrics
from .sides import Side, digest

WORST_TILES = 3
PROTOCOL = {
    "images": "8-bit sRGB at full size, both sides from the same prompt, seed and size",
    "ssim": "mean over the channels; Gaussian window of sigma 1.5, cut off at 11 x 11 pixels; "
    "K1 0.01, K2 0.03, range 255 (scikit-image)",
    "psnr_db": "from the mean squared error of all channels, range 255 (scikit-image)",
    "latents": "root mean square of the difference by step, as a part of the reference's, of the "
    "first image of each category",
    "worst_tiles": "squares of 32 px with the lowest mean SSIM",
    "lpips": "version 0.1 with AlexNet; lower is better",
    "clip_score": "100 x cosine of the embeddings of image and prompt, not below 0; higher is "
    "better",
}


class SuiteRequest(NamedTuple):
    """A request of a comparison and its category."""

    category: str
    request: ImageRequest


class Gate(NamedTuple):
    """The least SSIM with which a comparison passes.

    `median`: the least median of all images. `p5`: the least 5th percentile of all images.
    `categories`: the least median of a category, by its name.
    """

    median: float | None = None
    p5: float | None = None
    categories: Mapping[str, float] = {}

    @property
    def asked(self) -> str:
        """The gate in words; empty if it asks for nothing."""
        parts = []
        if self.median is not None:
            parts.append(f"median SSIM of at least {self.median:g}")
        if self.p5 is not None:
            parts.append(f"5th percentile of at least {self.p5:g}")
        parts += [f"{name}: median of at least {x:g}" for name, x in self.categories.items()]
        return ", ".join(parts)

    def failures(self, images: Sequence[Mapping[str, Any]]) -> list[str]:
        """Describe each number that is too low; empty if the images pass."""
        found = []
        whole = spread(images, "ssim")
        if self.median is not None and whole.median < self.median:
            found.append(f"median SSIM {whole.median:.4f} is below {self.median:g}")
        if self.p5 is not None and whole.p5 < self.p5:
            found.append(f"5th percentile of SSIM {whole.p5:.4f} is below {self.p5:g}")
        for name in self.failing_categories(images):
            median = spread(images, "ssim", name).median
            found.append(f"{name}: median SSIM {median:.4f} is below {self.categories[name]:g}")
        return found

    def failing_categories(self, images: Sequence[Mapping[str, Any]]) -> list[str]:
        """The categories whose median is too low."""
        return [
            name
            for name, least in self.categories.items()
            if spread(images, "ssim", name).median < least
        ]


def spread(images: Sequence[Mapping[str, Any]], metric: str, category: str | None = None) -> Spread:
    """The distribution of a metric over images as JSON has them.

    `category`: only images of this one.
    """
    values = [one[metric] for one in images if category in (None, one["category"])]
    return Spread.of(values)


@dataclass
class Comparison:
    """Two sides that generate the same samples, and the folder of their images.

    `rounding`: float32 and bfloat16 in place of FP8, or the reason why there is none.
    """

    reference: Side
    tested: Side
    samples: Sequence[SuiteRequest]
    folder: ImageFolder
    rounding: tuple[Side, Side] | str

    @property
    def _sides(self) -> list[Side]:
        """All sides, without those that have the same images as another."""
        exact = () if isinstance(self.rounding, str) else self.rounding
        first = self.samples[0].request
        return list({digest(s, first): s for s in (self.reference, self.tested, *exact)}.values())

    @property
    def _requests(self) -> list[ImageRequest]:
        return [sample.request for sample in self.samples]

    @property
    def missing(self) -> int:
        """The number of images that are not in the folder yet."""
        return sum(len(self.folder.missing(side, self._requests)) for side in self._sides)

    def generate(self, count: Callable[[], None]) -> None:
        """Generate all images that are missing in the folder; `count` is called for each.

        If float32 or bfloat16 does not fit here, `rounding` becomes the reason.
        """
        first = [sample.request for sample in self._firsts()]
        for side in self._sides:
            try:
                self.folder.generate(side, self._requests, first, count)
            except (torch.OutOfMemoryError, CheckpointError) as error:
                if side in (self.reference, self.tested):
                    raise
                self.rounding = f"{side.label} cannot be generated here: {error}"
                return

    def images(self, index: int) -> tuple[Pixels, Pixels]:
        """The images of both sides for the sample with an index."""
        request = self.samples[index].request
        a, b = (self.folder.image(side, request) for side in (self.reference, self.tested))
        return a, b

    def results(self, gate: Gate, optional: OptionalMetrics | None = None) -> dict[str, Any]:
        """Compare the images, which must all be in the folder; returns plain data for JSON.

        The images come in the order of the samples.
        """
        images = self._compared(self.reference, self.tested, optional)
        found = {
            "reference": {"label": self.reference.label, **self.reference.identity},
            "tested": {"label": self.tested.label, **self.tested.identity},
            **self._summaries(images),
            "rounding": self.rounding,
            "gate": {"asked": gate.asked, "failures": gate.failures(images)},
            "images": images,
            "latents": self._latents(),
            "protocol": PROTOCOL,
            "absent": optional.absent if optional else {},
        }
        if not isinstance(self.rounding, str):
            found["rounding"] = self._summaries(self._compared(*self.rounding))
        return found

    def _compared(
        self, reference: Side, tested: Side, optional: OptionalMetrics | None = None
    ) -> list[dict[str, Any]]:
        images = []
        for sample in self.samples:
            a, b = (self.folder.image(side, sample.request) for side in (reference, tested))
            more = optional.measured(sample.request.prompt, a, b) if optional else {}
            images.append({**_described(sample, distance(a, b, WORST_TILES)), **more})
        return images

    def _summaries(self, images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        names = dict.fromkeys(sample.category for sample in self.samples)
        return {
            "all": _summary(images),
            "categories": {name: _summary(images, name) for name in names},
        }

    def _firsts(self) -> list[SuiteRequest]:
        """The first sample of each category."""
        found: dict[str, SuiteRequest] = {}
        for sample in self.samples:
            found.setdefault(sample.category, sample)
        return list(found.values())

    def _latents(self) -> dict[str, list[float]] | str:
        """The difference of latents after each step, by category; or why there is none."""
        found = {}
        for category, request in self._firsts():
            a, b = (side.asked(request) for side in (self.reference, self.tested))
            if (a.sampler, a.num_inference_steps) != (b.sampler, b.num_inference_steps):
                return "the sides have different noise levels"
            x = self.folder.latents(self.reference, request)
            y = self.folder.latents(self.tested, request)
            if x is None or y is None:
                return (
                    "a side is generated by a server, or by an earlier comparison without latents"
                )
            norms = [np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in zip(x, y, strict=True)]
            found[category] = [round(float(norm), 6) for norm in norms]
        return found


def _described(sample: SuiteRequest, found: Distance) -> dict[str, Any]:
    """A sample and the distance of its two images, as plain data for JSON."""
    request = sample.request
    return {
        "index": int(request.id),
        "category": sample.category,
        "prompt": request.prompt,
        "seed": request.seed,
        "size": request.size,
        "guidance_scale": request.guidance_scale,
        "ssim": found.ssim,
        "psnr_db": found.psnr_db,
        "worst_tiles": [tile._asdict() for tile in found.worst_tiles],
    }


def _summary(images: Sequence[Mapping[str, Any]], category: str | None = None) -> dict[str, Any]:
    mine = [one for one in images if category in (None, one["category"])]
    found: dict[str, Any] = {"images": len(mine)}
    found |= {metric: spread(mine, metric)._asdict() for metric in ("ssim", "psnr_db")}
    for metric in OptionalMetrics.NAMES:
        if metric in mine[0]:
            found[f"{metric}_median"] = float(np.median([one[metric] for one in mine]))
    return found


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """How two comparisons differ that have categories in common: median and 5th percentile of each.

    Returns the SSIM before and after by category, with "all" first.
    """
    pairs = {"all": (before["all"], after["all"])} | {
        name: (before["categories"][name], after["categories"][name])
        for name in before["categories"]
        if name in after["categories"]
    }
    return {name: {"before": a["ssim"], "after": b["ssim"]} for name, (a, b) in pairs.items()}
