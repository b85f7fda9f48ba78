"""Names of Octet's Ray Serve application and its deployments, said once.

Pure: standard library only.
"""

from __future__ import annotations

APPLICATION = "octet"
INGRESS = "Ingress"
DISPATCHER = "Dispatcher"


def generator_deployment(pool: str) -> str:
    """The deployment of a pool's Generators."""
    return f"Generator-{pool}"


def text_encoder_deployment(encoder: str) -> str:
    """The deployment of a set of text encoders, by its id."""
    return f"TextEncoder-{encoder}"
