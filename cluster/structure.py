"""The structure of an SD3.5 model: what its memory and its arithmetic follow from.

`structures/` holds the configurations of the real models, as diffusers and transformers read them.

Pure: standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, NamedTuple

TOKEN_PX = 16  # of a token's side: VAE factor 8 × patch size 2

# The file of each model's transformer; Turbo is Large with other weights. They share the VAE
# (vae.json) and the text encoders (clip_l.json, clip_g.json, t5_xxl.json).
TRANSFORMERS = {
    "sd3.5-large": "large",
    "sd3.5-large-turbo": "large",
    "sd3.5-medium": "medium",
}


class Structure(NamedTuple):
    """A transformer (MMDiT); `width` is its hidden size, `dual_layers` attend to images twice."""

    width: int
    layers: int
    dual_layers: int
    head_width: int = 64
    text_width: int = 4096
    pooled_width: int = 2048
    positions: int = 192 * 192
    patch_values: int = 2 * 2 * 16  # of a token's patch of latents

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Structure:
        """From the configuration of an `SD3Transformer2DModel`; what it leaves out is diffusers'.

        Raises `KeyError` for what every such configuration has.
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
    """A configuration of `structures/`, by its file's name."""
    text = files(__package__).joinpath("structures", f"{name}.json").read_text(encoding="utf-8")
    read: dict[str, Any] = json.loads(text)
    return read


def structure(model: str) -> Structure:
    """Of a model of `TRANSFORMERS`."""
    return Structure.of(config(TRANSFORMERS[model]))
