from __future__ import annotations

from pathlib import Path

import pytest

from demo.check import scene_prompts
from serve.models.example_prompts import SHOWN, example_prompts
from serve.settings.application import Settings
from serve.settings.models import Source


def test_the_demos_examples_are_prompts_whose_images_its_check_knows(laptop: Settings) -> None:
    found = example_prompts(laptop.models[0], None)
    assert len(found) > 4
    assert set(found) <= {prompt for prompt, _ in scene_prompts()}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (None, 0),
        ("{", 0),
        ('{"a": 1}', 0),
        ("[1]", 0),
        ('["a", "b"]', 2),
        ('["a"' + ', "b"' * 99 + "]", SHOWN),
    ],
)
def test_a_file_that_is_no_list_of_prompts_is_ignored(
    laptop: Settings, tmp_path: Path, text: str | None, count: int
) -> None:
    if text is not None:
        (tmp_path / "example_prompts.json").write_text(text)
    model = laptop.models[0].model_copy(update={"source": Source(location=str(tmp_path))})
    assert len(example_prompts(model, None)) == count
