"""Writing of FP8 checkpoints, which are later loaded without the 16-bit weights.

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
from safetensors.torch import save_file
from transformers import T5EncoderModel

from ..models.checkpoints import EXAMPLE_PROMPTS, CheckpointError, size_bytes, write_manifest
from .denoiser import load_transformer
from .fp8_format import METHODS, QUANTO_MAP, T5, TRANSFORMER, WEIGHTS, is_fp8
from .precision import RECIPES, Recipe, store_in_fp8


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
    if (folder / EXAMPLE_PROMPTS).is_file():
        shutil.copy(folder / EXAMPLE_PROMPTS, part)
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


def _quantize_t5(folder: Path, out: Path) -> None:
    from optimum.quanto import quantization_map

    t5 = T5EncoderModel.from_pretrained(
        folder / T5, use_safetensors=True, dtype=torch.bfloat16
    ).eval()
    store_in_fp8(t5, "quanto")
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
