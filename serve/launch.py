"""Run the application on a Ray of its own on this machine: for `octet serve`, the demo, the tests.

Deploys through Serve's declarative config, the path that `serve run` and KubeRay take, and keeps
apart from every other Ray here: own address, own temporary folder, own token.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from .errors import SettingsError
from .settings.application import Settings
from .settings.serve_config import APPLICATION, LOGGING, serve_config

OBJECT_STORE_BYTES = 256 * 2**20
POLL_S = 0.25
# What Ray and its Serve read from the environment, unless it says otherwise.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a late call must not start another Ray
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.api.proxy_guard:middlewares",
    # Fill cards as the packing plan counts on, and never move a replica to tidy up: that would load
    # its model again.
    "RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY": "1",
    "RAY_SERVE_NODE_COMPACTION_DELAY_S": str(10 * 365 * 24 * 3600),
}
ANSWER_S = 10.0
GLANCE_S = 1.0
OTHERS_S = 30.0
LAST_BYTES_S = 2.0  # for what Serve's proxy still has to send


class LaunchError(Exception):
    """The application did not come up; the message says what Ray Serve said."""


class RunningApplication:
    """The application on the Ray that this process is connected to."""

    def __init__(self, settings: Settings, default_data_folder: str | None = None) -> None:
        self._default_data_folder = default_data_folder
        self._handle: Any = None
        self.settings = self._deploy(settings)
        self.url = f"http://{settings.http.host}:{settings.http.port}"

    def apply(self, settings: Settings) -> bool:
        """Bring it to other settings; returns at once, and whether replicas restart for it.

        What is tuning reaches the replicas as they run; any other change restarts them all. Raises
        `SettingsError` for what belongs to this process.
        """
        if settings.http != self.settings.http:
            raise SettingsError("http: a change needs a restart")
        before, self.settings = self.settings, self._deploy(settings)
        return self.settings.application() != before.application()

    def wait(self, tell: Callable[[str], None] = lambda _: None) -> None:
        """Until every pool that a node can hold has a replica; `tell` hears what is awaited.

        Once all models can be served, other pools are awaited for `OTHERS_S` only: nodes may be
        full. Raises `LaunchError` with the message of a deployment that fails.
        """
        from ray import serve

        served_since: float | None = None
        while True:
            application = serve.status().applications.get(APPLICATION)
            awaited = []
            if application is not None:
                if failed := _failed(application):
                    raise LaunchError("\n".join(failed))
                states = application.deployments.items()
                awaited = [name for name, d in states if d.status != "HEALTHY"]
                if application.status == "RUNNING":
                    pools = self._dispatcher().state.remote().result(timeout_s=ANSWER_S)["pools"]
                    empty = [name for name, p in pools.items() if p["wanted"] and not p["replicas"]]
                    coming = {name for name in empty if pools[name]["placeable"]}
                    if self._served(empty, coming):
                        served_since = served_since or time.monotonic()
                        if not coming or time.monotonic() - served_since > OTHERS_S:
                            if empty:
                                tell(f"going on without {_generators(empty)}: no room on any node")
                            return
                    tell(f"waiting for {_generators(empty)}")
                    awaited = []
            if awaited or application is None:
                tell("waiting for " + (", ".join(awaited) or "the application"))
            time.sleep(POLL_S)

    def reasons(self) -> dict[str, str]:
        """Why each pool has as many replicas as it has; nothing if nobody answers soon."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            state = self._dispatcher().state.remote().result(timeout_s=GLANCE_S)
        except (RayError, RayServeException, TimeoutError):
            return {}
        return {name: pool["reason"] for name, pool in state["pools"].items()}

    def drain(self) -> None:
        """Refuse new images; returns when the others are answered, or after `drain_timeout_s`.

        Raises `LaunchError` if the application no longer answers.
        """
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        deadline = time.monotonic() + self.settings.drain_timeout_s
        still_open = 1
        while still_open:
            try:
                still_open = self._dispatcher().drain.remote().result(timeout_s=ANSWER_S)
            except (RayError, RayServeException, TimeoutError) as error:
                if time.monotonic() > deadline:  # until then it may be restarting
                    raise LaunchError(f"cannot drain: {type(error).__name__}") from error
            if time.monotonic() > deadline:
                return
            time.sleep(POLL_S)
        time.sleep(LAST_BYTES_S)

    def _served(self, empty: Collection[str], coming: Collection[str]) -> bool:
        """Whether each model has a replica, or no pool that will get one."""
        return all(
            not set(pools) <= set(empty) or not set(pools) & set(coming)
            for pools in ([m.pool_name(p) for p in m.pools] for m in self.settings.models)
        )

    def _deploy(self, settings: Settings) -> Settings:
        """Hand settings to Ray Serve, completed by what this process decides."""
        # What `serve run` does; Serve has no public call for it without its dashboard.
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        if settings.data_folder is None:
            settings = settings.model_copy(update={"data_folder": self._default_data_folder})
        config = ServeDeploySchema.model_validate(serve_config(settings))
        _get_global_client().deploy_apps(config)
        return settings

    def close(self) -> None:
        """Let go of the application, which runs on: its handle would report to Ray for ever."""
        if self._handle is not None:
            self._handle.shutdown()

    def _dispatcher(self) -> Any:
        from ray import serve

        if self._handle is None:
            self._handle = serve.get_deployment_handle("Dispatcher", APPLICATION)
        return self._handle


def _generators(pools: Iterable[str]) -> str:
    return ", ".join(f"Generator-{pool}" for pool in pools)


@contextlib.contextmanager
def run_application(
    settings: Settings, tell: Callable[[str], None] = lambda _: None
) -> Iterator[RunningApplication]:
    """The application, answering on its URL until the block ends; `tell` hears what is awaited.

    Leaves no process behind, and no file but those in `settings.data_folder`; without one, images
    for URLs are kept until the end. Raises `SettingsError` if the port is taken and `LaunchError`
    if a deployment fails.
    """
    check_port(settings.http.host, settings.http.port)
    folder = tempfile.mkdtemp(prefix="octet-", dir="/tmp")
    try:
        # Ray would write a token into the home directory; this one lives and dies with us.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        tell("loading Ray")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
        try:
            tell("starting Ray")
            _start(settings, folder)
            octet = RunningApplication(settings, default_data_folder=f"{folder}/data")
            with contextlib.closing(octet):
                octet.wait(tell)
                yield octet
        finally:
            tell("stopping")
            ray.shutdown()  # the whole Ray is ours: with it end Serve and every replica
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(settings: Settings, folder: str) -> None:
    """Start Ray and Ray Serve. Raises `LaunchError`."""
    import ray
    from ray import serve

    on_terminate = signal.getsignal(signal.SIGTERM)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
            _temp_dir=f"{folder}/ray",  # which Ray opens to everybody; `folder` is ours alone
        )
        address = {"host": settings.http.host, "port": settings.http.port}
        serve.start(http_options=address, logging_config=LOGGING)
    except Exception as error:
        first_line, *_ = str(error).splitlines() or [type(error).__name__]
        raise LaunchError(f"Ray did not start: {first_line}") from error
    finally:
        signal.signal(signal.SIGTERM, on_terminate)  # ray.init puts its own in its place


def _failed(application: Any) -> list[str]:
    """What Ray Serve says of the deployments that do not come up."""
    failed = [
        f"{name}: {_reason(d.message)}"
        for name, d in application.deployments.items()
        if d.status in ("DEPLOY_FAILED", "UNHEALTHY")
    ]
    if not failed and application.status == "DEPLOY_FAILED":
        return [_reason(application.message)]
    return failed


def _reason(message: str) -> str:
    """The line of a deployment's message that says why: a traceback's last one."""
    errors = [line for line in message.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return errors[-1] if errors else " ".join(message.split())


def check_port(host: str, port: int) -> None:
    """Raises `SettingsError` if it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise SettingsError(f"http: cannot listen on {host}:{port}: {reason}") from None
