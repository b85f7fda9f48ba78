"""Tests that the committed demo model in FP8 generates what its prompts ask for.

The model is loaded like any SD3.5 model.
"""

import time

import pytest
import torch

from demo.check import MODEL, generate, scene_prompts, shows, shuffled_share
from serve.engine.denoiser import Denoiser
from serve.engine.precision import RECIPES
from serve.engine.prompt_encoder import PromptEncoder


@pytest.fixture(scope="module")
def operations(no_denormals: None) -> tuple[PromptEncoder, Denoiser]:
    return PromptEncoder(MODEL), Denoiser.load(MODEL, RECIPES["fp8"])


def test_eight_pictures_show_what_was_asked(operations: tuple[PromptEncoder, Denoiser]) -> None:
    """The eight prompts cover every place, every hour and two moons.

    `make demo-check` generates all 80 images.
    """
    asked = [scene_prompts()[i] for i in (0, 5, 10, 15, 32, 21, 26, 28)]
    pictures = [generate(*operations, prompt, seed=3) for prompt, _ in asked]
    scenes = [scene for _, scene in asked]
    wrong = [p for (p, s), picture in zip(asked, pictures, strict=True) if not shows(picture, s)]
    assert len(wrong) <= 1, wrong
    assert shuffled_share(pictures, scenes) < 0.1


def test_a_picture_takes_a_few_seconds_on_one_core(
    operations: tuple[PromptEncoder, Denoiser],
) -> None:
    """The limit counts process time and is generous, because other tests share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        began = time.process_time()
        generate(*operations, "a city at night", seed=0)
        assert time.process_time() - began < 8
    finally:
        torch.set_num_threads(threads)
