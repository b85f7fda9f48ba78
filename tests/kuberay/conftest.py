"""Fixtures: the overlay mixed-gpu on a small Kubernetes, whose pods are raylets of this machine."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from bench.tenants import add_tenants
from serve.launch import ENVIRONMENT
from serve.settings.application import Settings

from ..builders import ROOT
from ..kubernetes import kustomize
from ..overlay import OVERLAY, Operator, on_this_machine
from ..ports import free_port
from ..redis_server import RedisServer
from ..s3 import a_bucket, s3_server
from .small_kubernetes import HEAD, Pod, SmallKubernetes

BIN = Path(sys.executable).parent
STORE_BYTES = 80 * 2**20
IDLE_S = 4  # instead of the minutes for which the overlay keeps an unused pod
# The overlay's own values would make the test wait.
QUICK = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "KUBERAY_REQUEST_TIMEOUT_S": "2"}
AUTOSCALER = """
import sys
from ray.autoscaler._private.kuberay.run_autoscaler import run_kuberay_autoscaler
run_kuberay_autoscaler(*sys.argv[1:])
"""


class RayPods:
    """The containers of a RayCluster's pods, as processes: `ray start` and Ray's autoscaler.

    They get the arguments and the environment that KubeRay gives to its containers.
    """

    def __init__(self, ray_cluster: dict[str, Any], folder: Path, redis: RedisServer) -> None:
        self.ray_cluster, self._folder = ray_cluster, folder
        self.port, self.dashboard_port = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.api_environment: dict[str, str] = {}
        self._environment = {
            **os.environ,
            **ENVIRONMENT,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "RAY_TMPDIR": str(folder),
            "RAY_enable_autoscaler_v2": "1",
            "RAY_REDIS_ADDRESS": f"127.0.0.1:{redis.port}",
            "RAY_external_storage_namespace": "octet",
            "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "8",  # instead of 30
        }

    def start(self, pod: Pod) -> list[subprocess.Popen[bytes]]:
        """Start the containers of a pod; return none while they wait for the head."""
        if pod.group == HEAD:
            # A new pod has a file system of its own, without the note of the head before it.
            (self._folder / "ray_current_cluster").unlink(missing_ok=True)
            return [
                self._run(
                    pod,
                    *("ray", "start", "--head", "--block", "--no-monitor"),
                    *("--port", str(self.port), "--node-ip-address", "127.0.0.1"),
                    *("--dashboard-port", str(self.dashboard_port)),
                    *("--temp-dir", str(self._folder), "--num-cpus", "0", "--num-gpus", "0"),
                ),
                self._run(
                    pod, sys.executable, "-c", AUTOSCALER, *self._cluster(), self.address,
                    **self._autoscaler_environment(),
                ),
            ]  # fmt: skip
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)):
                return []  # KubeRay's init container waits for the head
        group = self._group(pod)
        resources = group["resources"]
        labels = ",".join(f"{key}={value}" for key, value in group["labels"].items())
        return [
            self._run(
                pod,
                *("ray", "start", "--block", "--address", self.address),
                *("--node-ip-address", "127.0.0.1", "--labels", labels),
                *("--num-cpus", resources["CPU"], "--num-gpus", resources["GPU"]),
            )
        ]

    def leave(self, pod: Pod) -> None:
        """Run the preStop hook of a worker pod."""
        container = self._group(pod)["template"]["spec"]["containers"][0]
        command = container["lifecycle"]["preStop"]["exec"]["command"]
        if node := self.nodes().get(pod.name):
            subprocess.run(  # noqa: S603 - the overlay's
                [*command, "--node", node],
                env={**self._environment, "RAY_ADDRESS": self.address},
                stdout=self._log(pod),
                stderr=subprocess.STDOUT,
                check=False,
            )

    def nodes(self) -> dict[str, str]:
        """The ids that Ray gives to its living nodes, by the names of their pods."""
        from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled

        nodes = GcsClient(address=self.address).get_all_node_info(timeout=30).values()
        return {node.instance_id: node.node_id.hex() for node in nodes if node.state == 0}

    def _run(self, pod: Pod, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        if command[0] == "ray":
            command = (
                *command,
                *("--object-store-memory", str(STORE_BYTES), "--disable-usage-stats"),
                *("--dashboard-agent-listen-port", str(free_port())),
                *("--min-worker-port", "0", "--max-worker-port", "0"),
            )
        names = {"RAY_CLOUD_INSTANCE_ID": pod.name, "RAY_NODE_TYPE_NAME": pod.group}
        return subprocess.Popen(  # noqa: S603 - Ray's
            command,
            env={**self._environment, **names, **environment},
            stdout=self._log(pod),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _log(self, pod: Pod) -> int:
        return os.open(self._folder / f"{pod.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def _group(self, pod: Pod) -> dict[str, Any]:
        groups: list[dict[str, Any]] = self.ray_cluster["spec"]["workerGroupSpecs"]
        return next(group for group in groups if group["groupName"] == pod.group)

    def _cluster(self) -> tuple[str, str]:
        metadata = self.ray_cluster["metadata"]
        return metadata["name"], metadata["namespace"]

    def _autoscaler_environment(self) -> dict[str, str]:
        options = self.ray_cluster["spec"]["autoscalerOptions"]
        overlays = {one["name"]: one["value"] for one in options["env"]}
        metrics = {"AUTOSCALER_METRIC_PORT": str(free_port())}
        return {**overlays, **QUICK, **metrics, **self.api_environment}


class RenderedCluster:
    """The overlay's cluster: `kubernetes` and `pods` run, and nothing is deployed yet.

    `key`: an operator's API key. `operator`: Ray's REST API.
    """

    def __init__(self, kubernetes: SmallKubernetes, pods: RayPods, settings: Settings) -> None:
        self.kubernetes, self.pods, self.settings = kubernetes, pods, settings
        keys = add_tenants(settings.database or {}, {"acme": {"operator": True}})
        self.key = keys["acme"]
        self.operator = Operator(pods.dashboard_port)
        self.url = f"http://127.0.0.1:{settings.http.port}"


def rendered_ray_cluster() -> dict[str, Any]:
    """The overlay's RayCluster, with the defaults that KubeRay adds and short idle times."""
    (service,) = [one for one in kustomize(OVERLAY) if one["kind"] == "RayService"]
    spec = service["spec"]["rayClusterConfig"]
    for group in spec["workerGroupSpecs"]:
        group.setdefault("replicas", group["minReplicas"])
        group.update(scaleStrategy={}, idleTimeoutSeconds=IDLE_S)
    return {"metadata": {"name": "octet", "namespace": "octet", "resourceVersion": "1"},
            "spec": spec}  # fmt: skip


@pytest.fixture
def rendered() -> Iterator[RenderedCluster]:
    ray_cluster = rendered_ray_cluster()
    authority = trustme.CA()
    certificate = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(certificate)
    redis = RedisServer()
    # The path is short because Ray puts sockets into it.
    with (
        tempfile.TemporaryDirectory(
            prefix="octet-", dir="/tmp", ignore_cleanup_errors=True
        ) as temporary,
        s3_server() as endpoint,
        authority.cert_pem.tempfile() as trusted,
        authority.issue_cert("autoscaler").private_key_and_cert_chain_pem.tempfile() as client,
    ):
        folder = Path(temporary)
        settings = on_this_machine(
            folder, a_bucket(endpoint).model_dump(exclude_unset=True), redis.url
        )
        pods = RayPods(ray_cluster, folder, redis)
        pods.api_environment.update(
            KUBERNETES_SERVICE_HOST="127.0.0.1",
            RAY_KUBERAY_CA_CERT_PATH=trusted,
            RAY_KUBERAY_CLIENT_CERT_PATH=client,
            RAY_KUBERAY_CLIENT_KEY_PATH=client,
        )
        kubernetes = SmallKubernetes(ray_cluster, pods.start, pods.leave, certificate)
        pods.api_environment["KUBERNETES_SERVICE_PORT_HTTPS"] = str(kubernetes.port)
        cluster = RenderedCluster(kubernetes, pods, settings)
        kubernetes.run()
        try:
            yield cluster
        finally:
            cluster.operator.close()
            kubernetes.close()
            redis.close()
