"""Example prompts of a model: what it can draw, in words, from a file in the model's folder."""

from __future__ import annotations

import json
import logging

from ..settings.models import ServedModel
from .checkpoints import EXAMPLE_PROMPTS, node_folder

SHOWN = 12

log = logging.getLogger("ray.serve")


def example_prompts(model: ServedModel, models_folder: str | None) -> list[str]:
    """The example prompts of a model, at most `SHOWN`; empty if its folder here has none.

    The file `example_prompts.json` is a list of strings. A file that is none is logged and ignored.
    """
    file = node_folder(model.source, models_folder) / EXAMPLE_PROMPTS
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, list) or not all(isinstance(prompt, str) for prompt in found):
            raise ValueError("expected a list of strings")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        log.warning("%s is ignored: %s", file, error)
        return []
    return found[:SHOWN]
