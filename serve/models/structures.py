"""The structure of a model's transformer: from files on this node, or by its name on the hub."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.structure import TRANSFORMERS, Structure, structure

from ..errors import SettingsError
from ..settings.application import CatalogueSettings
from ..settings.models import ServedModel, Source
from .checkpoints import CheckpointError, download_file, node_folder

FILE = "transformer/config.json"


def structure_of(model: ServedModel, models_folder: str | None) -> Structure:
    """The structure of a model.

    Raises `SettingsError` if the files do not describe an SD3.5 transformer, or if there are no
    files on this node and the name is not a known one.
    """
    for folder in _folders(model.source, models_folder):
        if (file := folder / FILE).is_file():
            try:
                return Structure.of(json.loads(file.read_text(encoding="utf-8")))
            except (ValueError, KeyError, TypeError):
                message = f"{file}: not the configuration of an SD3.5 transformer"
                raise SettingsError(message) from None
    name = model.source.location.rpartition("/")[2].replace("stable-diffusion-", "sd")
    if name not in TRANSFORMERS:
        raise SettingsError(
            f"model '{model.id}': the structure of {model.source.location} is not known before "
            f"`octet pull`; known by name are {', '.join(TRANSFORMERS)}"
        )
    return structure(name)


def unknown_structures(settings: CatalogueSettings) -> set[str]:
    """The ids of the models whose structure is not known yet."""
    unknown = set()
    for model in settings.models:
        try:
            structure_of(model, settings.models_folder)
        except SettingsError:
            unknown.add(model.id)
    return unknown


def pull_structure(source: Source, models_folder: str | None) -> Path:
    """Return the file with the structure of a source, after downloading it from the hub if needed.

    The weights are not downloaded. Raises `CheckpointError` if the download fails, or if the
    source is a folder without this file.
    """
    *_, alone = folders = _folders(source, models_folder)
    for folder in folders:
        if (file := folder / FILE).is_file():
            return file
    if source.revision is None:
        raise CheckpointError(f"{source.location}: no model here (no {FILE})")
    return download_file(source, FILE, alone)


def _folders(source: Source, models_folder: str | None) -> tuple[Path, ...]:
    """Where the file may be: with the weights, or without them."""
    folder = node_folder(source, models_folder)
    return folder, folder.with_name(f"{folder.name}.structure")
