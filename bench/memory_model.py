"""Print the memory of replicas by `cluster.footprint`, and check it on torch's meta device.

    python -m bench.memory_model

The peaks of a step and of a decode are traced on the meta device, which computes shapes and no
values. A dispatch mode follows every tensor's storage from its allocation until nothing refers to
it. The sum is what torch's allocator would hold in eager execution without fragmentation. Attention
counts as fused kernels do it, without its matrix of weights.
"""

from __future__ import annotations

import weakref
from functools import cache
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import T5Config, T5EncoderModel

from cluster.footprint import TEXT_TOKENS, footprint, text_encoders_gib
from cluster.footprint import step_bytes as formula
from cluster.structure import TRANSFORMERS, config, structure
from serve.engine.precision import RECIPES, apply_recipe

SIDES = 512, 1024


class LivingBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's has no types
    """Traces the memory of tensors that are made within a `with` block.

    `living`: bytes of the tensors' storages that are alive now. `peak`: the largest value that
    `living` has had.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no types
        self.living = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(s) for s in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if id(storage) not in self._known and id(storage) not in before:
                self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        nbytes, key = storage.nbytes(), id(storage)
        self._known.add(key)
        self.living += nbytes
        self.peak = max(self.peak, self.living)

        def gone() -> None:
            self._known.discard(key)
            self.living -= nbytes

        weakref.finalize(storage, gone)


def _storages(tree: Any) -> list[Any]:
    return [x.untyped_storage() for x in tree_iter(tree) if isinstance(x, torch.Tensor)]


def step_bytes(model: str, recipe: str, rows: int, width: int, height: int, text: int) -> int:
    """Peak bytes of one call of the transformer, without its weights and its input.

    `width` and `height` of the image are in px. `text`: the number of text tokens.
    """
    transformer = _transformer(model, recipe)
    with torch.device("meta"):
        latents = torch.empty(rows, 16, height // 8, width // 8, dtype=torch.bfloat16)
        tokens = torch.empty(rows, text, 4096, dtype=torch.bfloat16)
        pooled = torch.empty(rows, 2048, dtype=torch.bfloat16)
        times = torch.empty(rows)
    with torch.inference_mode(), _fused_attention(), (living := LivingBytes()):
        transformer(
            hidden_states=latents,
            timestep=times,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            return_dict=False,
        )
    return living.peak


def decode_bytes(width: int, height: int) -> int:
    """Peak bytes of the VAE's decoder in bfloat16, for one image."""
    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(config("vae")).to(torch.bfloat16)
        latents = torch.empty(1, 16, height // 8, width // 8, dtype=torch.bfloat16)
    with torch.inference_mode(), _fused_attention(), (living := LivingBytes()):
        vae.decode(latents, return_dict=False)
    return living.peak


def picture_bytes(width: int, height: int) -> int:
    """Peak bytes of the VAE's encoder in bfloat16, for the picture of one edit."""
    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(config("vae")).to(torch.bfloat16)
        picture = torch.empty(1, 3, height, width, dtype=torch.bfloat16)
    with torch.inference_mode(), _fused_attention(), (living := LivingBytes()):
        vae.encode(picture, return_dict=False)
    return living.peak


@cache
def _transformer(model: str, recipe: str) -> Any:
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(config(TRANSFORMERS[model]))
        return apply_recipe(transformer, RECIPES[recipe]).eval()


def _fused_attention() -> Any:
    """Patch attention to allocate its result only, like a fused kernel."""

    def attention(query: Any, key: Any, value: Any, **_: Any) -> Any:
        return torch.empty_like(query)

    return patch("torch.nn.functional.scaled_dot_product_attention", attention)


def encode_bytes(prompts: int, length: int) -> int:
    """Peak bytes of T5's encoder in bfloat16, the largest of the text encoders.

    `prompts`: how many are encoded together. `length`: tokens of each prompt.
    """
    with torch.device("meta"):
        t5 = T5EncoderModel(T5Config(**config("t5_xxl"))).to(torch.bfloat16)
        ids = torch.zeros(prompts, length, dtype=torch.long)
    with torch.inference_mode(), (living := LivingBytes()):
        t5(ids)
    return living.peak


def main() -> None:
    print("GiB of a replica that generates one image with guidance at a time, computed\n")
    print(
        "| model | runs | size | transformer | VAE | step | decode | torch peak | whole replica |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for model, recipe, side in product(TRANSFORMERS, ("fp8", "fp8-adaln8", "bf16"), SIDES):
        f = footprint(structure(model), recipe, 1, side * side)
        parts = f.transformer, f.vae, f.step, f.decode, f.torch_peak, f.total
        cells = " | ".join(f"{gib:.2f}" for gib in parts)
        print(f"| {model} | {recipe} | {side}² | {cells} |")
    print(f"\ntext encoders, T5 in FP8 / in 16 bit: {text_encoders_gib():.2f} / "
          f"{text_encoders_gib(t5_in_fp8=False):.2f} GiB")  # fmt: skip
    ratios = [
        step_bytes(m, r, 2, s, s, TEXT_TOKENS) / formula(structure(m), r, 2, s * s, TEXT_TOKENS)
        for m, r, s in product(("sd3.5-large", "sd3.5-medium"), ("fp8", "bf16"), SIDES)
    ]
    print(f"a step traced on the meta device ÷ its formula: {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
