"""The application with Generators that fail or wait for requests with certain guidance scales."""

from __future__ import annotations

from typing import Any

from serve.app import Parts, application

HUNGRY = 7.125  # two such images never fit into memory together
IDLE = 5.125  # each step of such an image waits `IDLE_STEP_S` and computes nothing
IDLE_STEP_S = 0.3  # 100 steps outlast twice a session's lease
TIMED = "timed"  # the Generators of the model with this id only wait, and start quickly

FAULTY_GENERATOR = "tests.integration.faulty_generator.FaultyGenerator"
TIMED_GENERATOR = "bench.timed.TimedGenerator"


def build(args: dict[str, Any]) -> Any:
    timed = args.get("pool") and args["pool"]["model"]["id"] == TIMED
    return application(args, Parts(TIMED_GENERATOR if timed else FAULTY_GENERATOR))
