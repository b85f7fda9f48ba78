"""The application with Generators that fail or wait for requests with certain guidance scales."""

from __future__ import annotations

from typing import Any

from serve.app import Parts, application

HUNGRY = 7.125  # two such images never fit into memory together
IDLE = 5.125  # each step of such an image waits `IDLE_STEP_S` and computes nothing
IDLE_STEP_S = 0.3  # 100 steps outlast twice a session's lease


def build(args: dict[str, Any]) -> Any:
    return application(args, Parts("tests.integration.faulty_generator.FaultyGenerator"))
