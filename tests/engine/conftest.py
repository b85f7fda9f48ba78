"""A fixture of the tests that run real torch, without Ray and HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def no_denormals() -> Iterator[None]:
    """Flush denormals to zero, as replicas do, until the test module ends.

    Other modules use hypothesis, which refuses to run while denormals are flushed.
    """
    import torch

    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)
