"""FP8 checkpoints: quantised once by `octet quantize`, loaded without the 16-bit weights.

Two components are quantised and written as plain safetensors. The transformer has `Fp8Linear`
layers, and its q, k and v layers are joined. T5 is in quanto's format. All other components are
copied, so the folder is complete.

The configurations of the two components name a quantisation method that diffusers and transformers
do not know. So these libraries refuse the folder; otherwise they would generate noise. On a CPU the
weights are mapped from the file into memory, and the processes of a node share them.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, T5EncoderModel
from transformers.utils import logging

from ..models.checkpoints import CheckpointError, size_bytes, write_manifest
from .fused_attention import fuse_qkv
from .precision import E4M3, RECIPES, Recipe, apply_recipe, store_in_fp8

logging.disable_progress_bar()  # a progress bar would fill every replica's log

TRANSFORMER, T5 = "transformer", "text_encoder_3"
METHODS = {TRANSFORMER: "octet-fp8-rowwise-fused", T5: "octet-quanto-fp8"}
WEIGHTS = "fp8.safetensors"
QUANTO_MAP = "quanto_map.json"


def is_fp8(folder: Path, component: str) -> bool:
    """Return whether a component of a checkpoint holds FP8 weights that `quantize` has written."""
    config = json.loads((folder / component / "config.json").read_text(encoding="utf-8"))
    method = config.get("quantization_config", {}).get("quant_method")
    return bool(method == METHODS[component])


def quantize(folder: Path, out: Path, recipe: Recipe = RECIPES["fp8"]) -> None:
    """Quantise a 16-bit checkpoint into the new folder `out`.

    This needs enough memory for the 16-bit transformer, or for T5 if T5 is larger. Raises
    `CheckpointError` if `out` exists, if `folder` holds no model, or if it is an FP8 checkpoint.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists already: name a new folder")
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder}: no model here (no model_index.json)")
    if is_fp8(folder, TRANSFORMER):
        raise CheckpointError(f"{folder} is an FP8 checkpoint already")
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    has_t5 = (folder / T5).is_dir()
    done = {TRANSFORMER, *([T5] if has_t5 else [])}
    for path in folder.iterdir():
        if path.is_dir() and path.name not in done:
            shutil.copytree(path, part / path.name)
    shutil.copy(folder / "model_index.json", part)
    transformer = load_transformer(folder, recipe, "cpu")
    _save(transformer, TRANSFORMER, folder, part, {"recipe": recipe.name})
    if has_t5:
        _quantize_t5(folder, part)
    write_manifest(part, {"location": str(folder), "quantized": sorted(done)})
    part.rename(out)


def compare(folder: Path, out: Path, recipe: Recipe = RECIPES["fp8"]) -> list[tuple[str, str, str]]:
    """Compare a 16-bit checkpoint with its FP8 checkpoint `out`.

    Returns rows for a table: what is compared, the 16-bit checkpoint's value, the FP8 checkpoint's
    value. Compared are the sizes on disk, and how long an FP8 transformer takes to load from each.
    The load times are those with the files in the page cache.
    """

    def size(source: Path, part: str) -> str:
        return f"{size_bytes(source, part) / 2**20:.1f} MiB"

    def load_time(source: Path) -> str:
        began = time.perf_counter()
        load_transformer(source, recipe, "cpu")
        return f"{time.perf_counter() - began:.2f} s"

    parts = [part for part in METHODS if (out / part).is_dir()]
    return [
        *((part, size(folder, part), size(out, part)) for part in parts),
        ("whole folder", size(folder, ""), size(out, "")),
        ("transformer loads in", load_time(folder), load_time(out)),
    ]


def load_transformer(folder: Path, recipe: Recipe, device: str) -> Any:
    """Load the FP8 transformer onto a device.

    From an FP8 checkpoint the weights are loaded without 16-bit copies. A 16-bit checkpoint is
    quantised while it is loaded. If an FP8 checkpoint holds AdaLN in 16 bit but the recipe stores
    AdaLN in 8 bit, AdaLN is converted. Raises `CheckpointError` if the checkpoint holds AdaLN in
    8 bit but the recipe does not.
    """
    if not is_fp8(folder, TRANSFORMER):
        transformer = SD3Transformer2DModel.from_pretrained(
            folder / TRANSFORMER, use_safetensors=True, torch_dtype=torch.bfloat16
        )
        return fuse_qkv(apply_recipe(transformer, recipe, device)).eval()
    config = SD3Transformer2DModel.load_config(folder / TRANSFORMER)
    stored = RECIPES[config.pop("quantization_config").get("recipe", "fp8")]
    if stored.adaln_8_bit and not recipe.adaln_8_bit:
        raise CheckpointError(
            f"{folder} holds AdaLN in 8 bit: set adaln_8_bit: true, or use the 16-bit checkpoint"
        )
    with torch.device("meta"):
        transformer = fuse_qkv(apply_recipe(SD3Transformer2DModel.from_config(config), stored))
    weights = load_file(folder / TRANSFORMER / WEIGHTS, device=device)
    transformer.load_state_dict(weights, assign=True)
    return apply_recipe(transformer, recipe).eval()


def load_t5(folder: Path, dtype: torch.dtype) -> Any:
    """Load T5 from an FP8 checkpoint onto the CPU; T5 computes in `dtype`."""
    from optimum.quanto import requantize

    config = AutoConfig.from_pretrained(folder / T5)
    del config.quantization_config
    with torch.device("meta"):
        t5 = T5EncoderModel(config).to(dtype).eval()
    names = json.loads((folder / T5 / QUANTO_MAP).read_text(encoding="utf-8"))
    stored = load_file(folder / T5 / WEIGHTS)
    weights = {name: w if w.dtype is E4M3 else w.to(dtype) for name, w in stored.items()}
    requantize(t5, weights, names, device=torch.device("cpu"))
    t5.encoder.set_input_embeddings(t5.shared)
    return t5


def _quantize_t5(folder: Path, out: Path) -> None:
    from optimum.quanto import quantization_map

    t5 = T5EncoderModel.from_pretrained(
        folder / T5, use_safetensors=True, dtype=torch.bfloat16
    ).eval()
    store_in_fp8(t5)
    _save(t5, T5, folder, out, {})
    (out / T5 / QUANTO_MAP).write_text(json.dumps(quantization_map(t5)), encoding="utf-8")


def _save(model: Any, component: str, folder: Path, out: Path, details: dict[str, str]) -> None:
    """Write a component's weights and configuration into the folder `out`.

    The configuration is that of `folder`, with the quantisation's method and `details` added.
    """
    config = json.loads((folder / component / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": METHODS[component], **details}
    (out / component).mkdir()
    (out / component / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    state.pop("encoder.embed_tokens.weight", None)  # a second name of T5's `shared.weight`
    save_file(state, out / component / WEIGHTS)
    (out / component / WEIGHTS).chmod(0o644)  # safetensors lets only its own user read the file
