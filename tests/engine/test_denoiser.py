"""Tests that Octet's operations and diffusers' pipeline generate the same picture for a seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from serve.engine.denoiser import Denoiser, DenoisingState
from serve.engine.precision import RECIPES
from serve.engine.prompt_encoder import PromptEncoder

from ..builders import DEMO_MODEL

TEXT_LENGTH = 32
pytestmark = pytest.mark.usefixtures("no_denormals")


class Both:
    """One model in float32 on the CPU, loaded by Octet and by diffusers.

    `absent`: components that the model does not have, each as None.
    """

    def __init__(self, folder: Path, **absent: None) -> None:
        self.encoder, self.denoiser = PromptEncoder(folder), Denoiser.load(folder, RECIPES["fp32"])
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
        self.pipeline.set_progress_bar_config(disable=True)

    def begin(self, prompt: str, negative: str = "", **options: Any) -> DenoisingState:
        guided = options["guidance_scale"] > 1
        prompts = [negative, prompt] if guided else [prompt]
        return self.denoiser.begin(self.encoder.encode_prompts(prompts, TEXT_LENGTH), **options)

    def by_octet(self, *prompts: str, **options: Any) -> torch.Tensor:
        image = self.begin(*prompts, **options)
        while not image.finished:
            self.denoiser.denoise_step([image])
        return self.denoiser.decode(image.latents).clamp(0, 1)

    def by_diffusers(self, prompt: str, negative: str = "", **options: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(options.pop("seed"))
        pictures: torch.Tensor = self.pipeline(
            prompt,
            negative_prompt=negative,
            max_sequence_length=TEXT_LENGTH,
            generator=generator,
            output_type="pt",
            **options,
        ).images
        return pictures


def options(
    width: int = 128, height: int = 128, steps: int = 28, guidance: float = 3.0, seed: int = 7
) -> dict[str, Any]:
    return {
        "width": width,
        "height": height,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "seed": seed,
    }


@pytest.fixture(scope="module")
def demo() -> Both:
    return Both(DEMO_MODEL)


@pytest.fixture(scope="module", params=["large-like", "without T5"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """A random model of another structure: like SD3.5 Large (no dual attention) or without T5."""
    from demo.train import Model, new_vae

    torch.manual_seed(0)
    model, folder = Model(["a city at night", "the sea"]), tmp_path_factory.mktemp("tiny")
    if request.param == "large-like":  # no dual attention
        config = {**model.transformer.config, "dual_attention_layers": (), "num_layers": 2}
        model.transformer = type(model.transformer).from_config(config)
    with_t5 = request.param != "without T5"
    StableDiffusion3Pipeline(
        tokenizer=model.tokenizers[0],
        text_encoder=model.clip_l,
        tokenizer_2=model.tokenizers[1],
        text_encoder_2=model.clip_g,
        tokenizer_3=model.tokenizers[2] if with_t5 else None,
        text_encoder_3=model.t5 if with_t5 else None,
        transformer=model.transformer,
        vae=new_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
    ).save_pretrained(folder)
    return Both(folder, **({} if with_t5 else {"text_encoder_3": None, "tokenizer_3": None}))


CASES: Sequence[tuple[list[str], dict[str, Any]]] = [
    (["the sea at dawn"], options()),
    (["the sea at dawn"], options(guidance=1.0)),
    (["a city at night", "fog, clouds"], options(guidance=5.0, steps=6)),
    (["a city at night"], options(width=192, height=128, steps=6)),
    (["a city at night"], options(width=64, height=192, steps=6, guidance=1.0)),
    (["夜 🌕"], options(steps=1)),
    (["a city at night"], options(steps=1, guidance=0.0)),
]


@pytest.mark.parametrize(("prompts", "settings"), CASES)
def test_octet_generates_the_same_picture_as_the_pipeline(
    demo: Both, prompts: list[str], settings: dict[str, Any]
) -> None:
    found, expected = demo.by_octet(*prompts, **settings), demo.by_diffusers(*prompts, **settings)
    assert found.shape == (1, 3, settings["height"], settings["width"])
    assert found.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_other_structures_generate_the_pipelines_picture_too(tiny: Both) -> None:
    settings = options(steps=4)
    found = tiny.by_octet("a city at night", "sea", **settings)
    expected = tiny.by_diffusers("a city at night", "sea", **settings)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_prompts_seed_and_guidance_change_the_picture(demo: Both) -> None:
    base = demo.by_octet("the sea at dawn", **options(steps=4))
    others = [
        demo.by_octet("a city at night", **options(steps=4)),
        demo.by_octet("the sea at dawn", "pink", **options(steps=4)),
        demo.by_octet("the sea at dawn", **options(steps=4, seed=8)),
        demo.by_octet("the sea at dawn", **options(steps=4, guidance=1.0)),
    ]
    for other in others:
        assert (base - other).abs().max() > 1e-2


def test_images_at_different_steps_share_a_batch(demo: Both) -> None:
    """The images differ in steps and guidance, and two of them join later; each is as if alone."""
    asked = [
        ("the sea at dawn", options(steps=6)),
        ("a city at night", options(steps=4, guidance=1.0, seed=1)),
        ("green hills", options(steps=3, guidance=6.0, seed=2)),
    ]
    images = [demo.begin(prompt, **settings) for prompt, settings in asked]
    demo.denoiser.denoise_step(images[:1])
    while any(not image.finished for image in images):
        demo.denoiser.denoise_step([image for image in images if not image.finished])
    for image, (prompt, settings) in zip(images, asked, strict=True):
        alone = demo.begin(prompt, **settings)
        while not alone.finished:
            demo.denoiser.denoise_step([alone])
        torch.testing.assert_close(image.latents, alone.latents, atol=1e-4, rtol=0)


def test_unknown_words_and_scripts_have_different_embeddings(demo: Both) -> None:
    prompts = ["zebra", "xylophone", "夜", "海", "🌕", "🌊", ""]
    embeds = demo.encoder.encode_prompts(prompts, TEXT_LENGTH)
    distances = torch.cdist(embeds.pooled, embeds.pooled) + torch.eye(len(prompts)) * 1e9
    assert distances.min() > 1e-3


def test_a_word_after_unknown_words_still_changes_the_embedding(demo: Both) -> None:
    one, other = demo.encoder.encode_prompts(
        ["qwzx 夜 sunset", "qwzx 夜 night"], TEXT_LENGTH
    ).pooled
    assert (one - other).norm() > 0.1


def test_the_demo_model_has_at_most_20_mb_of_json_and_safetensors() -> None:
    files = [file for file in DEMO_MODEL.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 20e6
    assert {file.suffix for file in files} <= {".json", ".safetensors"}
