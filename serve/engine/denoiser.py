"""SD3.5 without its text encoders: single denoising steps, and the VAE.

`PromptEncoder` and `Denoiser` together do what `StableDiffusion3Pipeline.__call__` of diffusers
does, and its image-to-image and inpainting pipelines, but divided as a server needs it. Text
encoding is separate from image generation. Denoising is done one step at a time, for a batch of
images that may each be at another step and have another guidance. This code never calls the
pipeline; only the tests do, to compare results.

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
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from numpy.typing import NDArray
from safetensors.torch import load_file

from ..edit_pixels import EditPixels
from ..models.checkpoints import CheckpointError, read_json
from ..request import SIZE_MULTIPLE_PX, ImageRequest, Sampler
from .card import check_device
from .fp8_format import TRANSFORMER, WEIGHTS, is_fp8
from .fused_attention import fuse_qkv
from .modulation import STEPS, Modulation
from .noise_schedule import TRAIN_STEPS, Schedule, schedule, shift_of
from .precision import RECIPES, Recipe, apply_recipe
from .preview import VAE_FACTOR, LatentToRgb
from .prompt_embeds import PromptEmbeds

DENOISER_COMPONENTS = "transformer", "vae", "scheduler"


@dataclass(frozen=True, slots=True)
class EditLatents:
    """The picture of an edit as the denoising steps need it.

    `image`: the picture's latents. `noise`: the noise generated from the seed. Both are (1, 16,
    height_px/8, width_px/8) in float32. `repainted`: (1, 1, height_px/8, width_px/8), 1 where the
    mask lets the model repaint and 0 where the picture is kept; None without a mask.
    """

    image: torch.Tensor
    noise: torch.Tensor
    repainted: torch.Tensor | None

    def at(self, level: float) -> torch.Tensor:
        """The picture's latents with noise of this level: 0 is none, 1 is noise alone."""
        return level * self.noise + (1 - level) * self.image

    def blended(self, latents: torch.Tensor, level: float) -> torch.Tensor:
        """Replace the latents that the mask keeps by those of the picture at a noise level."""
        if self.repainted is None:
            return latents
        return self.repainted * latents + (1 - self.repainted) * self.at(level)


@dataclass(slots=True)
class DenoisingState:
    """An image between two steps: its latents, and everything that its next step needs.

    `latents`: the image so far. `predicted`: the finished latents as the last step predicted them.
    Both are (1, 16, height_px/8, width_px/8) in float32. `embeds`: the prompt's row; with guidance
    two rows, first the negative prompt's, then the prompt's. `schedule`: the noise levels and
    corrections of the steps. `step`: the number of steps that are done. `modulation`: that of the
    steps from `modulated_from` on, (steps, rows, modulation width). `first_step`: the value with
    which `step` began; above 0 for an edit. `edit`: the picture of an edit.
    """

    latents: torch.Tensor
    embeds: PromptEmbeds
    guidance_scale: float
    schedule: Schedule
    step: int = 0
    predicted: torch.Tensor | None = None
    modulation: torch.Tensor | None = None
    modulated_from: int = 0
    first_step: int = 0
    edit: EditLatents | None = None

    @property
    def rows(self) -> int:
        return len(self.embeds.pooled)

    @property
    def steps_left(self) -> int:
        return len(self.schedule.corrections) - self.step

    @property
    def steps_done(self) -> int:
        return self.step - self.first_step

    @property
    def finished(self) -> bool:
        return not self.steps_left

    @property
    def estimate(self) -> torch.Tensor:
        """The finished latents as the last step predicted them; before any step, the latents.

        Latents that a mask keeps are those of the picture.
        """
        if self.predicted is None:
            return self.latents
        return self.edit.blended(self.predicted, 0.0) if self.edit else self.predicted


class Denoiser:
    """The transformer and the VAE of one model, in one precision and on one device."""

    @classmethod
    @torch.inference_mode()
    def load(cls, folder: Path, recipe: Recipe, device: str = "cpu") -> Denoiser:
        """Load a model from a checkpoint folder, in the recipe's formats, onto a device.

        Raises `CheckpointError` if the checkpoint holds FP8 weights that do not suit the recipe, or
        if it asks for a noise schedule that Octet does not have.
        """
        vae = AutoencoderKL.from_pretrained(
            folder / "vae", use_safetensors=True, torch_dtype=recipe.vae_dtype(device)
        )
        schedule = read_json(folder / "scheduler" / "scheduler_config.json")
        try:
            shift = shift_of(schedule)
        except ValueError as error:
            raise CheckpointError(f"{folder}/scheduler: {error}") from None
        transformer = load_transformer(folder, recipe, device)
        return cls(transformer, vae, recipe, device, shift)

    @torch.inference_mode()
    def __init__(
        self, transformer: Any, vae: Any, recipe: Recipe, device: str, shift: float
    ) -> None:
        """`transformer`: must be in the recipe's formats and on the device already.

        `shift`: the shift of the noise schedule.
        """
        self.recipe, self.device, self.shift = recipe, device, shift
        self.transformer, self.vae = transformer, vae
        self._modulation = Modulation(transformer)
        # Faster on a CPU (bench/README.md). On a card the warm-up measures both formats.
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
        sampler: Sampler = Sampler.EULER,
        first_step: int = 0,
        edit: EditLatents | None = None,
    ) -> DenoisingState:
        """Begin an image with the noise of its seed.

        The noise is generated in float32 on the CPU, so it is the same for every precision. An
        `edit` begins at `first_step`, with its picture at the noise level of that step.
        """
        steps = schedule(sampler, num_inference_steps, self.shift)
        if edit:
            latents = edit.at(steps.levels[first_step])
        else:
            generator = torch.Generator("cpu").manual_seed(seed)
            latents = torch.randn(self._latent_shape(width, height), generator=generator)
        rows = PromptEmbeds(
            embeds.tokens.to(self.device, self.recipe.dtype),
            embeds.pooled.to(self.device, self.recipe.dtype),
        )
        return DenoisingState(
            latents.to(self.device),
            rows,
            guidance_scale,
            steps,
            step=first_step,
            first_step=first_step,
            edit=edit,
        )

    def begin_request(
        self, request: ImageRequest, embeds: PromptEmbeds, edit: EditLatents | None = None
    ) -> DenoisingState:
        """Begin the image of a request; `edit`: its picture, if it is an edit."""
        width, height = request.canvas
        return self.begin(
            embeds,
            width=width,
            height=height,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            seed=request.seed,
            sampler=request.sampler,
            first_step=request.first_step,
            edit=edit,
        )

    def _latent_shape(self, width: int, height: int) -> tuple[int, int, int, int]:
        """The shape of the latents of an image, whose sides are in px."""
        channels: int = self.transformer.config.in_channels
        return 1, channels, height // VAE_FACTOR, width // VAE_FACTOR

    @torch.inference_mode()
    def encode(self, pixels: EditPixels, seed: int) -> EditLatents:
        """Encode the picture of an edit; its edges are repeated up to the size of the canvas.

        The latents are sampled from what the VAE predicts. The seed's first random numbers choose
        the sample, and the next ones are the noise, as in diffusers' pipelines. A latent is
        repainted if any of its 64 pixels is repainted. (diffusers looks at one of the 64, and so
        loses thin lines.)
        """
        image = _on_canvas(torch.tensor(pixels.image).movedim(-1, 0)[None] / 127.5 - 1)
        height, width = image.shape[-2:]
        posterior = self.vae.encode(image.to(self.device, self.vae.dtype)).latent_dist
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = self._latent_shape(width, height)
        sampled, noise = (torch.randn(shape, generator=generator).to(self.device) for _ in range(2))
        config = self.vae.config
        latents = posterior.mean.float() + posterior.std.float() * sampled
        latents = (latents - config.shift_factor) * config.scaling_factor
        mask = None
        if (repainted := pixels.repainted) is not None:
            mask = _on_canvas(torch.tensor(repainted)[None, None].float())
            mask = F.max_pool2d(mask, VAE_FACTOR).to(self.device)
        return EditLatents(latents, noise, mask)

    @torch.inference_mode()
    def denoise_step(self, batch: Sequence[DenoisingState], rows: int = 0) -> None:
        """Take one step with every image of the batch, in one call of the transformer.

        All images must have the same size and text length, because SD3 has no attention mask. The
        call is padded to `rows` rows if the batch has fewer. Guidance and the step itself
        (`Schedule`) are computed in float32. After each step of an edit, latents that the mask
        keeps are replaced by the picture's, at the noise level that is reached.
        """
        own = [d.rows for d in batch]
        padding = max(rows - sum(own), 0)
        latents = _padded([d.latents for d in batch for _ in range(d.rows)], padding)
        velocity = self.transformer(
            hidden_states=latents.to(self.recipe.dtype),
            encoder_hidden_states=_padded([d.embeds.tokens for d in batch], padding),
            pooled_projections=_padded([self._modulated(d) for d in batch], padding),
            return_dict=False,
        )[0].float()
        stepped = []  # applied to all images or to none: a failed step may be repeated
        for d, v in zip(batch, velocity[: sum(own)].split(own), strict=True):
            if d.rows == 2:
                v = v[:1] + d.guidance_scale * (v[1:] - v[:1])
            level, next_level = d.schedule.levels[d.step : d.step + 2]
            predicted = d.latents - level * v  # v predicts noise − image
            next_latents = d.latents + (next_level - level) * v
            # The first step of an edit may have a correction, but there is no step before it.
            if d.predicted is not None and (correction := d.schedule.corrections[d.step]):
                next_latents += correction * (predicted - d.predicted)
            if d.edit:
                next_latents = d.edit.blended(next_latents, next_level)
            stepped.append((d, next_latents, predicted))
        for d, next_latents, predicted in stepped:
            d.latents, d.predicted = next_latents, predicted
            d.step += 1
        # Otherwise steps would pile up on the card before images can join and leave.
        if self.on_cuda:
            torch.cuda.current_stream().synchronize()

    def _modulated(self, d: DenoisingState) -> torch.Tensor:
        """The modulation (rows, modulation width) of an image's next step."""
        ahead = d.step - d.modulated_from
        if d.modulation is None or ahead >= len(d.modulation):
            # Always for as many steps, so that these numbers do not depend on the image's length.
            last = len(d.schedule.corrections) - 1
            levels = [d.schedule.levels[min(d.step + i, last)] * TRAIN_STEPS for i in range(STEPS)]
            # Timesteps stay float32: rounding them to bf16 moves latents by up to 8e-2.
            times = torch.tensor(levels, dtype=torch.float32, device=self.device)
            found = self._modulation(
                times.repeat_interleave(d.rows), d.embeds.pooled.repeat(STEPS, 1)
            )
            d.modulation, d.modulated_from, ahead = found.view(STEPS, d.rows, -1), d.step, 0
        return d.modulation[ahead]

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


def _padded(rows: Sequence[torch.Tensor], padding: int) -> torch.Tensor:
    """Concatenate rows, and append the first row `padding` times."""
    return torch.cat([*rows, *[rows[0][:1]] * padding])


def _on_canvas(image: torch.Tensor) -> torch.Tensor:
    """Repeat the right and lower edges of an image (1, channels, height_px, width_px).

    Both sides are multiples of `SIZE_MULTIPLE_PX` then.
    """
    height, width = image.shape[-2:]
    padding = 0, -width % SIZE_MULTIPLE_PX, 0, -height % SIZE_MULTIPLE_PX
    return F.pad(image, padding, mode="replicate")


def to_pixels(image: torch.Tensor) -> NDArray[np.uint8]:
    """Convert a decoded image (3, height_px, width_px) to 8-bit pixels (height_px, width_px, 3)."""
    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(1, 2, 0).cpu().numpy()


def load_transformer(folder: Path, recipe: Recipe, device: str) -> Any:
    """Load a checkpoint's transformer in a recipe's formats onto a device.

    The FP8 weights of an FP8 checkpoint are loaded without 16-bit copies; on a CPU they are mapped
    from the file. A 16-bit checkpoint is quantised while it is loaded. If an FP8 checkpoint holds
    AdaLN in 16 bit but the recipe stores AdaLN in 8 bit, AdaLN is converted. Raises
    `CheckpointError` if the checkpoint holds FP8 weights, or AdaLN in 8 bit, but the recipe does
    not.
    """
    if not is_fp8(folder, TRANSFORMER):
        transformer = SD3Transformer2DModel.from_pretrained(
            folder / TRANSFORMER, use_safetensors=True, torch_dtype=recipe.dtype
        )
        return apply_recipe(fuse_qkv(transformer), recipe, device).eval()
    if not recipe.fp8_linears:
        raise CheckpointError(
            f"{folder} holds FP8 weights: {recipe.name} needs the original, a 16-bit checkpoint"
        )
    config = read_json(folder / TRANSFORMER / "config.json")
    stored = RECIPES[config.pop("quantization_config").get("recipe", "fp8")]
    if stored.adaln_8_bit and not recipe.adaln_8_bit:
        raise CheckpointError(
            f"{folder} holds AdaLN in 8 bit: set adaln_8_bit: true, or use the 16-bit checkpoint"
        )
    with torch.device("meta"):
        transformer = apply_recipe(fuse_qkv(SD3Transformer2DModel.from_config(config)), stored)
    weights = load_file(folder / TRANSFORMER / WEIGHTS, device=device)
    transformer.load_state_dict(weights, assign=True)
    return apply_recipe(transformer, recipe).eval()
