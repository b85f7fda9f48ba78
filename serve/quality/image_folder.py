"""The folder of a comparison: the images that are generated so far, so that it can be resumed."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..atomic_file import replace_file
from ..engine.denoiser import DenoisingState
from ..request import ImageRequest
from .metrics import Pixels
from .sides import Side, digest

Latents = NDArray[np.float32]


class ImageFolder:
    """Images by their digests, as PNG files; and the latents of a few of them by step."""

    def __init__(self, folder: Path) -> None:
        """Create the folder if it is not there. Raises `OSError` if that fails."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def missing(self, side: Side, requests: Sequence[ImageRequest]) -> list[ImageRequest]:
        """The requests whose images are not there yet."""
        return [one for one in requests if not self._file(side, one, "png").exists()]

    def generate(
        self,
        side: Side,
        requests: Sequence[ImageRequest],
        with_latents: Sequence[ImageRequest],
        count: Callable[[], None],
    ) -> None:
        """Generate the missing images of a side; keep the latents of those `with_latents`.

        `count` is called for each image that is done. What was generated before an interruption
        stays.
        """
        missing = self.missing(side, requests)
        if not missing:  # so that no model is loaded
            return
        wanted = {one.id for one in with_latents}
        steps: dict[str, list[Latents]] = {}

        def on_step(request: ImageRequest, state: DenoisingState) -> None:
            if request.id in wanted and state.step > len(steps.setdefault(request.id, [])):
                steps[request.id].append(state.latents.cpu().numpy())

        for request, image in side.images(missing, on_step):
            if kept := steps.pop(request.id, None):
                latents = io.BytesIO()
                np.save(latents, np.concatenate(kept))
                replace_file(self._file(side, request, "npy"), latents.getvalue(), mode=0o644)
            file = io.BytesIO()
            Image.fromarray(image).save(file, "png")
            replace_file(self._file(side, request, "png"), file.getvalue(), mode=0o644)
            count()

    def image(self, side: Side, request: ImageRequest) -> Pixels:
        with Image.open(self._file(side, request, "png")) as image:
            return np.asarray(image)

    def latents(self, side: Side, request: ImageRequest) -> Latents | None:
        """The latents (steps, 16, height_px/8, width_px/8) after each step, if they were kept."""
        file = self._file(side, request, "npy")
        return np.load(file) if file.exists() else None

    def _file(self, side: Side, request: ImageRequest, kind: str) -> Path:
        return self._folder / f"{digest(side, request)}.{kind}"
