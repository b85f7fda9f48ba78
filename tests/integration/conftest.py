"""Fixtures of the integration tests: one Ray with the demo, deployed the way of `octet serve`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path

import httpx
import pytest
import ray

from serve.engine.fp8_checkpoint import quantize
from serve.launch import RunningApplication, run_application
from serve.settings.application import JobSettings

from ..builders import DEMO_MODEL, laptop_settings
from ..ports import free_port
from ..wait import wait_for

DAY_S = 86400.0

# Ray reads this variable when it starts. Without it, Ray exports metrics every ten seconds.
os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")


def running(octet: RunningApplication) -> int:
    """The number of images that hold a slot."""
    return sum(pool.running for pool in octet.status().pools.values())


def log_folder() -> Path:
    """Where this test run's Ray keeps its logs: an earlier run that was killed leaves its own."""
    return Path(ray.get_runtime_context().get_temp_dir()) / "session_latest" / "logs"


def replica_logs() -> str:
    """The logs of every replica of this test run."""
    files = log_folder().glob("serve/replica_*.log")
    return "\n".join(file.read_text() for file in files)


@pytest.fixture(scope="session")
def octet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApplication]:
    """The application on a Ray of its own, which runs until the last test has ended.

    Its FP8 pool loads a checkpoint of `octet quantize`. Its Generators fail or wait for the
    guidance scales of `faulty`.
    """
    fp8 = tmp_path_factory.mktemp("fp8") / "model"
    quantize(DEMO_MODEL, fp8)
    settings = laptop_settings(
        {
            "OCTET_HTTP__PORT": str(free_port()),
            "OCTET_MODELS__0__POOLS__0__REPLICAS": "1",
            "OCTET_MODELS__0__POOLS__1__MIN_REPLICAS": "1",
            "OCTET_MODELS__0__POOLS__0__SOURCE__LOCATION": str(fp8),
        }
    )
    jobs = JobSettings(webhook_networks=(ip_network("127.0.0.0/8"),))
    settings = settings.model_copy(update={"jobs": jobs})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray warns while it starts
        application = run_application(settings, import_path="tests.integration.faulty:build")
        octet = application.__enter__()
    yield octet
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        application.__exit__(None, None, None)


@pytest.fixture
def patient(octet: RunningApplication, url: str) -> Iterator[None]:
    """Let requests wait for a day: on a slow machine, some would be refused as too late."""
    before = octet.settings
    octet.apply(before.model_copy(update={"request_timeout_s": DAY_S}))
    quick = {"prompt": "x", "num_inference_steps": 1, "size": "64x64", "timeout_s": DAY_S}
    address = f"{url}/v1/images/generations"
    wait_for(lambda: httpx.post(address, json=quick, timeout=120).status_code == 200)
    yield
    octet.apply(before)


@pytest.fixture(scope="session")
def url(octet: RunningApplication) -> str:
    return octet.url
