"""The `octet demo` command as a user runs it, beside another Octet on the same machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import httpx
import psutil
from ray.serve.schema import ServeDeploySchema

from serve.launch import serve_config
from serve.settings import Settings

from .conftest import ROOT, free_port

READY_WITHIN_S = 90


def test_the_config_is_ray_serves_own(laptop: Settings) -> None:
    schema = ServeDeploySchema.model_validate(serve_config(laptop))
    (application,) = schema.applications
    assert application.import_path == "serve.app:build"
    rest = {"http": laptop.http.model_dump()}
    assert Settings.model_validate({**application.args, **rest}) == laptop


def octet_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("octet-*"))


def test_a_second_demo_starts_answers_and_leaves_nothing(url: str) -> None:
    """`url` is one Octet; the command starts another, and SIGTERM ends that one alone."""
    folders, port = octet_folders(), free_port()
    second = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-c",
        "from serve.cli import main; main()",
        "demo",
        "--port",
        str(port),
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with subprocess.Popen(  # noqa: S603 - our own command
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as demo:
        try:
            announced = announcement(demo)
            answer = httpx.post(
                f"{second}/v1/images/generations",
                json={"prompt": "the sea at dawn", "num_inference_steps": 2},
                timeout=60,
            )
            assert answer.status_code == 200
            processes = psutil.Process(demo.pid).children(recursive=True)
            assert processes
        finally:
            demo.send_signal(signal.SIGTERM)
            demo.communicate(timeout=60)
    assert f"Playground: {second}/" in announced
    assert f"curl -s {second}/v1/images/generations" in announced
    gone, alive = psutil.wait_procs(processes, timeout=15)
    assert not alive, alive
    assert len(gone) == len(processes)
    assert octet_folders() == folders
    assert httpx.get(f"{url}/ready", timeout=10).status_code == 200


def announcement(demo: subprocess.Popen[str]) -> str:
    """What the command prints once it is open for requests; a demo that hangs is killed."""
    assert demo.stdout
    lines: list[str] = []
    limit = threading.Timer(READY_WITHIN_S, demo.kill)
    limit.start()
    try:
        for line in demo.stdout:
            lines.append(line)
            if line.startswith("Ctrl-C"):
                return "".join(lines)
    finally:
        limit.cancel()
    raise AssertionError(f"not ready within {READY_WITHIN_S} s: {lines}")
