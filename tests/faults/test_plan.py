"""Test that Ray puts replicas on the cards that the packing plan of a cluster gives them.

The cards are fake and the replicas only wait (`bench.timed`). The plan is one for SD3.5, and the
placement by Ray is real.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray import serve

from cluster.cost import ImageShape
from cluster.packing import Plan, plan
from cluster.pools import planned_pools
from cluster.ray_nodes import living_nodes
from cluster.serving_options import PlannedModel
from cluster.structure import structure
from serve.cli.plan_inputs import cards_of
from serve.cli.plan_report import as_settings
from serve.launch import RunningApplication
from serve.settings.application import Settings
from serve.settings.file import load_settings

from ..builders import ROOT
from ..ports import free_port
from ..wait import wait_for
from .conftest import add_node, landed

pytestmark = pytest.mark.long  # test_placement.py has replicas on chosen cards, too
TURBO, MEDIUM = "sd3.5-large-turbo", "sd3.5-medium"


def planned_model(model: str, steps: int, rows: int) -> PlannedModel:
    """A model with small images, for which a card gets several replicas.

    Images may have up to 3 · 1024² px, for which a T4 has no room.
    """
    shape = ImageShape(256, 256, 333, rows, steps)
    return PlannedModel(model, structure(model), shape, max_pixels=3 * 1024**2)


def octet(*args: str) -> str:
    """Run an `octet` command and return its output."""
    command = [str(Path(sys.executable).parent / "octet"), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    assert done.returncode == 0, done.stderr
    return done.stdout


def demo_settings(file: Path, planned: Plan) -> None:
    """Write settings with the planned pools; the demo model stands for both models."""
    base = yaml.safe_load((ROOT / "examples" / "laptop.yaml").read_text())
    (demo,) = base["models"]
    demo["source"]["location"] = str(ROOT / "demo" / "model")
    base["text_encoders"][0]["source"] = demo["source"]
    base["models"] = [{**demo, "id": model} for model in (TURBO, MEDIUM)]
    settings = yaml.safe_load(as_settings(planned, base))
    for model in settings["models"]:
        for pool in model["pools"]:
            pool.update(num_cpus=0.1, warm_sizes=[], min_replicas=pool["replicas"])
    file.write_text(yaml.safe_dump({**settings, "http": {"port": free_port()}}))


@pytest.mark.filterwarnings("ignore")  # Ray warns while it starts
def test_replicas_land_where_the_plan_puts_them(
    cluster: Any, tmp_path: Path, deploy: Callable[[Settings], RunningApplication]
) -> None:
    for labels in (
        {"ray.io/accelerator-type": "H100"},
        {"ray.io/accelerator-type": "T4"},
        {"ray.io/accelerator-type": "A100", "octet/card": "a100-80"},
    ):
        add_node(cluster, num_cpus=1, num_gpus=1, labels=labels)
    groups, unknown = cards_of(living_nodes(), reserved_gib=0)
    assert {group.card.id: group.count for group in groups} == {"h100": 1, "t4": 1, "a100-80": 1}
    assert not unknown

    planned = plan(groups, [planned_model(TURBO, 4, 1), planned_model(MEDIUM, 28, 2)])
    pools = planned_pools(planned)
    assert sum(pool.replicas for pool in pools if pool.card == "h100") == 4
    assert not any(pool.card == "t4" for pool in pools)

    # The command `octet plan` finds the same nodes from another process.
    args = "--ray", cluster.address, "--model", MEDIUM, "--encoders-on-cpu", "--json"
    found = json.loads(octet("plan", *args))
    assert {card["card"] for card in found["cards"]} == {"h100", "t4", "a100-80"}

    demo_settings(tmp_path / "planned.yaml", planned)
    settings = load_settings(tmp_path / "planned.yaml", {})
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": settings.http.host, "port": settings.http.port},
    )
    deploy(settings).wait()
    expected: dict[str, Counter[str]] = {}
    for pool in pools:
        precision = "fp8" if pool.recipe == "fp8" else "fp16"
        name = f"Generator-{pool.model}-{precision}-{pool.card}"
        card = {"h100": "H100", "a100-80": "A100"}[pool.card]
        expected[name] = Counter({card: pool.replicas})
    wait_for(lambda: landed() == expected)
    said = octet("doctor", str(tmp_path / "planned.yaml"), "--ray", cluster.address)
    assert f"pool {TURBO}-fp8-h100: 1 of the nodes can hold it" in said
    assert ray.available_resources()["GPU"] >= 1  # the T4's, which nobody has taken
