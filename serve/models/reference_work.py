"""What a request is counted as: its work on the reference replica of its model.

That is a replica of the model's first pool, as its settings and its arithmetic describe it
(`serve/cost.py`): the same for the same request wherever it is drawn, so it can be a price. How
fast the replicas are in truth they learn, in this unit.
"""

from __future__ import annotations

import json
import logging

from cluster.cards import CARDS
from cluster.cost import UNKNOWN_GPU, CostCoefficients, ImageShape, reference
from cluster.structure import TRANSFORMERS, Structure, structure

from ..errors import SettingsError
from ..request import ImageRequest
from ..settings.application import ApplicationSettings
from ..settings.models import Pool, ServedModel
from .checkpoints import node_folder

CLIP_TOKENS = 77

log = logging.getLogger("ray.serve")


def units(application: ApplicationSettings) -> dict[str, CostCoefficients]:
    """Of each model."""
    return {
        model.id: cost_of(model, model.pools[0], application.models_folder)
        for model in application.models
    }


def cost_of(model: ServedModel, pool: Pool, models_folder: str | None) -> CostCoefficients:
    """On a replica of a pool. A model whose structure is not known yet counts as SD3.5 Large."""
    try:
        known = structure_of(model, models_folder)
    except SettingsError as error:
        known = structure("sd3.5-large")
        log.warning("%s; its work is counted as SD3.5 Large's", error)
    card = CARDS[pool.card] if pool.card else UNKNOWN_GPU
    recipe = "fp8" if pool.precision == "fp8" else "bf16"
    return reference(known, recipe, card if pool.num_gpus else None)


def shape_of(request: ImageRequest, max_sequence_length: int) -> ImageShape:
    """As the transformer sees a request, before the text encoder has read its prompt."""
    return ImageShape(
        width_px=request.width,
        height_px=request.height,
        text_tokens=CLIP_TOKENS + max_sequence_length,
        rows=1 + request.guided,
        steps=request.num_inference_steps,
    )


def structure_of(model: ServedModel, models_folder: str | None) -> Structure:
    """From the model's own files if they are here, else by the hub's name of it.

    Raises `SettingsError` if neither says it.
    """
    file = node_folder(model.source, models_folder) / "transformer" / "config.json"
    if file.is_file():
        try:
            return Structure.of(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError):
            raise SettingsError(f"{file}: not the configuration of an SD3.5 transformer") from None
    name = model.source.location.rpartition("/")[2].replace("stable-diffusion-", "sd")
    if name not in TRANSFORMERS:
        raise SettingsError(
            f"model '{model.id}': its structure is not known before `octet pull`; "
            f"known are {', '.join(TRANSFORMERS)}"
        )
    return structure(name)
