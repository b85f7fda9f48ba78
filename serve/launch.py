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
from collections.abc import Callable, Iterator
from typing import Any

from .settings import Settings, SettingsError

APPLICATION = "octet"
OBJECT_STORE_BYTES = 256 * 2**20
POLL_S = 0.25
ANSWER_S = 10.0


class LaunchError(Exception):
    """The application did not come up; the message says what Ray Serve said."""


def serve_config(settings: Settings, *, draining: bool = False) -> dict[str, Any]:
    """The application as Ray Serve's declarative config (`serveConfigV2` on KubeRay).

    A change of `args` restarts every replica; a change of a `user_config` restarts none.
    """
    tuning = settings.tuning(draining=draining)
    application = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": "serve.app:build",
        "args": settings.application().model_dump(mode="json"),
        "deployments": [
            {"name": "Ingress", "user_config": tuning.model_dump(mode="json")},
            {"name": "Dispatcher", "user_config": {"max_queued": tuning.max_queued}},
        ],
    }
    return {"applications": [application]}


class Running:
    """The application on the Ray that this process is connected to."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.url = f"http://{settings.http.host}:{settings.http.port}"
        self._deploy()

    def apply(self, settings: Settings) -> None:
        """Bring it to other settings; returns before it is there.

        What is tuning reaches the replicas as they run; any other change restarts them all. Raises
        `SettingsError` for what belongs to this process.
        """
        if settings.http != self.settings.http:
            raise SettingsError("http: a change needs a restart")
        if settings.data_folder is None:
            settings = settings.model_copy(update={"data_folder": self.settings.data_folder})
        self.settings = settings
        self._deploy()

    def wait(self, tell: Callable[[str], None] = lambda _: None) -> None:
        """Until every pool that a node can hold has a replica; `tell` hears what is awaited.

        Raises `LaunchError` with the message of a deployment that fails.
        """
        from ray import serve

        while True:
            application = serve.status().applications.get(APPLICATION)
            if application is not None:
                failed = _failed(application)
                if failed:
                    raise LaunchError("\n".join(failed))
                if application.status == "RUNNING":
                    pools = self._dispatcher().pools.remote().result(timeout_s=ANSWER_S)
                    awaited = [f"Generator-{p}" for p, s in pools.items() if not s["replicas"]]
                    if not any(s["placeable"] and not s["replicas"] for s in pools.values()):
                        if awaited:
                            tell(f"no node can hold {', '.join(awaited)}: going on without")
                        return
                else:
                    states = application.deployments.items()
                    awaited = [name for name, d in states if d.status != "HEALTHY"]
                tell("waiting for " + (", ".join(awaited) or "the application"))
            time.sleep(POLL_S)

    def drain(self) -> None:
        """Refuse new images; returns when the others are answered, or after `drain_timeout_s`.

        Raises `LaunchError` if the application no longer answers.
        """
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        deadline = time.monotonic() + self.settings.drain_timeout_s
        try:
            self._deploy(draining=True)
            while self._dispatcher().load.remote().result(timeout_s=ANSWER_S):
                if time.monotonic() > deadline:
                    break
                time.sleep(POLL_S)
            serve.delete(APPLICATION)  # waits for the responses that are still being written
        except (RayError, RayServeException, TimeoutError) as error:
            raise LaunchError(f"cannot drain: {type(error).__name__}") from error

    def _deploy(self, *, draining: bool = False) -> None:
        # What `serve run` does; Serve has no public call for it without its dashboard.
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        config = ServeDeploySchema.model_validate(serve_config(self.settings, draining=draining))
        _get_global_client().deploy_apps(config)

    def _dispatcher(self) -> Any:
        from ray import serve

        return serve.get_deployment_handle("Dispatcher", APPLICATION)


@contextlib.contextmanager
def running(settings: Settings, tell: Callable[[str], None] = lambda _: None) -> Iterator[Running]:
    """The application, answering on its URL until the block ends; `tell` hears what is awaited.

    Leaves no process behind, and no file but those in `settings.data_folder`; without one, images
    for URLs are kept until the end. Raises `SettingsError` if the port is taken and `LaunchError`
    if a deployment fails.
    """
    _check_port(settings.http.host, settings.http.port)
    folder = tempfile.mkdtemp(prefix="octet-", dir="/tmp")
    if settings.data_folder is None:
        settings = settings.model_copy(update={"data_folder": f"{folder}/data"})
    try:
        # Ray would write a token into the home directory; this one lives and dies with us.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        tell("loading Ray")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
        try:
            tell("starting Ray")
            _start(settings, folder)
            octet = Running(settings)
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
            _temp_dir=folder,
        )
        serve.start(http_options={"host": settings.http.host, "port": settings.http.port})
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


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise SettingsError(f"http: cannot listen on {host}:{port}: {reason}") from None
