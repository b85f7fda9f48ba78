"""The committed weights generate what is asked, in FP8, loaded as any SD3.5 model is."""

import time

import pytest
import torch

from demo.check import MODEL, generate, scene_prompts, shows, shuffled_share
from serve.engine.precision import RECIPES
from serve.engine.sd3 import Denoiser, PromptEncoder


@pytest.fixture(scope="module")
def operations(no_denormals: None) -> tuple[PromptEncoder, Denoiser]:
    return PromptEncoder(MODEL), Denoiser.load(MODEL, RECIPES["fp8"])


def test_eight_pictures_show_what_was_asked(operations: tuple[PromptEncoder, Denoiser]) -> None:
    """Every place and hour, two moons; `make demo-check` generates all 80."""
    asked = [scene_prompts()[i] for i in (0, 5, 10, 15, 32, 21, 26, 28)]
    pictures = [generate(*operations, prompt, seed=3) for prompt, _ in asked]
    scenes = [scene for _, scene in asked]
    wrong = [p for (p, s), picture in zip(asked, pictures, strict=True) if not shows(picture, s)]
    assert len(wrong) <= 1, wrong
    assert shuffled_share(pictures, scenes) < 0.1


def test_a_picture_takes_a_few_seconds_on_one_core(
    operations: tuple[PromptEncoder, Denoiser],
) -> None:
    """The limit is on process time and generous, because other tests share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        began = time.process_time()
        generate(*operations, "a city at night", seed=0)
        assert time.process_time() - began < 8
    finally:
        torch.set_num_threads(threads)
