"""Stable Diffusion 3.5 in parts: prompt encoder, single denoising steps, and VAE decoder.

`PromptEncoder` and `Denoiser` together do what `StableDiffusion3Pipeline.__call__` of diffusers
does, but divided as a server needs it. Text encoding is separate from image generation. Denoising
is done one step at a time, for a batch of images that may each be at another step and have another
guidance. This code never calls the pipeline; only the tests do, to compare results.

Weights come from a checkpoint folder (`serve.models.checkpoints`). They are read from safetensors
files only, and no code from the hub is ever run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
)
from numpy.typing import NDArray
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from ..models.checkpoints import CheckpointError
from . import fp8_checkpoint
from .fused_attention import fuse_qkv
from .noise_schedule import TRAIN_STEPS, sigmas
from .precision import ENCODER_RECIPES, EncoderRecipe, Recipe, apply_recipe, store_in_fp8
from .preview import VAE_FACTOR, LatentToRgb

DENOISER_COMPONENTS = "transformer", "vae", "scheduler"
ENCODER_COMPONENTS = (
    *("text_encoder", "text_encoder_2", "text_encoder_3"),
    *("tokenizer", "tokenizer_2", "tokenizer_3"),
)


@dataclass(frozen=True, slots=True)
class PromptEmbeds:
    """The embeddings of one or more prompts.

    `tokens`: (prompts, text length, joint width). `pooled`: (prompts, pooled width).
    """

    tokens: torch.Tensor
    pooled: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.pooled.nbytes


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
        index = DiffusionPipeline.load_config(folder)
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
            self.t5 = _load_t5(folder, recipe).to(device)
        joint = SD3Transformer2DModel.load_config(folder / "transformer")
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


@dataclass(slots=True)
class DenoisingState:
    """An image between two steps: its latents, and everything that its next step needs.

    `latents`: the image so far. `velocity`: the transformer's output in the last step. Both are
    (1, 16, height_px/8, width_px/8) in float32. `embeds`: the prompt's row; with guidance two rows,
    first the negative prompt's, then the prompt's. `sigmas`: the noise level before the first step,
    then the level after each step. `step`: the number of steps that are done.
    """

    latents: torch.Tensor
    embeds: PromptEmbeds
    guidance_scale: float
    sigmas: tuple[float, ...]
    step: int = 0
    velocity: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.embeds.pooled)

    @property
    def steps_left(self) -> int:
        return len(self.sigmas) - 1 - self.step

    @property
    def finished(self) -> bool:
        return not self.steps_left

    @property
    def estimate(self) -> torch.Tensor:
        """The finished latents as the last step predicts them; before any step, the latents.

        The prediction is x − σ · v, with latents x, noise level σ and velocity v, because v
        predicts noise − image.
        """
        if self.velocity is None:
            return self.latents
        return self.latents - self.sigmas[self.step] * self.velocity


class Denoiser:
    """The transformer and the VAE of one model, in one precision and on one device."""

    @classmethod
    @torch.inference_mode()
    def load(cls, folder: Path, recipe: Recipe, device: str = "cpu") -> Denoiser:
        """Load a model from a checkpoint folder, in the recipe's formats, onto a device.

        Raises `CheckpointError` if the checkpoint holds FP8 weights that do not suit the recipe.
        """
        vae = AutoencoderKL.from_pretrained(
            folder / "vae", use_safetensors=True, torch_dtype=recipe.vae_dtype
        )
        schedule = FlowMatchEulerDiscreteScheduler.load_config(folder / "scheduler")
        transformer = _load_transformer(folder, recipe, device)
        return cls(transformer, vae, recipe, device, float(schedule["shift"]))

    @torch.inference_mode()
    def __init__(
        self, transformer: Any, vae: Any, recipe: Recipe, device: str, shift: float
    ) -> None:
        """`transformer`: must be in the recipe's formats and on the device already.

        `shift`: the shift of the noise schedule.
        """
        self.recipe, self.device, self.shift = recipe, device, shift
        self.transformer, self.vae = transformer, vae
        # Faster on a CPU (bench/README.md); `bench.gpu.steps` compares both formats on a card.
        self.vae.to(device, memory_format=torch.channels_last).eval()
        self.native_size_px = int(self.transformer.config.sample_size) * VAE_FACTOR
        self._latent_to_rgb = LatentToRgb(self.vae)
        # The VAE decodes finished images while the transformer goes on with the others.
        self._decoding_stream = None
        if self.on_cuda:
            self._decoding_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's

    @torch.inference_mode()
    def begin(
        self,
        embeds: PromptEmbeds,
        *,
        width: int,
        height: int,
        num_inference_steps: int,
        guidance_scale: float,
        seed: int,
    ) -> DenoisingState:
        """Begin an image with the noise of its seed.

        The noise is generated in float32 on the CPU, so it is the same for every precision.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = 1, self.transformer.config.in_channels, height // VAE_FACTOR, width // VAE_FACTOR
        noise = torch.randn(shape, generator=generator)
        rows = PromptEmbeds(
            embeds.tokens.to(self.device, self.recipe.dtype),
            embeds.pooled.to(self.device, self.recipe.dtype),
        )
        schedule = sigmas(num_inference_steps, self.shift)
        return DenoisingState(noise.to(self.device), rows, guidance_scale, schedule)

    @torch.inference_mode()
    def denoise_step(self, batch: Sequence[DenoisingState], rows: int = 0) -> None:
        """Take one step with every image of the batch, in one call of the transformer.

        All images must have the same size and text length, because SD3 has no attention mask. The
        call is padded to `rows` rows if the batch has fewer. Guidance and Euler's step
        x += (sigma_next − sigma) · v are computed in float32.
        """
        own = [d.rows for d in batch]
        padding = max(rows - sum(own), 0)
        latents = _padded([d.latents for d in batch for _ in range(d.rows)], padding)
        # Timesteps stay float32: rounding them to bf16 moves latents by up to 8e-2.
        times = [d.sigmas[d.step] * TRAIN_STEPS for d in batch for _ in range(d.rows)]
        times += times[:1] * padding
        velocity = self.transformer(
            hidden_states=latents.to(self.recipe.dtype),
            timestep=torch.tensor(times, dtype=torch.float32, device=self.device),
            encoder_hidden_states=_padded([d.embeds.tokens for d in batch], padding),
            pooled_projections=_padded([d.embeds.pooled for d in batch], padding),
            return_dict=False,
        )[0].float()
        stepped = []  # applied to all images or to none: a failed step may be repeated
        for d, v in zip(batch, velocity[: sum(own)].split(own), strict=True):
            # A copy also without guidance: a view would keep the velocities of the whole batch.
            v = v[:1] + d.guidance_scale * (v[1:] - v[:1]) if d.rows == 2 else v.clone()
            stepped.append((d, d.latents + (d.sigmas[d.step + 1] - d.sigmas[d.step]) * v, v))
        for d, next_latents, v in stepped:
            d.latents, d.velocity = next_latents, v
            d.step += 1
        if (
            self.on_cuda
        ):  # otherwise steps would pile up on the card before images can join and leave
            torch.cuda.current_stream().synchronize()

    @property
    def on_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def check_device(self) -> None:
        """Raise CUDA's error if a kernel has failed; after that no later call could succeed."""
        check_device(self.device)

    def free_memory(self) -> None:
        """Free the card's memory that torch's allocator does not use but keeps for later."""
        if self.on_cuda:
            torch.cuda.empty_cache()

    @contextmanager
    def beside_steps(self) -> Iterator[None]:
        """Run the CUDA kernels of the block in parallel with denoising steps.

        The block must run in another thread than the steps. On a CPU this has no effect.
        """
        with torch.cuda.stream(self._decoding_stream):  # has no effect if the stream is None
            yield

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents to images (n, 3, height_px, width_px) in float32.

        Black is 0 and white is 1, but values are not clamped to that range.
        """
        config = self.vae.config
        latents = latents / config.scaling_factor + config.shift_factor
        images: torch.Tensor = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return images.float() / 2 + 0.5

    @torch.inference_mode()
    def preview(self, latents: torch.Tensor) -> torch.Tensor:
        """A blurred version (3, height_px, width_px) of the image that `decode` would return."""
        height, width = (VAE_FACTOR * side for side in latents.shape[-2:])
        return self._latent_to_rgb(latents, width, height)


def check_device(device: str) -> None:
    """Raise CUDA's error if a kernel on this device has failed."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _padded(rows: Sequence[torch.Tensor], padding: int) -> torch.Tensor:
    """Concatenate rows, and append the first row `padding` times."""
    return torch.cat([*rows, *[rows[0][:1]] * padding])


def to_pixels(image: torch.Tensor) -> NDArray[np.uint8]:
    """Convert a decoded image (3, height_px, width_px) to 8-bit pixels (height_px, width_px, 3)."""
    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(1, 2, 0).cpu().numpy()


def _load_transformer(folder: Path, recipe: Recipe, device: str) -> Any:
    if recipe.fp8_linears:
        return fp8_checkpoint.load_transformer(folder, recipe, device)
    if fp8_checkpoint.is_fp8(folder, fp8_checkpoint.TRANSFORMER):
        raise CheckpointError(
            f"{folder} holds FP8 weights: {recipe.name} needs the original, a 16-bit checkpoint"
        )
    transformer = SD3Transformer2DModel.from_pretrained(
        folder / "transformer", use_safetensors=True, torch_dtype=recipe.dtype
    )
    return fuse_qkv(apply_recipe(transformer, recipe, device)).eval()


def _load_t5(folder: Path, recipe: EncoderRecipe) -> Any:
    if fp8_checkpoint.is_fp8(folder, fp8_checkpoint.T5):
        if not recipe.t5_stored_in_fp8:
            raise CheckpointError(
                f"{folder} holds T5 in FP8: {recipe.name} needs the original checkpoint"
            )
        return fp8_checkpoint.load_t5(folder, recipe.dtype)
    t5 = T5EncoderModel.from_pretrained(
        folder / "text_encoder_3", use_safetensors=True, dtype=recipe.dtype
    ).eval()
    if recipe.t5_stored_in_fp8:
        store_in_fp8(t5)
    return t5
