"""A small Kubernetes for tests: its API, KubeRay's operator, and the pods of one RayCluster.

The API has what Ray's autoscaler asks for, over HTTPS: the RayCluster, its pods, and JSON patches.
The operator creates and deletes pods as `reconcilePods` of KubeRay 1.7 does, with in-tree
autoscaling. The containers of a pod are processes of this machine.
"""

from __future__ import annotations

import contextlib
import copy
import json
import signal
import ssl
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import urlsplit

import psutil

HEAD = "headgroup"
PASS_S = 0.2  # between two passes of the operator
END_S = 20.0  # for the containers of a pod to end


@dataclass
class Pod:
    """A pod; `group`: its worker group, or `HEAD`."""

    name: str
    group: str
    containers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    leaving: bool = False  # Kubernetes has noted its deletion, and its containers end

    @property
    def failed(self) -> bool:
        return not self.leaving and any(c.poll() is not None for c in self.containers)

    def as_json(self, cluster: str, version: int) -> dict[str, Any]:
        labels = {
            "ray.io/cluster": cluster,
            "ray.io/node-type": "head" if self.group == HEAD else "worker",
            "ray.io/group": self.group,
        }
        metadata = {"name": self.name, "labels": labels, "resourceVersion": str(version)}
        if self.leaving:
            metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        running: dict[str, Any] = {
            "phase": "Running",
            "containerStatuses": [{"name": "ray", "state": {"running": {}}}],
        }
        status = running if self.containers else {"phase": "Pending"}
        return {"metadata": metadata, "spec": {"containers": [{"name": "ray"}]}, "status": status}


class SmallKubernetes:
    """See the module; runs from `run` to `close`.

    `ray_cluster`: the RayCluster as JSON, with a name and a namespace. `start`: starts the
    containers of a pod. `leave`: the preStop hook of worker pods, which may take long.
    `certificate`: for the API's server. `unschedulable`: the worker groups whose new pods stay
    pending. `created`: the number of pods that the operator has created, by group.
    """

    def __init__(
        self,
        ray_cluster: dict[str, Any],
        start: Callable[[Pod], list[subprocess.Popen[bytes]]],
        leave: Callable[[Pod], None],
        certificate: ssl.SSLContext,
    ) -> None:
        self.ray_cluster, self._start, self._leave = ray_cluster, start, leave
        self.pods: dict[str, Pod] = {}
        self.unschedulable: set[str] = set()
        self.created: Counter[str] = Counter()
        self.answering = threading.Event()
        self.answering.set()
        self.unanswered = 0  # requests that came while the API did not answer
        self._version = 1
        self._lock = threading.RLock()
        self._ended = threading.Event()
        handler = type("Handler", (_Handler,), {"kubernetes": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.socket = certificate.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port
        self._threads = [
            threading.Thread(target=work, daemon=True)
            for work in (self._server.serve_forever, self._operate)
        ]

    def run(self) -> None:
        """Start the API and the operator, which creates the head's pod."""
        for thread in self._threads:
            thread.start()

    # -- the API --------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return str(self.ray_cluster["metadata"]["name"])

    def get(self, path: str) -> dict[str, Any] | None:
        """The object or the list at this path, without namespace and query; None: not found."""
        kind, _, name = path.partition("/")
        with self._lock:
            if path == f"rayclusters/{self.name}":
                return copy.deepcopy(self.ray_cluster)
            pods = {p.name: p.as_json(self.name, self._version) for p in self.pods.values()}
        if kind == "pods" and not name:
            return {
                "metadata": {"resourceVersion": str(self._version)},
                "items": [*pods.values()],
            }
        return pods.get(name) if kind == "pods" else None

    def patch(self, path: str, operations: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Apply a JSON patch of the RayCluster; only `replace` of what is there already."""
        with self._lock:
            if path != f"rayclusters/{self.name}":
                return None
            for operation in operations:
                *parents, last = operation["path"].strip("/").split("/")
                place = self.ray_cluster
                for key in parents:
                    place = place[int(key) if isinstance(place, list) else key]
                if operation["op"] != "replace" or last not in place:
                    raise ValueError(f"not a replacement: {operation}")
                place[last] = operation["value"]
            self._version += 1
            return copy.deepcopy(self.ray_cluster)

    # -- what an operator sees and does ---------------------------------------------------------

    def group(self, name: str) -> dict[str, Any]:
        """The specification of a worker group; changes of it count."""
        groups: list[dict[str, Any]] = self.ray_cluster["spec"]["workerGroupSpecs"]
        return next(group for group in groups if group["groupName"] == name)

    def running(self) -> Counter[str]:
        """The number of running pods that do not leave, by group."""
        with self._lock:
            return Counter(p.group for p in self.pods.values() if p.containers and not p.leaving)

    def names(self, group: str) -> list[str]:
        """The names of a group's pods, those that leave too."""
        with self._lock:
            return [pod.name for pod in self.pods.values() if pod.group == group]

    def delete(self, name: str) -> None:
        """Delete a pod as `kubectl drain` does: its preStop hook runs, then its containers end."""
        with self._lock:
            pod = self.pods.get(name)
            if pod is None or pod.leaving:
                return
            pod.leaving = True
            self._version += 1
        threading.Thread(target=self._end, args=(pod,), daemon=True).start()

    def lose(self, name: str) -> None:
        """End a pod as if its machine were unplugged."""
        with self._lock:
            pod = self.pods.pop(name)
            self._version += 1
        _kill(pod)

    def close(self) -> None:
        """End the operator, the API and all pods."""
        self._ended.set()
        self.answering.set()
        self._threads[1].join()
        self._server.shutdown()
        self._server.server_close()
        for pod in list(self.pods.values()):
            _kill(pod)

    # -- the operator ---------------------------------------------------------------------------

    def _operate(self) -> None:
        while not self._ended.wait(PASS_S):
            with self._lock:
                self._reconcile()

    def _reconcile(self) -> None:
        """One pass; see `reconcilePods` in KubeRay's raycluster_controller.go."""
        for pod in [pod for pod in self.pods.values() if pod.failed]:
            self.pods.pop(pod.name)
            _kill(pod)
        if not any(pod.group == HEAD for pod in self.pods.values()):
            self._create(HEAD)
        for group in self.ray_cluster["spec"]["workerGroupSpecs"]:
            name = group["groupName"]
            deleted = set(group["scaleStrategy"].get("workersToDelete", []))
            for pod in deleted:
                self.delete(pod)
            counted = [
                pod for pod in self.pods.values() if pod.group == name and pod.name not in deleted
            ]  # pods that leave for another reason count
            wanted = min(max(group["replicas"], group["minReplicas"]), group["maxReplicas"])
            for _ in range(wanted - len(counted)):
                self._create(name)
        for pod in self.pods.values():
            if not pod.containers and not pod.leaving and pod.group not in self.unschedulable:
                pod.containers = self._start(pod)
                self._version += 1

    def _create(self, group: str) -> None:
        self.created[group] += 1
        name = f"{self.name}-{group}-{self.created[group]}"
        self.pods[name] = Pod(name, group)
        self._version += 1

    def _end(self, pod: Pod) -> None:
        if pod.containers and pod.group != HEAD:
            self._leave(pod)
        for container in pod.containers:
            container.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            for container in pod.containers:
                container.wait(END_S)
        _kill(pod)
        with self._lock:
            self.pods.pop(pod.name, None)
            self._version += 1


def _kill(pod: Pod) -> None:
    """Kill the containers of a pod and everything that they have started."""
    for container in pod.containers:
        with contextlib.suppress(psutil.NoSuchProcess):
            inside = psutil.Process(container.pid)
            for process in [*inside.children(recursive=True), inside]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        container.wait()


class _Handler(BaseHTTPRequestHandler):
    kubernetes: ClassVar[SmallKubernetes]

    def do_GET(self) -> None:
        self._answer(lambda path: self.kubernetes.get(path))

    def do_PATCH(self) -> None:
        operations = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self._answer(lambda path: self.kubernetes.patch(path, operations))

    def _answer(self, find: Callable[[str], dict[str, Any] | None]) -> None:
        if not self.kubernetes.answering.is_set():
            self.kubernetes.unanswered += 1
            self.kubernetes.answering.wait()
        _, _, path = urlsplit(self.path).path.partition("/namespaces/")
        found = find(path.partition("/")[2])
        body = json.dumps(found or {"reason": "NotFound"}).encode()
        with contextlib.suppress(OSError):  # the client has waited for too long
            self.send_response(200 if found else 404)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""
