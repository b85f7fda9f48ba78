"""Single-file checkpoints: read under Stability's names, in 16 bit and in scaled FP8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from typer.testing import CliRunner

from serve.cli.main import app
from serve.engine.denoiser import Denoiser
from serve.engine.precision import E4M3, RECIPES
from serve.engine.prompt_embeds import PromptEmbeds
from serve.engine.single_file import convert
from serve.models.checkpoints import CheckpointError, verify

from .stability import saved, stabilitys_model, tiny_models


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return tiny_models()


@pytest.fixture
def tensors(models: tuple[Any, Any]) -> dict[str, torch.Tensor]:
    return stabilitys_model(models)


def test_a_single_file_becomes_the_same_model(
    tensors: dict[str, torch.Tensor], models: tuple[Any, Any], tmp_path: Path
) -> None:
    file, out = saved(tensors, tmp_path), tmp_path / "out"
    result = CliRunner().invoke(app, ["convert", str(file), str(out)])
    assert result.exit_code == 0, result.output
    verify(out)
    denoiser = Denoiser.load(out, RECIPES["bf16"])
    oracle_config = tmp_path / "oracle"
    models[0].save_config(oracle_config)
    oracle = SD3Transformer2DModel.from_single_file(
        str(file), config=str(oracle_config), torch_dtype=torch.bfloat16
    ).state_dict()
    converted = SD3Transformer2DModel.from_pretrained(out / "transformer").state_dict()
    for expected in (models[0].state_dict(), oracle):
        assert converted.keys() == expected.keys()
        assert all(torch.equal(t.bfloat16(), expected[n].bfloat16()) for n, t in converted.items())
    own = AutoencoderKL.from_pretrained(out / "vae").state_dict()
    assert all(
        torch.equal(t.bfloat16(), own[n].bfloat16()) for n, t in models[1].state_dict().items()
    )
    embeds = PromptEmbeds(torch.randn(2, 20, 64), torch.randn(2, 64))
    image = denoiser.begin(
        embeds, width=64, height=64, num_inference_steps=1, guidance_scale=2.0, seed=0
    )
    denoiser.denoise_step([image])
    assert denoiser.decode(image.latents).isfinite().all()
    assert denoiser.shift == 3.0


@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
def test_scaled_fp8_is_converted_with_its_scales(
    tensors: dict[str, torch.Tensor], models: tuple[Any, Any], tmp_path: Path, scale_name: str
) -> None:
    """Each tensor has its own scale; without it the weights would be a thousand times too large."""
    prefix = "model.diffusion_model."
    stored: dict[str, torch.Tensor] = {f"{prefix}scaled_fp8": torch.empty(2).to(E4M3)}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if name.startswith(f"{prefix}joint") and kind == "weight" and tensor.dim() == 2:
            scale = tensor.abs().amax().float() / 448
            stored[name] = (tensor.float() / scale).to(E4M3)
            stored[f"{module}.{scale_name}"] = scale
        else:
            stored[name] = tensor
    convert(saved(stored, tmp_path), tmp_path / "out")
    found = SD3Transformer2DModel.from_pretrained(tmp_path / "out" / "transformer").state_dict()
    errors = []
    for name, exact in models[0].state_dict().items():
        noise = (found[name].float() - exact.float()).square().mean()
        errors.append((noise / exact.float().square().mean()).sqrt().item())
    assert 0.01 < max(errors) < 0.05


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.weight", "fc1.weight"),
        ("first_stage_model.", "holds no VAE"),
        ("model.diffusion_model.", "holds no transformer"),
    ],
)
def test_an_incomplete_file_is_refused(
    tensors: dict[str, torch.Tensor], tmp_path: Path, lost: str, message: str
) -> None:
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(lost)}
    with pytest.raises(CheckpointError, match=message):
        convert(saved(kept, tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert(file, tmp_path / "out")
    file.write_text(json.dumps({"no": "tensors"}))
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        convert(file, tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        convert(file, tmp_path / "there")
