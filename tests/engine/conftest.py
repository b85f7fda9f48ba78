"""Real torch, without Ray and HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def no_denormals() -> Iterator[None]:
    """As in the replicas' threads; hypothesis cannot live with it, so not for good."""
    import torch

    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)
