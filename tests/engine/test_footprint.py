"""Tests that `cluster.footprint` agrees with the real models, built on torch's meta device."""

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from bench import memory_model
from cluster import footprint
from cluster.footprint import GIB
from cluster.structure import TRANSFORMERS, Structure, config, structure
from serve.engine.precision import RECIPES, apply_recipe

from ..builders import DEMO_MODEL

MODELS = "sd3.5-large", "sd3.5-medium"


def nbytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("recipe", footprint.RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_weights_are_counted_to_the_byte(model: str, recipe: str) -> None:
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(config(TRANSFORMERS[model]))
        apply_recipe(transformer, RECIPES[recipe])
    assert footprint.transformer_bytes(structure(model), recipe) == nbytes(transformer)


def test_the_demo_models_weights_are_counted_to_the_byte_too() -> None:
    transformer = SD3Transformer2DModel.from_pretrained(DEMO_MODEL / "transformer")
    apply_recipe(transformer, RECIPES["fp8"])
    counted = footprint.transformer_bytes(Structure.of(transformer.config), "fp8")
    assert counted == nbytes(transformer)


def test_parameters_of_the_parts_that_models_share_are_exact() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config("vae"))
        clips = [
            CLIPTextModelWithProjection(CLIPTextConfig(**config(c))) for c in ("clip_l", "clip_g")
        ]
        t5 = T5EncoderModel(T5Config(**config("t5_xxl")))
    assert parameters(vae) == footprint.VAE_PARAMETERS
    assert sum(map(parameters, clips)) == footprint.CLIP_PARAMETERS
    assert parameters(t5) == footprint.T5_PARAMETERS
    linears = [m.weight.numel() for m in t5.modules() if isinstance(m, torch.nn.Linear)]
    assert sum(linears) == footprint.T5_LINEAR_PARAMETERS


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("rows", "side", "text"), [(1, 512, 333), (2, 1024, 333), (8, 512, 154)])
def test_the_formula_of_a_steps_peak_memory_is_within_2_percent(
    model: str, recipe: str, rows: int, side: int, text: int
) -> None:
    followed = memory_model.step_bytes(model, recipe, rows, side, side, text)
    by_formula = footprint.step_bytes(structure(model), recipe, rows, side * side, text)
    assert by_formula == pytest.approx(followed, rel=0.02)


@pytest.mark.parametrize("side", [512, 1024])
def test_the_formula_of_a_decodes_peak_memory_is_within_2_percent(side: int) -> None:
    followed = memory_model.decode_bytes(side, side)
    assert followed == pytest.approx(footprint.DECODE_BYTES_PER_PX * side * side, rel=0.02)


def test_encoding_a_picture_takes_less_memory_than_decoding_an_image() -> None:
    """Both happen in one thread, one after the other, so edits need no further memory."""
    assert memory_model.picture_bytes(1024, 1024) < memory_model.decode_bytes(1024, 1024)


def test_the_text_encoders_peak_memory_is_below_the_allowance() -> None:
    one_layer_of_t5 = 2 * 4096 * 10240
    followed = memory_model.encode_bytes(4, 256) + one_layer_of_t5
    assert followed / GIB < footprint.ENCODER_PEAK_GIB


def test_living_bytes_no_longer_count_freed_tensors() -> None:
    with memory_model.LivingBytes() as living:
        for _ in range(3):
            x = torch.zeros(256)
            y = (x + 1).view(2, 128)  # a view has no storage of its own
            del x, y
    assert living.peak == 2 * 256 * 4
    assert living.living == 0
