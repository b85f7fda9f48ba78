"""How each contestant is started, and the settings among which each is tuned."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import psutil

from serve.cli.load_client import LoadClient, TimedRequest
from serve.settings.file import load_settings

from ..fairness_server import free_port
from ..tenants import add_tenants

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODEL = ROOT / "demo" / "model"
PATIENCE_S = 120.0
REST_S = 180.0
BUSY = 0.3  # cores; a server that uses this much more than when it is idle still has work
CORES = len(os.sched_getaffinity(0))
TENANTS = "light", "flood"
SMALL = {"prompt": "the sea", "size": "64x64", "num_inference_steps": 2, "guidance_scale": 3.0}
DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef

Config = Mapping[str, str]


@dataclass(frozen=True)
class Contestant:
    """A way to serve the model.

    `files`: what a user writes. `command`: the program and its arguments, with `{port}` and the
    names of its configuration in braces; its first word is a program of `environment`, a virtual
    environment. `path`: where requests go. `listed`: whether the body is a list of requests.
    `grid`: the configurations among which it is tuned. `package`: whose version is reported.
    """

    name: str
    package: str
    files: tuple[str, ...]
    command: str
    grid: tuple[Config, ...]
    environment: str = ".venv"
    path: str = "/"
    listed: bool = False

    @property
    def lines(self) -> int:
        """Lines of all `files`, without empty lines, comments and docstrings."""
        return sum(lines_of(HERE / file) for file in self.files)

    @property
    def version(self) -> str:
        """The version of its package in its environment."""
        folders = [str(p) for p in (ROOT / self.environment).glob("lib/python3*/site-packages")]
        found = next(iter(importlib.metadata.distributions(name=self.package, path=folders)))
        return found.version

    def body(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON of a request, as this contestant takes it."""
        return {"requests": [request]} if self.listed else dict(request)


def _grid(**values: tuple[str, ...]) -> tuple[Config, ...]:
    return tuple(dict(zip(values, chosen, strict=True)) for chosen in product(*values.values()))


WORKERS = "1", "2"
BATCHES = {"PEER_WORKERS": WORKERS, "PEER_BATCH": ("1", "2", "8")}
POOL = "OCTET_MODELS__0__POOLS__0__"
OURS = "landscapes.py"
CONTESTANTS = (
    Contestant(
        "Octet",
        "octet-serve",
        ("octet.yaml",),
        "octet serve octet.yaml",
        _grid(**{f"{POOL}REPLICAS": WORKERS, f"{POOL}SLOTS": ("4", "8")}),
        path="/v1/images/generations",
    ),
    Contestant(
        "FastAPI + diffusers",
        "fastapi",
        ("with_fastapi.py", OURS),
        "python -m uvicorn --port {port} --workers {PEER_WORKERS} with_fastapi:app",
        _grid(PEER_WORKERS=WORKERS),
    ),
    Contestant(
        "Ray Serve",
        "ray",
        ("with_ray.py", OURS),
        "python with_ray.py",
        _grid(PEER_WORKERS=WORKERS, PEER_ONGOING=("1", "5")),
    ),
    Contestant(
        "Ray Serve, @serve.batch",
        "ray",
        ("with_ray_batch.py", OURS),
        "python with_ray_batch.py",
        _grid(**BATCHES, PEER_WAIT_S=("0.05",)),
    ),
    Contestant(
        "LitServe",
        "litserve",
        ("with_litserve.py", OURS),
        "python with_litserve.py",
        _grid(**BATCHES, PEER_WAIT_S=("0.05",)),
        environment=".venv/peers/litserve",
        path="/predict",
    ),
    Contestant(
        "BentoML",
        "bentoml",
        ("with_bentoml.py", OURS),
        "bentoml serve with_bentoml:LandscapesService --port {port}",
        _grid(PEER_WORKERS=WORKERS, PEER_BATCH=("2", "8"), PEER_LATENCY_MS=("600000",)),
        environment=".venv/peers/bentoml",
        path="/generate",
        listed=True,
    ),
)


@dataclass
class Server:
    """A contestant that runs.

    `start_s`: seconds until its first image. `idle`: the part of a core that it uses when nobody
    asks for anything. `seen`: all processes that it has been known to have.
    """

    contestant: Contestant
    url: str
    keys: Mapping[str, str]
    process: psutil.Process
    start_s: float = 0.0
    idle: float = 0.0
    seen: set[psutil.Process] = field(default_factory=set)

    def client(self, patience_s: float = PATIENCE_S) -> LoadClient:
        """A client that gives a request up after `patience_s`."""
        return LoadClient(self.url, self.keys, patience_s=patience_s, keep_open=False)

    def requests(self, requests: list[TimedRequest]) -> list[TimedRequest]:
        """The requests, as this contestant takes them."""
        return [r._replace(body=self.contestant.body(r.body)) for r in requests]

    def processes(self) -> list[psutil.Process]:
        """The server's processes that are alive."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.seen |= {self.process, *self.process.children(recursive=True)}
        return [process for process in self.seen if process.is_running()]

    def cpu_s(self) -> dict[int, float]:
        """CPU seconds that each living process has used, by its id."""
        found = {}
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                used = process.cpu_times()
                found[process.pid] = used.user + used.system
        return found

    def cores(self, seconds: float) -> float:
        """How many cores it uses on average, for so long from now on."""
        before, began = sum(self.cpu_s().values()), time.monotonic()
        time.sleep(seconds)
        return (sum(self.cpu_s().values()) - before) / (time.monotonic() - began)

    def rest(self) -> None:
        """Wait until it has done all that is left to do. Raises `TimeoutError` after `REST_S`."""
        until = time.monotonic() + REST_S
        while self.cores(1.0) > self.idle + BUSY:
            if time.monotonic() > until:
                raise TimeoutError(f"{self.contestant.name} still computes after {REST_S:g} s")

    def memory_mib(self) -> float:
        """MiB that the processes hold; what several share counts once."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().pss
        return total / 2**20


def shown(config: Config) -> str:
    """A configuration in a few words."""
    words = (f"{key.rsplit('_', 1)[-1].lower()} {value}" for key, value in config.items())
    return ", ".join(words)


@contextlib.contextmanager
def served(contestant: Contestant, config: Config, dtype: str) -> Iterator[Server]:
    """Run a contestant until the block ends. `dtype`: the peers' number format, a name in torch."""
    with tempfile.TemporaryDirectory(prefix="peer-") as folder, contextlib.ExitStack() as stack:
        port, workers = free_port(), config.get("PEER_WORKERS") or config[f"{POOL}REPLICAS"]
        own = {
            "PEER_MODEL": str(MODEL),
            "PEER_DTYPE": dtype,
            "PEER_PORT": str(port),
            "PEER_FOLDER": folder,
            "OCTET_HTTP__PORT": str(port),
            "OCTET_DATA_FOLDER": f"{folder}/octet",
            "OMP_NUM_THREADS": str(max(1, CORES // int(workers))),
            "BENTOML_DO_NOT_TRACK": "True",
            "BENTOML_HOME": f"{folder}/bentoml",
            "HF_HUB_OFFLINE": "1",
        }
        programs = ROOT / contestant.environment / "bin"
        words = contestant.command.format(port=port, **config).split()
        keys: dict[str, str] = {}
        if contestant.package == "octet-serve":
            settings = load_settings(HERE / "octet.yaml", {**own, **config})
            keys = add_tenants(settings.database or {}, {name: {} for name in TENANTS})
        log = stack.enter_context(open(Path(folder) / "log", "wb"))
        began = time.monotonic()
        started = subprocess.Popen(  # noqa: S603 - our own command
            [str(programs / words[0]), *words[1:]],
            cwd=HERE,
            env={**os.environ, **own, **config},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        process = psutil.Process(started.pid)
        server = Server(contestant, f"http://127.0.0.1:{port}{contestant.path}", keys, process)
        try:
            _wait_for_an_image(server, started, Path(folder) / "log")
            server.start_s = time.monotonic() - began
            time.sleep(2)
            server.idle = server.cores(2)
            yield server
        finally:
            _end(started, server.processes())


def _wait_for_an_image(server: Server, started: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(OSError):
            image_of(server, {**SMALL, "seed": 0})
            return
        if started.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"{server.contestant.name}: no image\n{log.read_text()[-3000:]}")
        time.sleep(0.1)


def image_of(server: Server, request: Mapping[str, Any]) -> str:
    """The PNG of a request, in base64. Raises `OSError` if the server gives none."""
    key = server.keys.get("light")
    asked = urllib.request.Request(  # noqa: S310 - loopback
        server.url,
        json.dumps(server.contestant.body(request)).encode(),
        {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})},
    )
    with urllib.request.urlopen(asked, timeout=PATIENCE_S) as answer:  # noqa: S310 - loopback
        found = json.loads(answer.read())
    if isinstance(found, list):
        return str(found[0])
    return str(found["data"][0]["b64_json"] if "data" in found else found["b64_json"])


def _end(started: subprocess.Popen[bytes], processes: list[psutil.Process]) -> None:
    """End a server politely, and after ten seconds by force."""
    started.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        started.wait(timeout=10)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    started.wait()
    psutil.wait_procs(processes, timeout=10)


def lines_of(file: Path) -> int:
    """Lines of a file without empty lines, comments and docstrings, in Python's usual layout."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return sum(
            bool(line.strip()) and not line.strip().startswith("#") for line in text.splitlines()
        )
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return sum(bool(line) for line in ast.unparse(tree).splitlines())
