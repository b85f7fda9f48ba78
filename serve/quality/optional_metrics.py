"""Metrics that need packages or weights which Octet does not bring: LPIPS and the CLIP score.

Where they are absent, the reason is stated in their place; they are never estimated otherwise.

- LPIPS (Zhang et al. 2018), version 0.1 with AlexNet, by the package `lpips`: 0 for equal images.
- The CLIP score (Hessel et al. 2021) of an image for its prompt: 100 · max(cosine, 0) of their
  embeddings, by a CLIP model in a local folder.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from .metrics import Pixels

Lpips = Callable[[Pixels, Pixels], float]
ClipScore = Callable[[Pixels, str], float]


class OptionalMetrics:
    """The metrics that this machine has; `absent`: the reason for each that it has not."""

    NAMES: ClassVar = ("lpips", "clip_score_reference", "clip_score_tested")

    def __init__(self, clip_folder: Path | None = None) -> None:
        """Load what is there; `clip_folder`: a CLIP model as transformers saves it."""
        self.absent: dict[str, str] = {}
        self._lpips: Lpips | None = None
        self._clip: ClipScore | None = None
        try:
            self._lpips = _lpips()
        except Exception as error:  # whatever the package raises for missing weights
            self.absent["lpips"] = str(error)
        try:
            self._clip = _clip_score(clip_folder)
        except Exception as error:
            self.absent["clip_score"] = str(error)

    def measured(self, prompt: str, reference: Pixels, tested: Pixels) -> dict[str, float]:
        """The metrics that are there, by the names of `NAMES`."""
        found: dict[str, float] = {}
        if self._lpips:
            found["lpips"] = self._lpips(reference, tested)
        if self._clip:
            found["clip_score_reference"] = self._clip(reference, prompt)
            found["clip_score_tested"] = self._clip(tested, prompt)
        return found


def _lpips() -> Lpips:
    if find_spec("lpips") is None:
        raise LookupError("the package lpips is not installed")
    import lpips

    network = lpips.LPIPS(net="alex", verbose=False).eval()

    @torch.inference_mode()
    def measure(reference: Pixels, tested: Pixels) -> float:
        a, b = (torch.tensor(p).movedim(-1, 0)[None] / 127.5 - 1 for p in (reference, tested))
        return float(network(a, b))

    return measure


def _clip_score(folder: Path | None) -> ClipScore:
    if folder is None:
        raise LookupError("no CLIP model is given: --clip FOLDER")
    from transformers import CLIPModel, CLIPTokenizer

    model: Any = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    side_px = model.config.vision_config.image_size

    @torch.inference_mode()
    def measure(pixels: Pixels, prompt: str) -> float:
        tokens = tokenizer([prompt], truncation=True, padding="max_length", return_tensors="pt")
        out = model(pixel_values=_clip_pixels(pixels, side_px), **tokens)
        return max(100 * float(torch.cosine_similarity(out.text_embeds, out.image_embeds)), 0.0)

    return measure


# The mean and standard deviation of the channels that OpenAI's CLIP models were trained with.
CLIP_MEAN = 0.48145466, 0.4578275, 0.40821073
CLIP_STD = 0.26862954, 0.26130258, 0.27577711


def _clip_pixels(pixels: Pixels, side_px: int) -> torch.Tensor:
    """An image as CLIP reads it: its middle square, scaled to (1, 3, side_px, side_px)."""
    image = Image.fromarray(pixels)
    scale = side_px / min(image.size)
    image = image.resize([round(scale * side) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (image.width - side_px) // 2, (image.height - side_px) // 2
    image = image.crop((left, top, left + side_px, top + side_px))
    values = (np.asarray(image, np.float32) / 255 - CLIP_MEAN) / CLIP_STD
    return torch.tensor(values, dtype=torch.float32).movedim(-1, 0)[None]
