"""SD3.5's text encoders, which turn prompts into embeddings.

The encoders come from a checkpoint folder (`serve.models.checkpoints`). Their weights are read from
safetensors files only, and no code from the hub is ever run. This file does not import diffusers,
whose import takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.utils import logging

from ..models.checkpoints import CheckpointError, read_json
from .card import check_device
from .fp8_format import QUANTO_MAP, T5, WEIGHTS, is_fp8
from .precision import (
    E4M3,
    ENCODER_RECIPES,
    EncoderRecipe,
    Fp8StoredLinear,
    T5Fp8Linear,
    store_in_fp8,
)
from .prompt_embeds import PromptEmbeds

logging.disable_progress_bar()  # a progress bar would fill every replica's log

ENCODER_COMPONENTS = (
    *("text_encoder", "text_encoder_2", "text_encoder_3"),
    *("tokenizer", "tokenizer_2", "tokenizer_3"),
)


class PromptEncoder:
    """The text encoders CLIP-L, CLIP-G and T5 with their tokenizers.

    The two CLIP encoders' hidden states before the last layer are concatenated along the width, and
    padded to T5's width. T5's tokens are appended to these tokens. A model without T5 gets zeros in
    place of T5's tokens, as in diffusers.
    """

    @torch.inference_mode()
    def __init__(
        self,
        folder: Path,
        recipe: EncoderRecipe = ENCODER_RECIPES["fp32"],
        device: str = "cpu",
    ) -> None:
        self.device = device
        index = read_json(folder / "model_index.json")
        self.clip_tokenizers = [
            CLIPTokenizer.from_pretrained(folder / part) for part in ("tokenizer", "tokenizer_2")
        ]
        self.clips = [
            CLIPTextModelWithProjection.from_pretrained(
                folder / part, use_safetensors=True, dtype=recipe.dtype
            )
            .to(device)
            .eval()
            for part in ("text_encoder", "text_encoder_2")
        ]
        self.t5, self.t5_tokenizer = None, None
        if index.get("text_encoder_3", [None])[0] is not None:
            self.t5_tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer_3")
            self.t5 = load_t5(folder, recipe).to(device)
        joint = read_json(folder / "transformer" / "config.json")
        self.joint_width = int(joint["joint_attention_dim"])

    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[str], max_sequence_length: int) -> PromptEmbeds:
        """Encode prompts; returns one row for each.

        For T5 each prompt is cut or padded to `max_sequence_length` tokens, for CLIP to a fixed
        length.
        """
        hidden, pooled = [], []
        for tokenizer, clip in zip(self.clip_tokenizers, self.clips, strict=True):
            out = clip(
                self._ids(tokenizer, prompts, tokenizer.model_max_length), output_hidden_states=True
            )
            hidden.append(out.hidden_states[-2])
            pooled.append(out.text_embeds)
        clip_tokens = torch.cat(hidden, dim=-1)
        clip_tokens = torch.nn.functional.pad(
            clip_tokens, (0, self.joint_width - clip_tokens.shape[-1])
        )
        if self.t5 is None:
            shape = len(prompts), max_sequence_length, self.joint_width
            t5_tokens = clip_tokens.new_zeros(shape)
        else:
            ids = self._ids(self.t5_tokenizer, prompts, max_sequence_length)
            t5_tokens = self.t5(ids).last_hidden_state
        return PromptEmbeds(torch.cat([clip_tokens, t5_tokens], dim=1), torch.cat(pooled, dim=-1))

    def check_device(self) -> None:
        """Raise CUDA's error if a kernel has failed; after that no later call could succeed."""
        check_device(self.device)

    def _ids(self, tokenizer: Any, prompts: Sequence[str], length: int) -> torch.Tensor:
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        ids: torch.Tensor = tokens.input_ids
        return ids.to(self.device)


def load_t5(folder: Path, recipe: EncoderRecipe) -> Any:
    """Load a checkpoint's T5 in a recipe's formats onto the CPU.

    Raises `CheckpointError` if the checkpoint holds T5 in FP8 but the recipe does not.
    """
    if is_fp8(folder, T5):
        if recipe.t5 is None:
            raise CheckpointError(
                f"{folder} holds T5 in FP8: {recipe.name} needs the original checkpoint"
            )
        return _from_fp8(folder, recipe)
    t5 = T5EncoderModel.from_pretrained(
        folder / T5, use_safetensors=True, dtype=recipe.dtype
    ).eval()
    if recipe.t5:
        store_in_fp8(t5, recipe.t5)
    return t5


def _from_fp8(folder: Path, recipe: EncoderRecipe) -> Any:
    """Load T5 from an FP8 checkpoint, which is in quanto's format for both kinds of storage."""
    config = AutoConfig.from_pretrained(folder / T5)
    del config.quantization_config
    with torch.device("meta"):
        t5 = T5EncoderModel(config).to(recipe.dtype).eval()
    names = read_json(folder / T5 / QUANTO_MAP)
    stored = load_file(folder / T5 / WEIGHTS)
    weights = {n: w if w.dtype is E4M3 else w.to(recipe.dtype) for n, w in stored.items()}
    if recipe.t5 == "quanto":
        from optimum.quanto import requantize

        requantize(t5, weights, names, device=torch.device("cpu"))
    else:
        for name in names:
            numbers, scale = (stored.pop(f"{name}.weight.{part}") for part in ("_data", "_scale"))
            for unused in [n for n in weights if n.startswith(f"{name}.")]:
                del weights[unused]
            layer = Fp8StoredLinear(numbers, scale.float().reshape(1, -1), None)
            t5.set_submodule(name, T5Fp8Linear(layer))
            weights |= {f"{name}.stored.{n}": t for n, t in layer.state_dict().items()}
        t5.load_state_dict(weights, assign=True, strict=False)  # one embedding has two names
    t5.encoder.set_input_embeddings(t5.shared)
    if missing := [name for name, tensor in t5.state_dict().items() if tensor.is_meta]:
        raise CheckpointError(f"{folder / T5}: {missing[0]} is missing")
    return t5
