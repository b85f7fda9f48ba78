"""The log of refused requests: a few lines a second, and the number of the others."""

from __future__ import annotations

import pytest

from serve.api.request_log import LINES_PER_S, RefusalLog
from serve.errors import InvalidRequest


def test_a_flood_of_refusals_writes_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    refusals = RefusalLog(lambda: now[0])
    with caplog.at_level("INFO", "ray.serve"):
        for _ in range(100):
            refusals.refused(InvalidRequest("canary", param="canary"), "acme", "id")
        now[0] += 1.0
        refusals.refused(InvalidRequest("canary"), "acme", "id")
    left_out = [record.__dict__["left_out"] for record in caplog.records]
    assert left_out == [0] * LINES_PER_S + [100 - LINES_PER_S]
    assert "canary" not in str([record.__dict__ for record in caplog.records])
