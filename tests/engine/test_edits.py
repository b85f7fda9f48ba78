"""Tests that edits give the results of diffusers' image-to-image and inpainting pipelines.

Others test Octet's own rules for masks, sizes and costs. Inpainting's decode in diffusers forgets
the shift of the latents, so latents are compared.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from cluster.cost import ENCODE_COST
from serve.edit_pixels import EditPixels
from serve.engine.denoiser import Denoiser, DenoisingState
from serve.engine.precision import RECIPES
from serve.engine.prompt_encoder import PromptEncoder
from serve.request import Edit, ImageRequest

from ..builders import DEMO_MODEL, image_request

TEXT_LENGTH = 32
PROMPT = "night over the mountains"
pytestmark = pytest.mark.usefixtures("no_denormals")


def picture(width: int, height: int) -> NDArray[np.uint8]:
    """A picture of soft colours with a hard edge, so that no two places are alike."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    colours = np.stack([x, y, (x > 0.4) * 0.8], axis=-1)
    return (255 * colours).round().astype(np.uint8)


def right_half_repainted(width: int, height: int) -> NDArray[np.uint8]:
    """The alpha of a mask that keeps the left half, whole latents wide."""
    kept = np.full((height, width), 255, np.uint8)
    kept[:, width // 16 * 8 :] = 0
    return kept


class Editor:
    """The demo model in float32, by Octet and by diffusers' two pipelines."""

    def __init__(self) -> None:
        self.encoder = PromptEncoder(DEMO_MODEL)
        self.denoiser = Denoiser.load(DEMO_MODEL, RECIPES["fp32"])
        self.img2img = StableDiffusion3Img2ImgPipeline.from_pretrained(DEMO_MODEL)
        self.inpaint = StableDiffusion3InpaintPipeline(**self.img2img.components)
        for pipeline in (self.img2img, self.inpaint):
            pipeline.set_progress_bar_config(disable=True)

    def begin(self, request: ImageRequest, pixels: EditPixels | None = None) -> DenoisingState:
        prompts = ["", request.prompt] if request.guided else [request.prompt]
        embeds = self.encoder.encode_prompts(prompts, TEXT_LENGTH)
        encoded = self.denoiser.encode(pixels, request.seed) if pixels else None
        return self.denoiser.begin_request(request, embeds, encoded)

    def latents(self, request: ImageRequest, pixels: EditPixels) -> torch.Tensor:
        image = self.begin(request, pixels)
        while not image.finished:
            self.denoiser.denoise_step([image])
        return image.latents

    def by_diffusers(self, request: ImageRequest, pixels: EditPixels) -> torch.Tensor:
        given: dict[str, Any] = {"image": Image.fromarray(pixels.image)}
        pipeline = self.img2img
        if pixels.kept is not None:
            pipeline = self.inpaint
            given["mask_image"] = Image.fromarray(255 - pixels.kept)
        assert request.edit
        latents: torch.Tensor = pipeline(
            request.prompt,
            negative_prompt="",
            width=request.width,
            height=request.height,
            strength=request.edit.strength,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            max_sequence_length=TEXT_LENGTH,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="latent",
            **given,
        ).images
        return latents


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor()


def edit(strength: float = 0.6, **changes: Any) -> ImageRequest:
    """An edit in four steps."""
    own = Edit(strength=strength, image_sha256="")
    changes = {"prompt": PROMPT, "width": 128, "height": 128, "edit": own, **changes}
    return image_request(**changes)


STRENGTHS, STEPS, GUIDANCE = (0.3, 0.6, 1.0), (4, 14), (1.0, 4.0)
SIZES = (128, 128), (192, 128), (64, 192)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("strength", "size", "steps", "guidance"),
    [
        # Every strength with every number of steps and both guidances, each size in its turn.
        (strength, SIZES[i % 3], steps, guidance)
        for i, (steps, guidance, strength) in enumerate(product(STEPS, GUIDANCE, STRENGTHS))
    ],
)
def test_an_edit_is_that_of_the_pipeline(
    editor: Editor,
    strength: float,
    size: tuple[int, int],
    steps: int,
    guidance: float,
    masked: bool,
) -> None:
    width, height = size
    request = edit(
        strength, width=width, height=height, num_inference_steps=steps, guidance_scale=guidance
    )
    pixels = EditPixels(picture(*size), right_half_repainted(*size) if masked else None)
    found, expected = editor.latents(request, pixels), editor.by_diffusers(request, pixels)
    assert found.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_generations_edits_and_masked_edits_share_a_batch_and_are_each_as_if_alone(
    editor: Editor,
) -> None:
    image, kept = picture(128, 128), right_half_repainted(128, 128)
    asked: list[tuple[ImageRequest, EditPixels | None]] = [
        (edit(0.5, num_inference_steps=6), EditPixels(image)),
        (edit(1.0, seed=1, guidance_scale=1.0), EditPixels(image, kept)),
        (edit(0.7, seed=2, num_inference_steps=5), EditPixels(image, kept)),
        (image_request(prompt=PROMPT, width=128, height=128, seed=3), None),
    ]
    images = [editor.begin(*one) for one in asked]
    editor.denoiser.denoise_step(images[:1])  # so that they are at different steps
    while unfinished := [image for image in images if not image.finished]:
        editor.denoiser.denoise_step(unfinished)
    for together, one in zip(images, asked, strict=True):
        alone = editor.begin(*one)
        while not alone.finished:
            editor.denoiser.denoise_step([alone])
        torch.testing.assert_close(together.latents, alone.latents, atol=1e-4, rtol=0)


def test_a_mask_keeps_latents_in_each_step_and_in_each_preview(editor: Editor) -> None:
    pixels = EditPixels(picture(128, 128), right_half_repainted(128, 128))
    image = editor.begin(edit(), pixels)
    assert image.edit
    half = image.latents.shape[-1] // 2
    while not image.finished:
        editor.denoiser.denoise_step([image])
        level = image.schedule.levels[image.step]
        kept = image.edit.at(level)[..., :half]
        assert torch.equal(image.latents[..., :half], kept)
        assert torch.equal(image.estimate[..., :half], image.edit.image[..., :half])
        assert (image.estimate - image.edit.image)[..., half:].abs().mean() > 0.05
    assert torch.equal(image.latents[..., :half], image.edit.image[..., :half])


def test_any_pixel_that_may_change_opens_its_latent(editor: Editor) -> None:
    """A thin line, which diffusers loses, and single pixels on both sides of half transparency."""
    kept = np.full((75, 100), 255, np.uint8)
    kept[:, 41:44] = 0
    kept[9, 80], kept[17, 80] = 127, 129
    found = editor.denoiser.encode(EditPixels(picture(100, 75), kept), seed=0).repainted
    assert found is not None
    assert found.shape == (1, 1, 10, 14)  # of the canvas
    expected = torch.zeros(10, 14)
    expected[:, 5], expected[1, 10] = 1, 1
    assert torch.equal(found[0, 0], expected)


def test_a_picture_of_another_size_is_repeated_at_its_edges(editor: Editor) -> None:
    """The latents of a canvas are those of the picture that somebody has padded by hand."""
    small = picture(100, 75)
    padded = np.pad(small, ((0, 5), (0, 12), (0, 0)), mode="edge")
    found, expected = (
        editor.denoiser.encode(EditPixels(image), seed=3) for image in (small, padded)
    )
    assert torch.equal(found.image, expected.image)
    assert torch.equal(found.noise, expected.noise)


def test_finished_pixels_are_cropped_and_mixed_by_the_mask() -> None:
    old, new = np.full((3, 2, 3), 200, np.uint8), np.full((16, 16, 3), 51, np.uint8)
    assert EditPixels(old).finished(new).shape == (3, 2, 3)
    kept = np.array([[255, 0], [128, 1], [254, 255]], np.uint8)
    found = EditPixels(old, kept).finished(new)
    assert found[..., 0].tolist() == [[200, 51], [126, 52], [199, 200]]


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_every_precision_begins_with_the_same_picture(editor: Editor, recipe: str) -> None:
    pixels = EditPixels(picture(128, 64))
    found = Denoiser.load(DEMO_MODEL, RECIPES[recipe]).encode(pixels, seed=5)
    expected = editor.denoiser.encode(pixels, seed=5)
    assert torch.equal(found.noise, expected.noise)
    assert (found.image - expected.image).abs().mean() < 0.02 * expected.image.std()


def test_encoding_costs_the_stated_part_of_decoding() -> None:
    """Operations are counted in SD3.5's VAE without its weights."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        calls = {
            vae.encode: torch.zeros(1, 3, 1024, 1024),
            vae.decode: torch.zeros(1, 16, 128, 128),
        }
        flops = []
        for call, given in calls.items():
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                call(given)
            flops.append(counter.get_total_flops())
    assert flops[0] / flops[1] == pytest.approx(ENCODE_COST, abs=0.01)
    assert [round(f / 1e12, 2) for f in flops] == [4.88, 10.47]
