"""Tests of the command `octet serve`, next to another Octet on the same machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from serve.cli.main import app
from serve.settings.application import Settings
from serve.settings.serve_config import serve_config

from ..builders import DEMO_MODEL, ROOT
from ..ports import free_port
from ..wait import PATIENCE_S, wait_for

OCTET = """
from functools import partial
from serve import launch
launch.run_application = partial(launch.run_application, import_path="bench.timed:build")
from serve.cli.__main__ import main
main()
"""


def test_ray_serve_accepts_the_config(laptop: Settings) -> None:
    schema = ServeDeploySchema.model_validate(serve_config(laptop))
    assert [(one.name, one.route_prefix) for one in schema.applications] == [
        ("octet", "/"),
        ("TextEncoder-landscapes", None),
        ("Generator-landscapes-fp8", None),
        ("Generator-landscapes-fp16", None),
    ]
    for application in schema.applications:
        assert application.import_path == "serve.app:build"
        policy = application.autoscaling_policy
        assert policy == {"policy_function": "autoscaling.ray_policy:replicas"}


def ray_folders(processes: list[psutil.Process]) -> set[Path]:
    """The temporary folders of the Ray that these processes belong to."""
    commands = " ".join(part for process in processes for part in process.cmdline())
    return {Path(found) for found in re.findall(rf"{tempfile.gettempdir()}/octet-\w+", commands)}


def test_a_second_octet_serves_changes_settings_drains_and_leaves_nothing(
    url: str, tmp_path: Path
) -> None:
    """`url` is one Octet; the command starts another, and only that one receives the signals.

    The Generators of the other one only wait.
    """
    port = free_port()
    second = f"http://127.0.0.1:{port}"
    file = tmp_path / "octet.yaml"
    settings = (ROOT / "examples" / "laptop.yaml").read_text()
    settings = settings.replace("../demo/model", str(DEMO_MODEL)).replace("8000", str(port))
    settings = settings.replace("replicas: 2, min_replicas: 1,", "slots: 1,")
    settings = re.sub(r"\n +- { precision: fp16.*", "", settings)
    assert "slots: 1" in settings
    assert "fp16" not in settings
    settings = settings.replace("auth: none", "auth: keys\ndata_folder: data")
    file.write_text(settings)
    key = octet_command("tenant", "add", "acme", "--config", str(file), "--operator").strip()
    command = [sys.executable, "-c", OCTET, "serve", str(file)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    long = {"prompt": "the sea at dawn", "num_inference_steps": 25}
    with (
        subprocess.Popen(  # noqa: S603 - our own command
            command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        ) as octet,
        ThreadPoolExecutor(3) as pool,
    ):
        try:
            announced = announcement(octet)
            processes = psutil.Process(octet.pid).children(recursive=True)
            assert (folders := ray_folders(processes))

            assert generate(second, long, "octet_acme_" + "0" * 40).status_code == 401
            assert httpx.get(f"{second}/-/routes", timeout=60).status_code == 404
            wait_for(lambda: httpx.get(f"{second}/ready", timeout=60).json() == {"status": "ready"})
            file.write_text(f"max_body_bytes: 200\n{settings}")
            octet.send_signal(signal.SIGUSR1)
            wait_for(lambda: generate(second, {"prompt": "x" * 300}, key).status_code == 413)

            answer = generate(second, {"prompt": "the sea", "precision": "fp8"}, key)
            assert answer.json()["data"][0]["precision"] == "fp8"

            longest = {**long, "num_inference_steps": 100, "size": "256x256"}
            cancelled = pool.submit(generate, second, longest, key, "mine")
            wait_for(lambda: running_images(second, key) == 1)
            headers = {"authorization": f"Bearer {key}"}
            httpx.delete(f"{second}/v1/requests/mine", headers=headers, timeout=60)
            assert cancelled.result().status_code == 499

            answers = [pool.submit(generate, second, long, key) for _ in range(3)]  # two wait
            wait_for(lambda: running_images(second, key) == 1)
            shown = octet_command("top", second, "--key", key, "--once")
            assert "acme" in shown
            octet.send_signal(signal.SIGTERM)
            assert [answer.result().status_code for answer in answers] == [200] * 3
        finally:
            octet.send_signal(signal.SIGTERM)
            octet.communicate(timeout=PATIENCE_S)
    assert octet.returncode == 0
    assert f"Playground: {second}/" in announced
    assert f"curl -s {second}/v1/images/generations" in announced
    charged = [
        json.loads(line)
        for line in octet_command("usage", "--config", str(file), "--records").splitlines()
    ]
    answered = [r for r in charged if r["outcome"] == "delivered" and r["steps"] == 25]
    assert [r["tenant"] for r in answered] == ["acme"] * 3
    gone, alive = psutil.wait_procs(processes, timeout=PATIENCE_S)
    assert not alive, alive
    assert len(gone) == len(processes)
    assert not any(folder.exists() for folder in folders)
    wait_for(lambda: httpx.get(f"{url}/ready", timeout=60).status_code == 200)


def running_images(address: str, key: str) -> int:
    """The number of images that hold a slot, or -1 if the Dispatcher has no time for an answer.

    `key` must be an operator's.
    """
    headers = {"authorization": f"Bearer {key}"}
    answer = httpx.get(f"{address}/v1/state", headers=headers, timeout=60)
    if answer.status_code == 503:
        return -1
    return sum(pool["running"] for pool in answer.json()["pools"].values())


def generate(address: str, body: dict[str, Any], key: str, id: str | None = None) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}", **({"x-request-id": id} if id else {})}
    return httpx.post(f"{address}/v1/images/generations", json=body, headers=headers, timeout=120)


def octet_command(*arguments: str) -> str:
    """Run a command, which has to succeed, and return its output."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def announcement(demo: subprocess.Popen[str]) -> str:
    """The command's output up to the line that says that the server is open for requests.

    Raises `AssertionError` if the command is not ready in time, and kills it.
    """
    assert demo.stdout
    lines: list[str] = []
    limit = threading.Timer(PATIENCE_S, demo.kill)
    limit.start()
    try:
        for line in demo.stdout:
            lines.append(line)
            if line.startswith("Ctrl-C"):
                return "".join(lines)
    finally:
        limit.cancel()
    raise AssertionError(f"not ready in time: {lines}")
