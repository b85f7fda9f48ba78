"""Pictures of images that are not finished, at the cost of a small matrix product.

A latent's 16 channels tell its 8 × 8 pixels' mean colour almost linearly. The map is fitted to the
model's own VAE when it is loaded, from pictures of soft coloured patches that the VAE encodes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import avg_pool2d, interpolate

VAE_FACTOR = 8
PICTURE_PX = 128
CELLS = 2, 4, 8, 16  # patches along a side, from coarse to fine
PICTURES = 4  # of each


class LatentToRgb:
    """`weight`: (17, 3), of the 16 latent channels and a constant; linear, so about a picture."""

    @torch.inference_mode()
    def __init__(self, vae: Any) -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        pictures = torch.cat(
            [
                interpolate(
                    torch.rand(PICTURES, 3, cells, cells, generator=generator),
                    (PICTURE_PX, PICTURE_PX),
                    mode="bilinear",
                )
                for cells in CELLS
            ]
        )
        encoded = vae.encode((pictures * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mode()
        latents = (encoded.float().cpu() - vae.config.shift_factor) * vae.config.scaling_factor
        colours = avg_pool2d(pictures, VAE_FACTOR).movedim(1, -1).reshape(-1, 3)
        self.weight: torch.Tensor = torch.linalg.lstsq(_with_one(latents), colours).solution

    def __call__(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """A picture (3, height_px, width_px) of latents (1, 16, …); 0..1, not yet clamped."""
        _, _, rows, columns = latents.shape
        colours = _with_one(latents.float().cpu()) @ self.weight
        small = colours.reshape(1, rows, columns, 3).movedim(-1, 1)
        return interpolate(small, (height, width), mode="bicubic")[0]


def _with_one(latents: torch.Tensor) -> torch.Tensor:
    """(pixels, channels + 1) of latents (n, channels, height, width)."""
    pixels = latents.movedim(1, -1).reshape(-1, latents.shape[1])
    return torch.cat([pixels, pixels.new_ones(len(pixels), 1)], dim=1)
