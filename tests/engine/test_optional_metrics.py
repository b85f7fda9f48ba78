"""Metrics that need other packages or weights: measured where they are there, and named if not."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from serve.quality.metrics import Pixels
from serve.quality.optional_metrics import CLIP_MEAN, CLIP_STD, OptionalMetrics

from ..builders import DEMO_MODEL

SIDE_PX = 32
SPECIAL = "bos", "eos", "pad"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model with random weights, as transformers saves one."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(DEMO_MODEL / "tokenizer")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    vision = {**small, "image_size": SIDE_PX, "patch_size": 8}
    torch.manual_seed(2)  # with which the scores are above 0
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def picture(seed: int, width: int = SIDE_PX, height: int = SIDE_PX) -> Pixels:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width, 3), np.uint8)


def test_the_clip_score_is_the_cosine_of_both_embeddings(clip: Path) -> None:
    """Computed here from the parts of the model, for a picture that needs no scaling."""
    found = OptionalMetrics(clip).measured("the sea at dawn", picture(0), picture(1))
    model = CLIPModel.from_pretrained(clip).eval()
    tokens = CLIPTokenizer.from_pretrained(clip)(
        ["the sea at dawn"], padding="max_length", return_tensors="pt"
    )
    for name, seed in (("clip_score_reference", 0), ("clip_score_tested", 1)):
        pixels = (torch.tensor(picture(seed)) / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(
            CLIP_STD
        )
        with torch.inference_mode():
            text = model.text_projection(model.text_model(**tokens).pooler_output)[0]
            seen = model.vision_model(pixels.permute(2, 0, 1)[None].float()).pooler_output
            image = model.visual_projection(seen)[0]
        cosine = float(torch.dot(text, image) / text.norm() / image.norm())
        assert found[name] == pytest.approx(max(100 * cosine, 0.0), abs=1e-3)
    assert found["clip_score_reference"] != found["clip_score_tested"]


def test_other_shapes_are_cut_to_their_middle(clip: Path) -> None:
    wide = np.zeros((SIDE_PX, 3 * SIDE_PX, 3), np.uint8)
    wide[:, SIDE_PX : 2 * SIDE_PX] = picture(0)
    found = OptionalMetrics(clip).measured("the sea", wide, picture(0))
    assert found["clip_score_reference"] == found["clip_score_tested"]


def test_absent_metrics_are_named_with_the_reason(tmp_path: Path) -> None:
    metrics = OptionalMetrics(tmp_path / "nowhere")
    assert "nowhere" in metrics.absent["clip_score"]
    assert OptionalMetrics().absent["clip_score"] == "no CLIP model is given: --clip FOLDER"
    if find_spec("lpips") is None:
        assert metrics.absent["lpips"] == "the package lpips is not installed"
    assert metrics.measured("x", picture(0), picture(1)).keys() <= {"lpips"}
