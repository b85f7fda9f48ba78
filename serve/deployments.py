"""Names of Octet's Ray Serve application and of its deployments.

Pure: standard library only.
"""

from __future__ import annotations

APPLICATION = "octet"
INGRESS = "Ingress"
DISPATCHER = "Dispatcher"
JOBS = "Jobs"


def generator_deployment(pool: str) -> str:
    """The name of the deployment that holds a pool's Generators."""
    return f"Generator-{pool}"


def text_encoder_deployment(encoder: str) -> str:
    """The name of the deployment of a set of text encoders; `encoder`: the set's id."""
    return f"TextEncoder-{encoder}"
