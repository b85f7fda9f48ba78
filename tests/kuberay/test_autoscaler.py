"""Ray's autoscaler for KubeRay adds and removes pods for Octet's pools, and no request fails.

The autoscaler is the process that KubeRay runs beside the head, with Ray's `KubeRayProvider`. What
it talks to is `small_kubernetes`. Its pods are raylets with the overlay's labels and fake cards.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from serve.settings.application import Settings

from ..overlay import Clients, config_of
from ..wait import wait_for
from .conftest import RenderedCluster
from .small_kubernetes import HEAD

FIRST = Counter({HEAD: 1, "front": 2, "h100": 1})
WITH_A100 = FIRST + Counter({"a100": 1})


def with_short_waits(settings: Settings) -> Settings:
    """Pools of one replica, which lose it soon after their last image if they may."""
    models = tuple(
        model.model_copy(
            update={"pools": tuple(p.model_copy(update={"replicas": 1}) for p in model.pools)}
        )
        for model in settings.models
    )
    quick = settings.autoscaling.model_copy(update={"hold_s": 1.0, "idle_s": 0.0, "keep_s": 0.0})
    return settings.model_copy(update={"models": models, "autoscaling": quick})


@pytest.mark.long
def test_pods_come_and_go_with_the_work_and_no_request_fails(
    rendered: RenderedCluster, request: pytest.FixtureRequest
) -> None:
    kubernetes, pods, operator = rendered.kubernetes, rendered.pods, rendered.operator
    config = config_of(with_short_waits(rendered.settings))
    headers = {"authorization": f"Bearer {rendered.key}"}
    background = ThreadPoolExecutor()
    request.addfinalizer(background.shutdown)

    def on_a100() -> httpx.Response:
        """Ask for an image of the pool that sleeps, and whose card no pod has."""
        body: dict[str, Any] = {"prompt": "x", "model": "sd3.5-large", "precision": "fp16"}
        url = f"{rendered.url}/v1/images/generations"
        return httpx.post(url, json=body, headers=headers, timeout=300)

    # The pools that must not sleep get their pod.
    wait_for(lambda: kubernetes.running() >= Counter({HEAD: 1, "front": 2}))
    wait_for(lambda: len(pods.nodes()) == 3)
    operator.deploy(config)
    wait_for(lambda: operator.running(config))
    assert kubernetes.running() == FIRST
    clients = Clients(rendered.url, rendered.key, 2, precision="fp8")
    request.addfinalizer(clients.end)

    # A request wakes a pool, whose pod comes. Both go when nothing is left to do.
    assert on_a100().status_code == 200
    assert kubernetes.running() == WITH_A100
    wait_for(lambda: not kubernetes.names("a100"))
    assert kubernetes.group("a100")["replicas"] == 0

    # No machine is there for the pod: the request waits until one is.
    kubernetes.unschedulable.add("a100")
    waiting = background.submit(on_a100)
    wait_for(lambda: len(kubernetes.names("a100")) == 1)
    before = clients.answers["ok"]
    wait_for(lambda: clients.answers["ok"] > before + 4)
    assert not waiting.done()
    kubernetes.unschedulable.clear()
    assert waiting.result().status_code == 200
    wait_for(lambda: not kubernetes.names("a100"))

    # The API does not answer for a while: nothing changes, and afterwards pods come again.
    kubernetes.answering.clear()
    waiting = background.submit(on_a100)
    wait_for(lambda: kubernetes.unanswered >= 3)
    assert kubernetes.running() == FIRST
    kubernetes.answering.set()
    assert waiting.result().status_code == 200
    wait_for(lambda: not kubernetes.names("a100"))

    # The head is lost. Requests are served meanwhile, no pod restarts, and pods still come.
    (head,) = kubernetes.names(HEAD)
    created = kubernetes.created.copy()
    kubernetes.lose(head)
    wait_for(lambda: operator.running(config))
    assert on_a100().status_code == 200
    wait_for(lambda: not kubernetes.names("a100"))
    assert kubernetes.running() == FIRST
    assert kubernetes.created - created == Counter({HEAD: 1, "a100": 1})

    # A node is cordoned. Another pod takes over its work, and its own pod goes when it is idle.
    (card,) = kubernetes.names("h100")
    created = kubernetes.created.copy()
    url = f"{rendered.url}/v1/nodes/{pods.nodes()[card]}/cordon"
    answer = httpx.put(url, json={"reason": "a test"}, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    wait_for(lambda: card not in kubernetes.names("h100"))
    wait_for(lambda: operator.running(config))
    assert kubernetes.running() == FIRST
    assert kubernetes.created - created == Counter({"h100": 1})

    # A machine is drained, whose pod had work. Another pod takes the work over.
    (card,) = kubernetes.names("h100")
    created = kubernetes.created.copy()
    kubernetes.delete(card)
    wait_for(lambda: card not in kubernetes.names("h100"))
    wait_for(lambda: operator.running(config))
    wait_for(lambda: kubernetes.running() == FIRST and kubernetes.group("h100")["replicas"] == 1)
    assert kubernetes.created - created == Counter({"h100": 2})

    answered = clients.end()
    assert set(answered) == {"ok"}, answered
