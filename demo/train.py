"""Training of the demo model from nothing: a small pipeline in SD3.5's shape for landscapes.

    python -m demo.train    # on 2 CPU cores; stop it with Ctrl-C and run it again to resume

The stages are: render the pictures, train the VAE, encode the latents, train text encoders and
transformer jointly with SD3's rectified-flow loss, export in diffusers' folder layout, generate the
sample sheet. A stage whose file exists already is skipped.

The loss (Esser et al. 2024, "Scaling Rectified Flow Transformers"): u has a logit-normal
distribution, the noise level is sigma = shift·u / (1 + (shift − 1)·u), the transformer's input is
x = (1 − sigma)·latent + sigma·noise, and it predicts the velocity noise − latent.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from . import sheet
from .landscapes import caption, random_scene, render
from .muon import Optimizer
from .tokenizers import clip_tokenizer, t5_tokenizer

TEXT_LENGTH = 32  # tokens for CLIP and for T5 each; the same in training, serving and tests
# Number of pictures by (width, height) in px.
SIZES = {(128, 128): 4000, (192, 128): 1600, (128, 192): 1600, (96, 96): 1200}
CAPTIONS_PER_PICTURE = 6
SHIFT = 3.0
CAPTION_DROPOUT = 0.1  # fraction of captions that are replaced by the empty one, for guidance
LATENT_CHANNELS = 16
KL_WEIGHT = 1e-4


def progress() -> Progress:
    """A progress bar with the time that has passed and the time that remains."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
    )
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), refresh_per_second=1)


def render_picture(job: tuple[int, tuple[int, int]]) -> tuple[np.ndarray, list[str]]:
    """Render a picture, given its number and its size; return its pixels and its captions."""
    index, (width, height) = job
    rng = np.random.default_rng([width, height, index])
    scene = random_scene(rng)
    captions = [caption(scene, rng) for _ in range(CAPTIONS_PER_PICTURE)]
    return np.asarray(render(scene, width, height, rng)), captions


def pictures(work: Path, size: tuple[int, int]) -> tuple[torch.Tensor, list[list[str]]]:
    """All pictures of a size, uint8 (count, 3, height, width), and the captions of each."""
    file = work / f"pictures-{size[0]}x{size[1]}.npz"
    if not file.exists():
        jobs = [(i, size) for i in range(SIZES[size])]
        with multiprocessing.Pool() as pool, progress() as bar:
            task = bar.add_task(f"render {size[0]}x{size[1]}", total=len(jobs))
            rendered = []
            for one in pool.imap(render_picture, jobs, chunksize=16):
                rendered.append(one)
                bar.advance(task)
        images = np.stack([pixels for pixels, _ in rendered])
        np.savez(file, images=images, captions=json.dumps([texts for _, texts in rendered]))
    data = np.load(file)
    return torch.from_numpy(data["images"]).permute(0, 3, 1, 2), json.loads(str(data["captions"]))


def batches(work: Path, batch: int, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    """Endless batches of pictures of one size, with values from -1 to 1; half are mirrored."""
    stock = {size: pictures(work, size)[0] for size in SIZES}
    share = np.array(list(SIZES.values()), float) / sum(SIZES.values())
    while True:
        images = stock[list(SIZES)[rng.choice(len(SIZES), p=share)]]
        chosen = images[torch.from_numpy(rng.integers(len(images), size=batch))].float() / 127.5 - 1
        yield chosen.flip(-1) if rng.random() < 0.5 else chosen


def new_vae() -> AutoencoderKL:
    """An untrained VAE."""
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(32, 48, 80, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    # The posterior starts narrow (std 0.05), so that the decoder gets little noise at first.
    last = vae.encoder.conv_out
    with torch.no_grad():
        last.weight[LATENT_CHANNELS:] = 0
        last.bias[LATENT_CHANNELS:] = -6
    return vae


def sharpness(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A loss that punishes blur, but not a shift of tone.

    It is the L1 distance between the differences of neighbouring pixels of two pictures.
    """
    across = (x.diff(dim=-1) - y.diff(dim=-1)).abs().mean()
    return across + (x.diff(dim=-2) - y.diff(dim=-2)).abs().mean()


def train_vae(work: Path, steps: int, batch: int, rate: float = 2e-3) -> AutoencoderKL:
    """Train the VAE on the pictures, or go on where a former training stopped."""
    vae = new_vae().to(memory_format=torch.channels_last)
    optimizer = Optimizer(vae, rate, steps)
    state = {"model": vae, "optimizer": optimizer}
    first = restore(work / "vae.pt", state)
    source, error = batches(work, batch, np.random.default_rng(100 + first)), 0.3
    with progress() as bar:
        task = bar.add_task("vae", total=steps, completed=first)
        for step in range(first, steps):
            x = next(source).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                posterior = vae.encode(x).latent_dist
                y = vae.decode(posterior.sample()).sample.float()
            loss = (
                (x - y).abs().mean()
                + 0.7 * sharpness(x, y)
                + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
            )
            optimizer.descend(loss)
            error += 0.02 * ((x - y).abs().mean().item() - error)
            bar.update(task, advance=1, description=f"vae error {error:.4f}")
            if (step + 1) % 100 == 0 or step + 1 == steps:
                save(work / "vae.pt", state, step + 1)
                print(f"vae step {step + 1} l1 {error:.4f}", flush=True)
    return vae.eval()


def save(file: Path, state: dict[str, Any], step: int) -> None:
    """Write the states of model and optimizer to a file, atomically."""
    torch.save(
        {"step": step, **{k: v.state_dict() for k, v in state.items()}}, file.with_suffix(".tmp")
    )
    file.with_suffix(".tmp").rename(file)


def restore(file: Path, state: dict[str, Any]) -> int:
    """Load saved states; return the number of steps taken, 0 if there is no file."""
    if not file.exists():
        return 0
    saved = torch.load(file, weights_only=True)
    for name, holder in state.items():
        holder.load_state_dict(saved[name])
    return int(saved["step"])


def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """The mean latents of uint8 images."""
    x = (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
    mean: torch.Tensor = vae.encode(x).latent_dist.mean
    return mean.float()


@torch.no_grad()
def encode_latents(work: Path, vae: AutoencoderKL) -> dict[tuple[int, int], torch.Tensor]:
    """Encode all pictures: normalised latents (count, 16, h/8, w/8) by size.

    Sets the VAE's shift and scaling factor to the latents' mean and 1 ÷ standard deviation.
    """
    file = work / "latents.pt"
    if not file.exists():
        latents = {}
        with progress() as bar, torch.autocast("cpu", torch.bfloat16):
            for size in SIZES:
                batches = bar.track(
                    torch.split(pictures(work, size)[0], 16), description=f"encode {size}"
                )
                latents[size] = torch.cat([encode(vae, images) for images in batches])
        everything = torch.cat([x.flatten() for x in latents.values()])
        torch.save(
            {
                "latents": latents,
                "shift": everything.mean().item(),
                "scale": 1 / everything.std().item(),
            },
            file,
        )
    saved = torch.load(file, weights_only=True)
    vae.register_to_config(shift_factor=saved["shift"], scaling_factor=saved["scale"])
    return {size: (x - saved["shift"]) * saved["scale"] for size, x in saved["latents"].items()}


def new_clip(
    tokenizer: CLIPTokenizer, activation: str, width: int = 64
) -> CLIPTextModelWithProjection:
    """An untrained CLIP text encoder."""
    # All three ids must be the tokenizer's: with the default ids all prompts pool to one vector.
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=TEXT_LENGTH,
            projection_dim=width,
            hidden_act=activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Model(torch.nn.Module):
    """The text encoders and the transformer, which are trained jointly."""

    def __init__(self, captions: list[str]) -> None:
        super().__init__()
        self.tokenizers = [clip_tokenizer(captions, TEXT_LENGTH)] * 2 + [t5_tokenizer(captions)]
        self.clip_l = new_clip(self.tokenizers[0], "quick_gelu")
        self.clip_g = new_clip(self.tokenizers[1], "gelu")
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(self.tokenizers[2]), d_model=128, d_kv=32, d_ff=256, num_layers=2,
                num_heads=4, feed_forward_proj="gated-gelu", dropout_rate=0.0,
            )
        )  # fmt: skip
        self.transformer = SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=4,
            num_attention_heads=6, attention_head_dim=32, caption_projection_dim=192,
            joint_attention_dim=128, pooled_projection_dim=128, pos_embed_max_size=32,
            dual_attention_layers=(0,), qk_norm="rms_norm",
        )  # fmt: skip

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        """The token ids of texts: (3 encoders, texts, TEXT_LENGTH)."""
        return torch.stack([
            t(texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True,
              return_tensors="pt").input_ids
            for t in self.tokenizers
        ])  # fmt: skip

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The velocity that is predicted for noisy latents `x` at the noise levels `sigma`."""
        one = self.clip_l(ids[0], output_hidden_states=True)
        two = self.clip_g(ids[1], output_hidden_states=True)
        clips = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
        embeds = torch.cat([clips, self.t5(ids[2]).last_hidden_state], 1)
        pooled = torch.cat([one.text_embeds, two.text_embeds], -1)
        velocity: torch.Tensor
        (velocity,) = self.transformer(x, embeds, pooled, sigma * 1000, return_dict=False)
        return velocity


def train_model(
    work: Path,
    model: Model,
    latents: dict[tuple[int, int], torch.Tensor],
    ids: dict[tuple[int, int], torch.Tensor],
    steps: int,
    batch: int,
    rate: float = 2e-3,
) -> Model:
    """Train with the rectified-flow loss; return a model with the moving average of the weights."""
    averaged = copy.deepcopy(model)
    optimizer = Optimizer(model, rate, steps)
    state = {"model": model, "averaged": averaged, "optimizer": optimizer}
    first = restore(work / "model.pt", state)
    torch.manual_seed(200 + first)
    empty = model.tokenize([""])
    sizes, share = list(SIZES), torch.tensor([float(n) for n in SIZES.values()])
    recent = 0.0
    with progress() as bar:
        task = bar.add_task("model", total=steps, completed=first)
        for step in range(first, steps):
            size = sizes[int(torch.multinomial(share, 1))]
            chosen = torch.randint(len(latents[size]), (batch,))
            x, wording = latents[size][chosen], torch.randint(CAPTIONS_PER_PICTURE, (batch,))
            tokens = ids[size][:, chosen, wording].long()
            dropped = torch.rand(batch) < CAPTION_DROPOUT
            tokens = torch.where(dropped[None, :, None], empty, tokens)
            u = torch.randn(batch).sigmoid()
            sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
            noise, level = torch.randn_like(x), sigma[:, None, None, None]
            # On a CPU the backward pass of flash attention is slow; that of plain attention is not.
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                velocity = model((1 - level) * x + level * noise, sigma, tokens)
            loss = F.mse_loss(velocity.float(), noise - x)
            optimizer.descend(loss)
            with torch.no_grad():
                keep = min(0.999, (step + 1) / (step + 10))
                torch._foreach_lerp_(
                    list(averaged.parameters()), list(model.parameters()), 1 - keep
                )
            recent = loss.item() if step == first else recent + 0.01 * (loss.item() - recent)
            bar.update(task, advance=1, description=f"model loss {recent:.4f}")
            if (step + 1) % 250 == 0 or step + 1 == steps:
                save(work / "model.pt", state, step + 1)
                print(f"model step {step + 1} loss {recent:.4f}", flush=True)
    return averaged.eval()


def export(vae: AutoencoderKL, model: Model, folder: Path) -> None:
    """Export the pipeline in diffusers' folder layout.

    The text encoders stay in float32. transformers keeps the stored dtype when it loads them and
    diffusers converts to float32, so a folder that is 16-bit throughout would mix dtypes.
    """
    model, vae = copy.deepcopy(model), copy.deepcopy(vae)
    count = sum(p.numel() for part in (model, vae) for p in part.parameters())
    print(f"{count / 1e6:.1f} million parameters")
    StableDiffusion3Pipeline(
        tokenizer=model.tokenizers[0], text_encoder=model.clip_l,
        tokenizer_2=model.tokenizers[1], text_encoder_2=model.clip_g,
        tokenizer_3=model.tokenizers[2], text_encoder_3=model.t5,
        transformer=model.transformer.to(torch.bfloat16), vae=vae.to(torch.bfloat16),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    ).save_pretrained(folder)  # fmt: skip


def main(
    work: Path = Path(".demo-training"),
    out: Path = Path(__file__).parent / "model",
    vae_steps: int = 2600,
    vae_batch: int = 4,
    steps: int = 3900,
    batch: int = 32,
) -> None:
    """Run all stages; the intermediate files are kept in the folder `work`."""
    torch.set_flush_denormal(True)  # arithmetic on tiny activations is ten times slower without
    torch.manual_seed(0)
    work.mkdir(parents=True, exist_ok=True)
    captions = {size: pictures(work, size)[1] for size in SIZES}
    vae = train_vae(work, vae_steps, vae_batch)
    latents = encode_latents(work, vae)
    model = Model([text for several in captions.values() for texts in several for text in texts])
    ids = {
        size: torch.stack(
            [model.tokenize([texts[k] for texts in several]) for k in range(CAPTIONS_PER_PICTURE)],
            2,
        ).short()
        for size, several in captions.items()
    }
    averaged = train_model(work, model, latents, ids, steps, batch)
    export(vae, averaged, out)
    sheet.main(model=out)


if __name__ == "__main__":
    typer.run(main)
