"""Running Octet on a Ray of its own on this machine: `octet serve`, the demo, the tests.

Its applications are deployed through Serve's declarative config, as `serve run` and KubeRay do it.
The Ray that is started here has an address, a temporary folder and a token of its own, so it never
meets another Ray of this machine.
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

from .deployments import APPLICATION, DISPATCHER, generator_deployment
from .dispatch.protocol import DispatcherStatus
from .errors import SettingsError
from .settings.application import Settings
from .settings.serve_config import BUILD, LOGGING, serve_config, versions

OBJECT_STORE_BYTES = 256 * 2**20
POLL_S = 0.25
# Environment variables of Ray and Ray Serve; a variable that is set already keeps its value.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a call after the end must not start another Ray
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # On a busy machine an HTTP proxy takes longer to start than the 5 s after which Ray Serve would
    # kill it and give up.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.api.proxy_guard:middlewares",
    # A node that does not answer counts as dead after 4 × (1 s + 2 s), not after 65 s. Until then a
    # Dispatcher on it is missed by everybody.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    # Fill one card after the other, as the packing plan expects, and never move a replica to free a
    # node: the moved replica would have to load its model again.
    "RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY": "1",
    "RAY_SERVE_NODE_COMPACTION_DELAY_S": str(10 * 365 * 24 * 3600),
}
ANSWER_S = 10.0  # time for an answer of the Dispatcher
GLANCE_S = 1.0  # time for an answer that is only shown to the user
SILENT_S = 10.0  # after this time without news, the start says what it waits for
OTHERS_S = 30.0  # wait for the other pools, once every model can be served
LAST_BYTES_S = 2.0  # time for Serve's proxy to send the last bytes


class LaunchError(Exception):
    """Ray or the application does not start or does not answer; the message says why."""


class RunningApplication:
    """The application on the Ray that this process is connected to."""

    def __init__(
        self,
        settings: Settings,
        default_data_folder: str | None = None,
        import_path: str = BUILD,
    ) -> None:
        """Deploy the application.

        `default_data_folder`: the data folder if the settings name none. `import_path`: the
        function that builds the Ray Serve application from its settings.
        """
        self._default_data_folder, self._import_path = default_data_folder, import_path
        self._handle: Any = None
        self.settings = self._deploy(settings)
        self.url = f"http://{settings.http.host}:{settings.http.port}"

    def apply(self, settings: Settings) -> list[str]:
        """Apply changed settings without waiting; return the applications whose replicas restart.

        A new pool and a new set of text encoders count too, because their replicas start. Changed
        live settings reach the running replicas. Raises `SettingsError` if the HTTP address has
        changed, because only a new start can change it.
        """
        if settings.http != self.settings.http:
            raise SettingsError("http: a change needs a restart")
        before = versions(self.settings)
        self.settings = self._deploy(settings)
        after = versions(self.settings)
        return [name for name, version in after.items() if before.get(name) != version]

    def wait(self, on_news: Callable[[str], None] = lambda _: None) -> None:
        """Wait until every pool that should have a replica, and that a node can hold, has one.

        Once no model has to wait for its first replica, the other pools are awaited for at most
        `OTHERS_S`, because the nodes may be full. `on_news` is called with a line for each replica
        that becomes ready, and with what is awaited if there was no news for `SILENT_S`. Raises
        `LaunchError` with Ray Serve's message if a deployment fails.
        """
        from ray import serve

        names = list(versions(self.settings))
        news = _StartNews(on_news)
        news.tell(f"starting {', '.join(names)}")
        served_since: float | None = None
        while True:
            applications = serve.status().applications
            if failed := [line for found in applications.values() for line in _failed(found)]:
                raise LaunchError("\n".join(failed))
            news.count_replicas(applications.values())
            running = {name for name, found in applications.items() if found.status == "RUNNING"}
            if awaited := [name for name in names if name not in running]:
                news.remind(awaited)
            else:
                pools = self._status_at_start().pools
                empty = [name for name, p in pools.items() if p.wanted and not p.replicas]
                coming = {name for name in empty if pools[name].placeable}
                if self._served(empty, coming):
                    served_since = served_since or time.monotonic()
                    if not coming or time.monotonic() - served_since > OTHERS_S:
                        if empty:
                            without = ", ".join(map(generator_deployment, empty))
                            news.tell(f"going on without {without}: no room on any node")
                        return
                news.remind(map(generator_deployment, empty))
            time.sleep(POLL_S)

    def _status_at_start(self) -> DispatcherStatus:
        try:
            return self.status()
        except TimeoutError:
            raise LaunchError(f"the Dispatcher does not answer within {ANSWER_S:g} s") from None

    def known_status(self) -> DispatcherStatus | None:
        """The Dispatcher's status; None if it does not answer within `GLANCE_S`."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            return self.status(GLANCE_S)
        except (RayError, RayServeException, TimeoutError):
            return None

    def drain(self) -> None:
        """Refuse new calls, and wait until the open ones are answered.

        Waits for `drain_timeout_s` at most, and then returns even if calls are open. Raises
        `LaunchError` if the Dispatcher does not answer at the end of that time.
        """
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        deadline = time.monotonic() + self.settings.drain_timeout_s
        still_open = 1
        while still_open:
            try:
                still_open = self._dispatcher().drain.remote().result(timeout_s=ANSWER_S)
            except (RayError, RayServeException, TimeoutError) as error:
                if time.monotonic() > deadline:  # before that, the Dispatcher may be restarting
                    raise LaunchError(f"cannot drain: {type(error).__name__}") from error
            if time.monotonic() > deadline:
                return
            time.sleep(POLL_S)
        time.sleep(LAST_BYTES_S)

    def _served(self, empty: Collection[str], coming: Collection[str]) -> bool:
        """Return whether no model has to wait for its first replica any more.

        `empty`: the pools that lack a replica. `coming`: those of them that a node can hold. A
        model has to wait if all its pools are empty and at least one of them is coming.
        """
        return all(
            not set(pools) <= set(empty) or not set(pools) & set(coming)
            for pools in ([m.pool_name(p) for p in m.pools] for m in self.settings.models)
        )

    def _deploy(self, settings: Settings) -> Settings:
        """Hand the settings to Ray Serve; return them with the default data folder filled in."""
        # `serve run` uses the same client: without its dashboard, Ray Serve has no public call that
        # deploys a config.
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        if settings.data_folder is None:
            settings = settings.model_copy(update={"data_folder": self._default_data_folder})
        config = ServeDeploySchema.model_validate(serve_config(settings, self._import_path))
        _get_global_client().deploy_apps(config)
        return settings

    def close(self) -> None:
        """Close this object's handle to the Dispatcher; the application goes on.

        A handle that stays open would report to Ray for ever.
        """
        if self._handle is not None:
            self._handle.shutdown()

    def status(self, timeout_s: float = ANSWER_S) -> DispatcherStatus:
        """The Dispatcher's status.

        Raises `TimeoutError` if no answer comes within `timeout_s`, and Ray's errors if the
        Dispatcher cannot be reached.
        """
        status: DispatcherStatus = self._dispatcher().state.remote().result(timeout_s=timeout_s)
        return status

    def _dispatcher(self) -> Any:
        from ray import serve

        if self._handle is None:
            self._handle = serve.get_deployment_handle(DISPATCHER, APPLICATION)
        return self._handle


class _StartNews:
    """Lines about the start of the applications: what is new, and what is still awaited."""

    def __init__(self, on_news: Callable[[str], None]) -> None:
        self._on_news, self._told = on_news, time.monotonic()
        self._ready: dict[str, int] = {}  # running replicas by deployment

    def tell(self, line: str) -> None:
        """Tell a line of news."""
        self._on_news(line)
        self._told = time.monotonic()

    def count_replicas(self, applications: Iterable[Any]) -> None:
        """Tell of each deployment that has more running replicas than before."""
        for name, found in (d for one in applications for d in one.deployments.items()):
            ready = found.replica_states.get("RUNNING", 0)
            if ready > self._ready.get(name, 0):
                self.tell(f"{name}: {ready} of {sum(found.replica_states.values())} replicas ready")
            self._ready[name] = ready

    def remind(self, awaited: Iterable[str]) -> None:
        """Tell what is awaited if nothing else was told for `SILENT_S`."""
        if time.monotonic() - self._told > SILENT_S:
            self.tell(f"still waiting for {', '.join(awaited)}")


@contextlib.contextmanager
def run_application(
    settings: Settings,
    on_news: Callable[[str], None] = lambda _: None,
    import_path: str = BUILD,
) -> Iterator[RunningApplication]:
    """Run the application until the `with` block ends.

    `on_news` is called with a line for each step of the start and the stop. Afterwards no process
    is left, and no file outside `settings.data_folder`. If the settings name no data folder, images
    for URLs are kept in a temporary folder until the end. Raises `SettingsError` if the port is
    taken, and `LaunchError` if Ray does not start or a deployment fails.
    """
    check_port(settings.http.host, settings.http.port)
    folder = tempfile.mkdtemp(prefix="octet-", dir="/tmp")
    try:
        # Ray would write a token into the home directory; this one lasts as long as the process.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        on_news("loading Ray")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
        try:
            on_news("starting Ray")
            _start(settings, folder)
            _check_encoders(settings, ray.cluster_resources().get("GPU", 0.0))
            octet = RunningApplication(settings, f"{folder}/data", import_path)
            with contextlib.closing(octet):
                octet.wait(on_news)
                yield octet
        finally:
            on_news("stopping")
            ray.shutdown()  # ends Serve and every replica with it
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(settings: Settings, folder: str) -> None:
    """Start Ray and Ray Serve, with Ray's files in `folder`.

    Raises `LaunchError` if one of them does not start.
    """
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
            # Ray lets everybody read its folder, but `folder` itself is this user's alone.
            _temp_dir=f"{folder}/ray",
        )
        address = {"host": settings.http.host, "port": settings.http.port}
        serve.start(http_options=address, logging_config=LOGGING)
    except Exception as error:
        first_line, *_ = str(error).splitlines() or [type(error).__name__]
        raise LaunchError(f"Ray did not start: {first_line}") from error
    finally:
        signal.signal(signal.SIGTERM, on_terminate)  # ray.init replaces the handler


def _check_encoders(settings: Settings, gpus: float) -> None:
    """Raise `LaunchError` if text encoders need a GPU and there is none: they would never start.

    Pools that no node can hold are gone without; the others may still be served.
    """
    for encoder in settings.text_encoders:
        if encoder.num_gpus and not gpus:
            raise LaunchError(
                f"text encoder {encoder.id} takes {encoder.num_gpus:g} GPU, and this machine has "
                "none: octet doctor CONFIG says what this machine can serve"
            )


def _failed(application: Any) -> list[str]:
    """Ray Serve's messages about deployments, or an application, that do not start."""
    failed = [
        f"{name}: {_reason(d.message)}"
        for name, d in application.deployments.items()
        if d.status in ("DEPLOY_FAILED", "UNHEALTHY")
    ]
    if not failed and application.status == "DEPLOY_FAILED":
        return [_reason(application.message)]
    return failed


def _reason(message: str) -> str:
    """The last line of a message that begins with an exception's name, else the whole message."""
    errors = [line for line in message.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return errors[-1] if errors else " ".join(message.split())


def check_port(host: str, port: int) -> None:
    """Raise `SettingsError` if the address cannot be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise SettingsError(
                f"cannot listen on {host}:{port}: {reason}; choose another http.port in the "
                "settings, or octet demo --port"
            ) from None
