"""Digests of what decides the pixels of a model's images, apart from the request.

This file does not import torch, because an Ingress imports it.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

from .. import edit_pixels, request
from ..settings.application import CatalogueSettings
from ..settings.models import CardResources, ServedModel, Source

# Settings of pools and text encoders that change no pixel.
NO_PIXELS = {*CardResources.model_fields, "id", "slots", "warm_sizes", "cache_mib", "warm_prompts"}
# Libraries whose version may change pixels.
LIBRARIES = "diffusers", "optimum-quanto", "pillow", "torch", "transformers"


def pixel_digest(settings: CatalogueSettings, model: ServedModel) -> str:
    """A digest of everything that decides a model's pixels, apart from the request.

    This includes the engine's code, versions of libraries, settings of precision, and the revisions
    or files of the weights. The number of replicas and their share of a card are left out, because
    they change no pixel.
    """
    (encoder,) = (e for e in settings.text_encoders if e.id == model.text_encoder)
    sources = [s for s in (model.source, encoder.source, *(p.source for p in model.pools)) if s]
    found = [
        code_digest(),
        libraries(),
        settings.emulate_fp8,
        model.max_sequence_length,
        [pool.model_dump(mode="json", exclude=NO_PIXELS) for pool in model.pools],
        encoder.model_dump(mode="json", exclude=NO_PIXELS),
        [(source.location, source.revision, weights_of(source)) for source in sources],
    ]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def libraries() -> dict[str, str]:
    """The versions of the libraries that may change pixels."""
    return {name: version(name) for name in LIBRARIES}


def code_digest() -> str:
    """SHA-256 over the source files that decide pixels: the engine's, and those of requests."""
    code = hashlib.sha256()
    others = (Path(str(module.__file__)) for module in (edit_pixels, request))
    for file in [*sorted(Path(__file__).parent.glob("*.py")), *others]:
        code.update(file.name.encode() + b"\0" + file.read_bytes())
    return code.hexdigest()


def weights_of(source: Source) -> list[tuple[str, int, int]]:
    """The names, sizes and times of a local folder's files, which differ for other weights.

    Empty for a source with a revision, or that is no folder.
    """
    folder = Path(source.location)
    if source.revision or not folder.is_dir():
        return []
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
