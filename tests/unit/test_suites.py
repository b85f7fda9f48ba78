"""Suites of prompts: those that come with Octet, and one's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from demo.landscapes import ADJECTIVES, EXTRAS, PLACES, PREFIXES, TIMES
from serve.errors import SettingsError
from serve.quality.suites import (
    Suite,
    SuitePrompt,
    image_requests,
    load_suite,
    suite_of,
)
from serve.request import ModelLimits
from serve.settings.models import RoutingRule

DEFAULTS = {"width": 64, "height": 64, "num_inference_steps": 4, "guidance_scale": 3.0}
SMALL_WORDS = {"a", "an", "and", "at", "in", "on", "over", "the", "with", "futuristic"}


@pytest.mark.parametrize("name", ["sd35", "landscapes"])
def test_a_suite_repeats_no_prompt_and_its_rules_find_their_prompts(name: str) -> None:
    suite = load_suite(name)
    prompts = [one.prompt for one in suite.prompts]
    assert len(set(prompts)) == len(prompts) > 50
    for category, rule in suite.rules.items():
        fits = RoutingRule(name="rule", prompt=rule).fits
        assert all(fits(one.prompt) for one in suite.prompts if one.category == category)
        others = [one.prompt for one in suite.prompts if one.category not in suite.rules]
        found = [prompt for prompt in others if fits(prompt)]
        assert len(found) < len(others) / 2, (category, found)


def test_the_demos_suite_speaks_the_demos_language() -> None:
    phrases = [
        *ADJECTIVES,
        *PREFIXES,
        *(w for part in (PLACES, TIMES, EXTRAS) for v in part.values() for w in v),
    ]
    known = SMALL_WORDS | {word for phrase in phrases for word in phrase.split()}
    for one in load_suite("landscapes").prompts:
        assert set(re.findall(r"[a-z]+", one.prompt)) <= known, one.prompt


def test_the_usual_suite_has_the_categories_that_formats_do_badly() -> None:
    wanted = {"Latin text", "Chinese text", "dark scenes", "several people", "hands", "faces"}
    wanted |= {"fine texture", "flat colour", "long prompts", "usual art prompts"}
    assert set(load_suite("sd35").categories) == wanted
    assert suite_of("landscapes") == "landscapes"
    assert suite_of("sd3.5-large") == "sd35"


def test_a_few_images_come_from_all_categories_in_turn() -> None:
    prompts = [SuitePrompt("a", "1"), SuitePrompt("a", "2"), SuitePrompt("b", "3")]
    suite = Suite("s", tuple(prompts), {})
    assert [one.prompt for one in suite.spread(2)] == ["1", "3"]
    assert [one.prompt for one in suite.spread(7)] == ["1", "3", "2", "1", "3", "2", "1"]


def test_each_request_has_a_seed_of_its_own() -> None:
    requests = image_requests([SuitePrompt("a", "x")] * 3, "m", DEFAULTS, ModelLimits(), 5)
    assert [(one.id, one.seed) for one in requests] == [("0", 5), ("1", 6), ("2", 7)]
    with pytest.raises(SettingsError, match="sides from 128 to"):
        image_requests([SuitePrompt("a", "x")], "m", DEFAULTS, ModelLimits(min_size_px=128), 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompts: [a]", "is no suite"),
        ("categories: {}", "is no suite"),
        ("categories: {a: [1]}", "is no suite"),
        ("categories: {a: ['']}", "no empty ones"),
        ("categories: {a: []}", "at least one prompt"),
        ("categories: [", "is no suite"),
    ],
)
def test_a_file_that_is_no_suite_is_explained(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=words):
        load_suite(str(file))


def test_an_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(SettingsError, match="did you mean 'landscapes'"):
        load_suite("landscape")
