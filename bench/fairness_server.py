"""The server that `bench.fairness` measures, with an API key for each tenant of its parts."""

from __future__ import annotations

import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve.cli.load_client import LoadClient
from serve.cli.serve import DEMO_SETTINGS
from serve.launch import RunningApplication, run_application
from serve.settings.file import load_settings

from .step_time import STEP_S
from .tenants import add_tenants

LIGHT = [f"light{i}" for i in range(9)]
WEIGHTS = {"single": 1.0, "another": 1.0, "double": 2.0, "quadruple": 4.0}
BUDGETS = [f"budget{i}" for i in range(4)]


class Bench:
    """The application on a Ray of its own, and a client with the keys of all tenants."""

    def __init__(self, octet: RunningApplication, keys: dict[str, str]) -> None:
        self.octet, self.keys = octet, keys
        self.load = LoadClient(f"{octet.url}/v1/images/generations", keys)

    def ingresses(self, replicas: int) -> None:
        """Change the number of Ingresses; wait until all replicas are ready again."""
        before = self.octet.settings
        ingress = before.ingress.model_copy(update={"replicas": replicas})
        if ingress != before.ingress:
            self.octet.apply(before.model_copy(update={"ingress": ingress}))
            time.sleep(1.5)
            self.octet.wait()
            time.sleep(1.5)


@contextmanager
def served(import_path: str, folder: Path, **changes: Any) -> Iterator[Bench]:
    """Run the application with the tenants of all parts until the block ends.

    `import_path`: the function that builds the application. `folder`: where its tenants and usage
    records are kept. `changes`: settings that differ from the demo's.
    """
    # Limits that exist and are never reached.
    limits = {"requests_per_s": 1e5, "work_per_s": 1e5, "monthly_work": 1e9}
    tenants: dict[str, dict[str, float]] = dict.fromkeys(("flood", *LIGHT), limits)
    tenants |= {name: {"weight": weight} for name, weight in WEIGHTS.items()}
    tenants |= {name: {"monthly_work": 10 * 4 * STEP_S} for name in BUDGETS}
    environ = {
        "OCTET_HTTP__PORT": str(free_port()),
        "OCTET_MODELS__0__POOLS__1__MIN_REPLICAS": "1",
    }
    settings = load_settings(DEMO_SETTINGS, environ).model_copy(
        update={
            "auth": "keys",
            "data_folder": str(folder),
            **changes,
        }
    )
    keys = add_tenants(settings.database or {}, tenants)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with run_application(settings, import_path=import_path) as octet:
            yield Bench(octet, keys)


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
