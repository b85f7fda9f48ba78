"""The reference work of requests: seconds that a model's reference replica takes for an image.

The reference replica is a replica of the model's first pool, as the settings and the arithmetic of
`cluster/cost.py` describe it. So the same request has the same work wherever it is generated, and
work can be a price. A real replica learns its speed: the seconds of work that it does per second.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from cluster.cards import CARDS
from cluster.cost import UNKNOWN_GPU, CostCoefficients, ImageShape, reference
from cluster.structure import structure

from ..errors import SettingsError
from ..request import ImageRequest
from ..settings.application import CatalogueSettings
from ..settings.models import Model, Pool, ServedModel
from .structures import structure_of

CLIP_TOKENS = 77  # text tokens of CLIP, which the transformer reads before those of T5

log = logging.getLogger("ray.serve")


def units(settings: CatalogueSettings) -> dict[str, CostCoefficients]:
    """The cost of images on the reference replica of each model, by model id."""
    return {
        model.id: cost_of(model, model.pools[0], settings.models_folder)
        for model in settings.models
    }


def cost_of(model: ServedModel, pool: Pool, models_folder: str | None) -> CostCoefficients:
    """The cost of a model's images on a replica of `pool`, as `cluster/cost.py` predicts it.

    A model whose structure is not known yet counts as SD3.5 Large.
    """
    try:
        known = structure_of(model, models_folder)
    except SettingsError as error:
        known = structure("sd3.5-large")
        log.warning("%s; its work is counted as SD3.5 Large's", error)
    card = CARDS[pool.card] if pool.card else UNKNOWN_GPU
    recipe = "fp8" if pool.precision == "fp8" else "bf16"
    return reference(known, recipe, card if pool.num_gpus else None)


def shape_of(request: ImageRequest, text_tokens: int) -> ImageShape:
    """The properties of a request on which its work depends.

    `text_tokens`: the number of text tokens that the transformer reads, with padding.
    """
    width, height = request.canvas
    return ImageShape(
        width_px=width,
        height_px=height,
        text_tokens=text_tokens,
        rows=1 + request.guided,
        steps=request.steps,
        edit=request.edit is not None,
    )


def relative_costs(model: Model, cost: CostCoefficients) -> dict[str, float]:
    """The work of an image by the value of `quality`: "auto", and the model's presets.

    The image has the model's default size and guidance. The work of "auto" is 1.
    """
    usual = ImageRequest(id="", model=model.id, prompt="x", seed=0, **model.defaults.model_dump())
    tokens = text_tokens(model.max_sequence_length)
    requests = {
        "auto": usual,
        **{name: replace(usual, **preset.model_dump()) for name, preset in model.presets.items()},
    }
    work_s = {name: cost.work_s(shape_of(each, tokens)) for name, each in requests.items()}
    return {name: each / work_s["auto"] for name, each in work_s.items()}


def text_tokens(max_sequence_length: int) -> int:
    """The number of text tokens of a request for a model.

    It is known before the prompt is encoded, because every prompt is padded or cut to
    `max_sequence_length` T5 tokens.
    """
    return CLIP_TOKENS + max_sequence_length
