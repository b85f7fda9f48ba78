"""Conversion of single-file checkpoints to a folder in diffusers' layout.

Stability publishes each SD3.5 model also as one safetensors file, with names of its own. Others
publish such files in FP8, with one scale for each tensor (`Comfy-Org/stable-diffusion-3.5-fp8`).
diffusers maps the names. Weights in FP8 are converted to bfloat16 here, so that `octet quantize`
can give each row its own scale.

A folder that is made here holds the transformer, the VAE and the scheduler. Text encoders in the
file are left out: name another source for these.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from filelock import FileLock
from safetensors import SafetensorError, safe_open

from cluster.structure import config

from ..models.checkpoints import (
    CheckpointError,
    download_file,
    node_folder,
    verify,
    write_manifest,
)
from ..models.verified import VerifiedFiles
from ..settings.models import Source
from .noise_schedule import SCHEDULER, TRAIN_STEPS

TRANSFORMER, VAE = "model.diffusion_model.", "first_stage_model."
SHIFT = 3.0  # of all SD3.5 models
# Names under which the scale of an FP8 tensor is stored beside it.
SCALES = "scale_weight", "weight_scale"
# Entries that hold no weights: marks of the format, and scales of activations.
NO_WEIGHTS = "scaled_fp8", "comfy_quant", "scale_input", "input_scale"
INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", SCHEDULER],
}

Tensors = dict[str, torch.Tensor]


def pull_single_file(source: Source, name: str, models_folder: str | None) -> Path:
    """Download a single-file checkpoint from the hub and convert it; returns the converted folder.

    The file itself is not kept. `name`: its path in the repository. An interrupted download
    continues where it ended. Raises `CheckpointError` if the file cannot be fetched, or is not an
    SD3.5 model, or if a folder that is there already has been damaged.
    """
    repository = node_folder(source, models_folder)
    short = name.removesuffix(".safetensors").replace("/", "--")
    out = repository.with_name(f"{repository.name}-{short}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock"):
        if not out.exists():
            download = out.with_name(f"{out.name}.download")
            file = download_file(source, name, download)
            try:
                convert(file, out)
            finally:
                shutil.rmtree(download)
    verify(out)
    return out


def convert(file: Path, out: Path) -> None:
    """Convert a single-file checkpoint into the new folder `out`, in bfloat16.

    Raises `CheckpointError` if `out` exists, or if the file is not an SD3.5 model.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists already: name a new folder")
    transformer, vae = read(file, TRANSFORMER), read(file, VAE)
    if not (transformer and vae):
        missing = "transformer" if vae else "VAE" if transformer else "transformer and no VAE"
        raise CheckpointError(f"{file} holds no {missing} of an SD3.5 model")
    try:
        models = {"transformer": load_transformer(transformer), "vae": load_vae(vae)}
    except (KeyError, RuntimeError) as error:  # a name or a size that the model does not have
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{file} is not an SD3.5 model: {reason}") from None
    part = out.with_name(f"{out.name}.part")
    for name, model in models.items():
        model.save_pretrained(part / name)
    scheduler = {"_class_name": SCHEDULER, "num_train_timesteps": TRAIN_STEPS, "shift": SHIFT}
    _write(part / "scheduler" / "scheduler_config.json", scheduler)
    _write(part / "model_index.json", INDEX)
    files = write_manifest(part, {"converted": file.name})
    part.rename(out)
    VerifiedFiles(out).remember(files)


def read(file: Path, prefix: str) -> Tensors:
    """The tensors of a file whose names begin with `prefix`, in bfloat16, without the prefix.

    FP8 tensors are multiplied by their scales. Raises `CheckpointError` if the file cannot be read.
    """
    found: Tensors = {}
    try:
        with safe_open(file, framework="pt") as stored:
            names = set(stored.keys())
            for name in sorted(name for name in names if name.startswith(prefix)):
                module, _, kind = name.rpartition(".")
                if kind in (*SCALES, *NO_WEIGHTS):
                    continue
                tensor = stored.get_tensor(name)
                scales = [f"{module}.{s}" for s in SCALES if f"{module}.{s}" in names]
                if scales and kind == "weight":
                    tensor = tensor.float() * stored.get_tensor(scales[0]).float()
                found[name.removeprefix(prefix)] = tensor.to(torch.bfloat16)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        reason = str(error).rpartition(": ")[2]  # behind the name of safetensors' own error
        raise CheckpointError(
            f"{file} is not a safetensors file, or was not downloaded whole: {reason}"
        ) from None
    return found


@torch.no_grad()
def load_transformer(tensors: Tensors) -> Any:
    """The transformer with these tensors, which have Stability's names.

    Raises `KeyError` or `RuntimeError` if they are not those of an SD3.5 transformer.
    """
    structure = transformer_config(tensors)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(tensors))
    return _loaded(SD3Transformer2DModel, structure, converted)


@torch.no_grad()
def load_vae(tensors: Tensors) -> Any:
    """The VAE with these tensors, which have Stability's names.

    Raises `KeyError` or `RuntimeError` if they are not those of SD3.5's VAE.
    """
    structure = config("vae")
    structure["block_out_channels"] = [
        tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0]
        for i in range(len(structure["down_block_types"]))
    ]
    return _loaded(AutoencoderKL, structure, convert_ldm_vae_checkpoint(tensors, structure))


def transformer_config(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The configuration of the transformer with these tensors, read from their names and shapes."""
    blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("joint_blocks.")}
    dual = sorted(i for i in blocks if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in tensors)
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    head_width = len(tensors["joint_blocks.0.x_block.attn.ln_q.weight"])
    return config("medium" if dual else "large") | {
        "num_layers": len(blocks),
        "dual_attention_layers": dual,
        "num_attention_heads": width // head_width,
        "attention_head_dim": head_width,
        "caption_projection_dim": width,
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": patch,
        "joint_attention_dim": tensors["context_embedder.weight"].shape[1],
        "pooled_projection_dim": tensors["y_embedder.mlp.0.weight"].shape[1],
        "pos_embed_max_size": math.isqrt(tensors["pos_embed"].shape[1]),
    }


def _loaded(kind: Any, structure: Mapping[str, Any], tensors: Tensors) -> Any:
    with torch.device("meta"):
        model = kind.from_config(structure)
    model.load_state_dict(tensors, assign=True)
    return model


def _write(file: Path, data: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, indent=2), encoding="utf-8")
