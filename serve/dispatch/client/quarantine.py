"""Refusal of requests that have killed replicas: an Ingress's part of the quarantine.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

from ...request import ImageRequest

QUARANTINED = "equal requests have killed replicas, so this one is refused for a while"


def request_digest(tenant: str, images: Sequence[ImageRequest]) -> str:
    """The id of a request in quarantine: a digest of what its images have in common.

    Seeds and file formats are left out, because they do not decide whether a replica survives.
    """
    left_out = {"id", "seed", "output_format", "output_compression"}
    fields = {name: value for name, value in asdict(images[0]).items() if name not in left_out}
    text = json.dumps([tenant, len(images), fields])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
