"""A Ray cluster of several nodes on this machine, whose Generators only wait (`bench.timed`)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve.cli.load_client import LoadClient, TimedRequest
from serve.deployments import DISPATCHER, INGRESS
from serve.launch import ENVIRONMENT, check_port
from serve.settings.application import Settings
from serve.settings.serve_config import serve_config

ROLE = "octet/role"
STORE_BYTES = 80 * 2**20
PATIENCE_S = 120.0


class LocalCluster(contextlib.AbstractContextManager["LocalCluster"]):
    """A head without CPUs, and nodes that are added with a role."""

    def __init__(self, folder: Path) -> None:
        """`folder`: Ray's files; its path must be short, because Ray puts sockets into it."""
        os.environ.update(ENVIRONMENT)  # Ray reads it when it is imported
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        import ray
        from ray._private import utils
        from ray.cluster_utils import Cluster

        # Ray would note this cluster's address, and other programs of this machine would join it.
        utils.write_ray_address = lambda *_: None
        head = {"num_cpus": 0, "num_gpus": 0, "temp_dir": str(folder), "include_log_monitor": False}
        self.ray = Cluster(initialize_head=True, head_node_args=head)
        ray.init(address=self.ray.address, log_to_driver=False, logging_level="error")

    def add(self, role: str, cpus: int) -> Any:
        """Add a node with a role."""
        return self.ray.add_node(
            num_cpus=cpus, num_gpus=0, labels={ROLE: role}, object_store_memory=STORE_BYTES
        )

    def remove(self, node: Any) -> None:
        """Kill the processes of a node."""
        self.ray.remove_node(node, allow_graceful=False)

    def deploy(
        self,
        settings: Settings,
        role_of: Callable[[str], str],
        proxies: str,
        options: dict[str, dict[str, Any]],
    ) -> None:
        """Deploy the settings, and wait until an image is answered.

        `role_of`: returns the role of the nodes for a deployment, by its name. `proxies`: where
        Ray Serve's HTTP proxies run. `options`: further options of deployments.
        """
        from ray import serve
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        check_port(settings.http.host, settings.http.port)
        http = {"host": settings.http.host, "port": settings.http.port}
        serve.start(proxy_location=proxies, http_options=http)
        config = serve_config(settings, "bench.timed:build", pools_start_empty=False)
        for application in config["applications"]:
            for deployment in application["deployments"]:
                name = deployment["name"]
                actor = {"num_cpus": 0.5, "label_selector": {ROLE: role_of(name)}}
                deployment |= {"ray_actor_options": actor, **options.get(name, {})}
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
        asyncio.run(one_image(url_of(settings)))

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()
        self.ray.shutdown()


def front_or_card(deployment: str) -> str:
    """The role of a deployment's nodes: `front` for Ingresses and Dispatcher, else `card`."""
    return "front" if deployment in (INGRESS, DISPATCHER) else "card"


def url_of(settings: Settings) -> str:
    """The address that generates images."""
    return f"http://{settings.http.host}:{settings.http.port}/v1/images/generations"


def body(steps: int) -> dict[str, Any]:
    return {"prompt": "the sea", "num_inference_steps": steps, "size": "64x64", "precision": "fp8"}


async def one_image(url: str) -> None:
    """Wait until an image is answered. Raises `TimeoutError` if that takes too long."""
    client, until = LoadClient(url, {}), time.monotonic() + PATIENCE_S
    code = ""
    while time.monotonic() < until:
        (answer,) = await client.open_loop([TimedRequest(0, "t", body(1))])
        if answer.status == 200:
            return
        code = answer.code
        await asyncio.sleep(0.5)
    raise TimeoutError(f"no image: {code}")


def replicas_of(deployment: str) -> dict[str, tuple[str, int]]:
    """The node and the process of each living replica of a deployment, by the actor's id."""
    import ray

    return {
        actor["ActorID"]: (actor["Address"]["NodeID"], actor["Pid"])
        for actor in ray._private.state.actors().values()
        if actor["State"] == "ALIVE" and f"#{deployment}#" in (actor["Name"] or "")
    }
