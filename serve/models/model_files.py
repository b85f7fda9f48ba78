"""The facts that an Ingress reads from the files of the models on its node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Self

from cluster.cost import CostCoefficients

from ..settings.application import CatalogueSettings
from .example_prompts import example_prompts
from .structures import unknown_structures

Units = Callable[[CatalogueSettings], Mapping[str, CostCoefficients]]


class ModelFiles(NamedTuple):
    """Facts about the models, by model id.

    `unknown`: the models whose structure is not known yet, because no files of theirs are here.
    """

    unknown: set[str]
    work: Mapping[str, CostCoefficients]
    example_prompts: Mapping[str, list[str]]

    @classmethod
    def read(cls, settings: CatalogueSettings, units: Units) -> Self:
        """Read the files, which blocks; `units`: returns the reference work of each model."""
        prompts = {m.id: example_prompts(m, settings.models_folder) for m in settings.models}
        return cls(unknown_structures(settings), units(settings), prompts)
