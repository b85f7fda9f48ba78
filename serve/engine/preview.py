"""Previews of unfinished images, at the cost of a small matrix product.

Each latent stands for 8 × 8 pixels. The mean colour of these pixels is almost a linear function of
the latent's 16 channels. This function is fitted to the model's own VAE when the model is loaded:
the VAE encodes test images of soft coloured patches, whose mean colours are known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import avg_pool2d, interpolate

VAE_FACTOR = 8
TEST_IMAGE_PX = 64
PATCHES = 2, 4, 8  # patches along a side of a test image, from coarse to fine
TEST_IMAGES = 4  # for each number of patches


class LatentToRgb:
    """A linear map from latents to colours, which makes previews.

    `weight`: (17, 3), one row for each of the 16 latent channels, and one for a constant.
    """

    @torch.inference_mode()
    def __init__(self, vae: Any) -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        images = torch.cat(
            [
                interpolate(
                    torch.rand(TEST_IMAGES, 3, patches, patches, generator=generator),
                    (TEST_IMAGE_PX, TEST_IMAGE_PX),
                    mode="bilinear",
                )
                for patches in PATCHES
            ]
        )
        encoded = vae.encode((images * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mode()
        latents = (encoded.float().cpu() - vae.config.shift_factor) * vae.config.scaling_factor
        colours = avg_pool2d(images, VAE_FACTOR).movedim(1, -1).reshape(-1, 3)
        self.weight: torch.Tensor = torch.linalg.lstsq(_with_one(latents), colours).solution

    def __call__(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """Make a preview (3, height_px, width_px) of latents (1, 16, height_px/8, width_px/8).

        Black is 0 and white is 1, but values are not yet clamped to that range.
        """
        _, _, rows, columns = latents.shape
        colours = _with_one(latents.float().cpu()) @ self.weight
        small = colours.reshape(1, rows, columns, 3).movedim(-1, 1)
        return interpolate(small, (height, width), mode="bicubic")[0]


def _with_one(latents: torch.Tensor) -> torch.Tensor:
    """Reshape latents (n, channels, height, width) to (n · height · width, channels + 1).

    Each row is one latent's channels, followed by a 1 for the constant.
    """
    pixels = latents.movedim(1, -1).reshape(-1, latents.shape[1])
    return torch.cat([pixels, pixels.new_ones(len(pixels), 1)], dim=1)
