"""The overlay mixed-gpu on this machine: its settings, Ray's REST API, and clients.

Replicas only wait (`bench.timed`), so that two cores are enough.
"""

from __future__ import annotations

import copy
import os
import secrets
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import yaml

from k8s.render import read_nodes, serve_config_v2
from serve.settings.application import Settings, sqlite_url

from .builders import DEMO_MODEL, ROOT
from .ports import free_port

# Replicas find S3's credentials in the environment, as in a pod. Ray's nodes inherit it from here.
os.environ.setdefault("AWS_ACCESS_KEY_ID", "test")
os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "test")
OVERLAY = ROOT / "k8s" / "overlays" / "mixed-gpu"
CARDS = "h100", "a100-80"


class Operator:
    """The requests that KubeRay's operator sends to a cluster."""

    def __init__(self, dashboard_port: int) -> None:
        token = {"authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
        self._client = httpx.Client(
            base_url=f"http://127.0.0.1:{dashboard_port}", headers=token, timeout=60
        )

    def deploy(self, config: dict[str, Any]) -> None:
        answer = self._client.put("/api/serve/applications/", json=config)
        assert answer.status_code == 200, answer.text

    def running(self, config: dict[str, Any]) -> bool:
        """Return whether all applications of this config run, and no others stay.

        A removed pool whose replica had no node yet is `DELETING` for up to `drain_timeout_s`. The
        answer is made by Serve's controller and takes it long, so it is asked for once a second.
        """
        time.sleep(1)
        try:
            answer = self._client.get("/api/serve/applications/")
        except httpx.TransportError:  # the head is not there
            return False
        if answer.status_code != 200:
            return False
        found = answer.json()["applications"]
        wanted = {application["name"] for application in config["applications"]}
        states = {name: one["status"] for name, one in found.items()}
        staying = {name for name, status in states.items() if status != "DELETING"}
        return staying == wanted and {states[name] for name in staying} == {"RUNNING"}

    def close(self) -> None:
        self._client.close()


def on_this_machine(folder: Path, s3: dict[str, Any], redis_url: str) -> Settings:
    """The overlay's settings for two of its cards, with a small model and other addresses."""
    data = yaml.safe_load((OVERLAY / "settings.yaml").read_text())
    source = {"location": str(DEMO_MODEL)}
    for model in data["models"]:
        model["pools"] = [pool for pool in model["pools"] if pool["card"] in CARDS]
        model.update(
            source=source,
            max_sequence_length=32,
            defaults={"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 3.0},
            limits={"min_size_px": 64, "max_size_px": 256},
        )
        for pool in model["pools"]:
            pool["num_cpus"] = 0.1
    (encoder,) = data["text_encoders"]
    encoder.update(source=source, precision="fp32", num_cpus=0.1)
    (folder / "key").write_bytes(secrets.token_bytes(32))
    data.update(
        http={"port": free_port()},
        emulate_fp8=True,
        dispatcher_num_cpus=0.1,
        ingress={**data["ingress"], "num_cpus": 0.1},
        s3=s3,
        cache={"redis_url": redis_url},
        signing_key_file=str(folder / "key"),
        tenants_folder=None,
        store={"url": sqlite_url(folder / "data")},  # all nodes are on this machine
        data_folder=str(folder / "data"),
        models_folder=str(folder / "models"),
        compiled_folder=str(folder / "compiled"),
    )
    return Settings.model_validate(data)


def config_of(settings: Settings) -> dict[str, Any]:
    kinds = read_nodes(OVERLAY / "nodes.yaml")
    config = copy.deepcopy(serve_config_v2(settings, kinds))
    config["http_options"]["host"] = "127.0.0.1"
    for application in config["applications"]:
        application["import_path"] = "bench.timed:build"
    return config


class Clients:
    """Clients that each send one request after the other, until `end`.

    `number`: of clients. `parameters`: of the requests, beside the prompt.
    `answers`: how often the clients got each answer: `ok`, or the text of an error. Every request
    has a connection of its own, so that all proxies get requests.

    The proxies of this machine share one port, and the kernel still gives connections to a proxy
    that leaves, or that has just started; a Service of Kubernetes would not. Such a connection is
    reset when the proxy ends, or answered with 503 before the proxy has its routes. The client then
    sends its request again, as OpenAI's client does; `resets` counts these.
    """

    def __init__(self, url: str, key: str, number: int, **parameters: Any) -> None:
        self.answers: Counter[str] = Counter()
        self.closed = 0  # answers with which a proxy that leaves closed its connection
        self.resets = 0
        self._url, self._key, self._parameters = url, key, parameters
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(number)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        headers = {"authorization": f"Bearer {self._key}"}
        url, body = f"{self._url}/v1/images/generations", {"prompt": "dunes", **self._parameters}
        while not self._ended.wait(0.5):
            try:
                answer = httpx.post(url, json=body, headers=headers, timeout=120)
                if "this proxy is starting" in answer.text:
                    self.resets += 1
                    continue
                said = "ok" if answer.status_code == 200 else answer.text
                self.closed += answer.headers.get("connection") == "close"
            except (httpx.ReadError, httpx.ConnectError):
                self.resets += 1
                continue
            except httpx.HTTPError as error:
                said = repr(error)
            self.answers[said] += 1

    def end(self) -> Counter[str]:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        return self.answers
