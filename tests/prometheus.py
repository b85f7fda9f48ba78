"""A Prometheus server for tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

PROGRAM, TOOL = shutil.which("prometheus"), shutil.which("promtool")


def require_prometheus() -> None:
    """Skip the test if Prometheus is not installed; fail if the environment requires it."""
    if PROGRAM is None or TOOL is None:
        if os.environ.get("REQUIRE_SERVERS"):
            pytest.fail("prometheus is not installed")
        pytest.skip("prometheus is not installed")


class Prometheus:
    """A server that scrapes `target` (HOST:PORT) every second and evaluates `rules`."""

    def __init__(self, target: str, rules: Path) -> None:
        require_prometheus()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._address = f"127.0.0.1:{free.getsockname()[1]}"
        self._folder = tempfile.TemporaryDirectory()
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [target]}]}],
        }
        file = Path(self._folder.name) / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        self._process = subprocess.Popen(  # noqa: S603 - found on the path
            [
                str(PROGRAM),
                f"--config.file={file}",
                f"--storage.tsdb.path={self._folder.name}/data",
                f"--web.listen-address={self._address}",
                "--log.level=error",
            ]
        )
        self.url = f"http://{self._address}"
        deadline = time.monotonic() + 20
        while True:
            try:
                if httpx.get(f"{self.url}/-/ready", timeout=1).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            assert self._process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The current samples of a query; fails if the query does."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": query}, timeout=10).json()
        assert answer["status"] == "success", (query, answer)
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def rules(self) -> list[dict[str, Any]]:
        """All rules with the result of their last evaluation."""
        answer = httpx.get(f"{self.url}/api/v1/rules", timeout=10).json()
        return [rule for group in answer["data"]["groups"] for rule in group["rules"]]
