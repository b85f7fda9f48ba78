"""Suites: the prompts by which images are compared, sorted by category.

A suite is a YAML file with a `description` and `categories`. A category is a list of prompts. It
may also have a `rule`, a regular expression that matches such prompts, for the setting `routing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import InvalidRequest, SettingsError, did_you_mean
from ..request import ImageRequest, ModelLimits
from ..settings.models import RoutingRule

FOLDER = Path(__file__).with_name("suites")
DEFAULT = "sd35"
TOTAL = "all"  # what results call all categories together


class SuitePrompt(NamedTuple):
    """A prompt and its category."""

    category: str
    prompt: str


@dataclass(frozen=True)
class Suite:
    """The prompts of a suite, in the order of its file; `rules`: by category, where it has one."""

    name: str
    prompts: tuple[SuitePrompt, ...]
    rules: Mapping[str, str]

    @property
    def categories(self) -> tuple[str, ...]:
        """The names of the categories."""
        return tuple(dict.fromkeys(one.category for one in self.prompts))

    def spread(self, count: int) -> list[SuitePrompt]:
        """`count` prompts, as evenly from all categories as possible; they repeat if needed."""
        by_category = [[p for p in self.prompts if p.category == c] for c in self.categories]
        longest = max(map(len, by_category))
        turns = [prompts[i] for i in range(longest) for prompts in by_category if i < len(prompts)]
        return list(islice(cycle(turns), count))


class _Category(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    prompts: list[str]
    rule: str = ""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    description: str = ""
    categories: dict[str, _Category | list[str]] = Field(min_length=1)

    def parsed(self) -> dict[str, _Category]:
        return {
            name: _Category(prompts=one) if isinstance(one, list) else one
            for name, one in self.categories.items()
        }


def suite_of(model_id: str) -> str:
    """The name of the suite for a model: one that has its id, or else the usual one."""
    return model_id if model_id in _names() else DEFAULT


def load_suite(name: str) -> Suite:
    """Load a suite that comes with Octet, by its name, or one's own, by the path of its file.

    Raises `SettingsError` if there is none, or the file is no suite.
    """
    file = FOLDER / f"{name}.yaml" if name in _names() else Path(name)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(
            f"--suite {name}: {error.strerror}, and no suite has this name: "
            f"{did_you_mean(name, _names())}"
        ) from None
    try:
        found = _File.model_validate(yaml.safe_load(text)).parsed()
    except (yaml.YAMLError, ValidationError) as error:
        detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise SettingsError(
            f"{file} is no suite: it needs `categories`, a list of prompts by name ({detail})"
        ) from None
    prompts = tuple(
        SuitePrompt(name, prompt) for name, category in found.items() for prompt in category.prompts
    )
    if not prompts or not all(one.prompt.strip() for one in prompts):
        raise SettingsError(f"{file}: a suite needs at least one prompt, and no empty ones")
    if TOTAL in found:
        raise SettingsError(f"{file}: no category can have the name '{TOTAL}'")
    rules = {name: category.rule for name, category in found.items() if category.rule}
    for name, rule in rules.items():
        try:
            RoutingRule(name="rule", prompt=rule)
        except ValueError:
            raise SettingsError(f"{file}: the rule of '{name}' is no regular expression") from None
    return Suite(file.stem, prompts, rules)


def image_requests(
    prompts: Sequence[SuitePrompt],
    model_id: str,
    defaults: Mapping[str, Any],
    limits: ModelLimits,
    seed: int,
) -> list[ImageRequest]:
    """A request for each prompt; its other fields are `defaults`, such as those of the model.

    Request i has the id i and the seed `seed` + i. Raises `SettingsError` for a request that the
    limits refuse.
    """
    try:
        found = [
            ImageRequest(id=str(i), model=model_id, prompt=one.prompt, seed=seed + i, **defaults)
            for i, one in enumerate(prompts)
        ]
        for request in found:
            request.check(limits)
    except InvalidRequest as error:
        raise SettingsError(error.message) from None
    return found


def _names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))
