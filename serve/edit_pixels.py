"""The pixels of an edit: the picture that a client has sent, and its mask.

They travel beside the `ImageRequest`, which holds only their digests.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

REPAINTED_ALPHA = 127  # of 255; pixels with at most this alpha in the mask are repainted


class EditPixels(NamedTuple):
    """The picture of an edit in the size of the answer, and its mask.

    `image`: (height_px, width_px, 3), red, green and blue. `kept`: the mask's alpha, (height_px,
    width_px), or None without a mask. Where it is 255 the picture stays as it is, where it is 0 it
    is repainted, and between these the two are mixed.
    """

    image: NDArray[np.uint8]
    kept: NDArray[np.uint8] | None = None

    @property
    def repainted(self) -> NDArray[np.bool_] | None:
        """Which pixels (height_px, width_px) the model repaints; None without a mask."""
        return None if self.kept is None else self.kept <= REPAINTED_ALPHA

    @property
    def nbytes(self) -> int:
        """The size of all pixels in memory, in bytes."""
        return self.image.nbytes + (0 if self.kept is None else self.kept.nbytes)

    def finished(self, generated: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Crop a generated canvas to the picture's size, and put back what the mask keeps.

        `generated`: (canvas height_px, canvas width_px, 3). Pixels with `kept` 255 are those of
        the picture exactly.
        """
        height, width, _ = self.image.shape
        generated = generated[:height, :width]
        if self.kept is None:
            return generated
        kept = self.kept[:, :, np.newaxis].astype(np.uint16)  # 255 · 255 + 127 fits into 16 bits
        mixed = (kept * self.image + (255 - kept) * generated + 127) // 255
        return mixed.astype(np.uint8)
