"""The structure of an SD3.5 model, from which its memory and its arithmetic are computed.

The folder `structures/` holds the configurations of the real models in the format of diffusers and
transformers.

Pure: standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, NamedTuple

TOKEN_PX = 16  # side of the square that a token stands for: VAE factor 8 × patch size 2

# The configuration file of each model's transformer. Turbo is Large with other weights. All models
# share the VAE (vae.json) and the text encoders (clip_l.json, clip_g.json, t5_xxl.json).
TRANSFORMERS = {
    "sd3.5-large": "large",
    "sd3.5-large-turbo": "large",
    "sd3.5-medium": "medium",
}
# Default steps and rows (2 with guidance) of an image. They are those of the model cards; those of
# Medium are from diffusers' documentation.
USUAL_IMAGES = {"sd3.5-large": (40, 2), "sd3.5-large-turbo": (4, 1), "sd3.5-medium": (28, 2)}


class Structure(NamedTuple):
    """The sizes of a transformer (MMDiT).

    `width`: the hidden size. `dual_layers`: how many of the `layers` attend to the image a second
    time. `text_width`, `pooled_width`: the widths of a token's embedding and of the pooled
    embedding. `positions`: entries of the position table.
    """

    width: int
    layers: int
    dual_layers: int
    head_width: int = 64
    text_width: int = 4096
    pooled_width: int = 2048
    positions: int = 192 * 192
    patch_values: int = 2 * 2 * 16  # numbers in a token's patch of latents

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Structure:
        """Read the structure from the configuration of an `SD3Transformer2DModel`.

        Values that the configuration leaves out are diffusers' defaults. Raises `KeyError` if a
        value is missing that every such configuration has.
        """
        return cls(
            width=config["num_attention_heads"] * config["attention_head_dim"],
            layers=config["num_layers"],
            dual_layers=len(config.get("dual_attention_layers", ())),
            head_width=config["attention_head_dim"],
            text_width=config["joint_attention_dim"],
            pooled_width=config["pooled_projection_dim"],
            positions=config.get("pos_embed_max_size", 96) ** 2,
            patch_values=config.get("patch_size", 2) ** 2 * config.get("in_channels", 16),
        )


def config(name: str) -> dict[str, Any]:
    """Read a configuration of the folder `structures/`, by its file's name without `.json`."""
    text = files(__package__).joinpath("structures", f"{name}.json").read_text(encoding="utf-8")
    read: dict[str, Any] = json.loads(text)
    return read


def structure(model: str) -> Structure:
    """The structure of a model, a key of `TRANSFORMERS`."""
    return Structure.of(config(TRANSFORMERS[model]))
