"""The commands of the documentation that need no replica: each is run as it is printed."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import yaml

from serve.models import reference_work
from serve.settings.file import load_settings

from ..builders import DEMO_MODEL, ROOT
from ..pages import Shell, blocks, check_output
from ..ports import free_port
from ..wait import wait_for
from .edge import Edge, started

DIGEST = "sha256:" + "0" * 64
IMAGES = dict.fromkeys(("CUDA_IMAGE", "CPU_IMAGE"), f"registry.example/octet@{DIGEST}")
WITHOUT_SERVER = "adopting", "autoscaling", "cards", "images", "models", "runbook", "settings"


@pytest.mark.parametrize("name", WITHOUT_SERVER)
def test_the_commands_of_a_page_work_as_printed(name: str, tmp_path: Path) -> None:
    with Shell(tmp_path, {9000: free_port()}, **IMAGES) as shell:
        shell.run_page(ROOT / "docs" / f"{name}.md")


def test_the_commands_about_tenants_work_as_printed(tmp_path: Path) -> None:
    """The Ingress and the Dispatcher are real, and so are the predicted costs of the demo model."""
    page = ROOT / "docs" / "tenants.md"
    laptop = yaml.safe_load((ROOT / "examples" / "laptop.yaml").read_text())
    for part in (*laptop["models"], *laptop["text_encoders"]):
        part["source"]["location"] = str(DEMO_MODEL)
    shown = next(block for block in blocks(page) if block.mark == "settings")
    file = tmp_path / "octet.yaml"
    file.write_text(yaml.safe_dump({**laptop, **yaml.safe_load(shown.text)}))
    settings = load_settings(file, {})
    with (
        started(settings, units=reference_work.units) as edge,
        Shell(tmp_path, {8000: edge.port}) as shell,
    ):
        printed = ""
        for block in blocks(page):
            if block.mark == "run":
                printed = shell.run(block)
                for name in ("OPERATOR_KEY", "TENANT_KEY"):
                    if f"export {name}=" in block.text:
                        wait_until_known(edge, shell.variable(name))
            elif block.mark == "output":
                check_output(block, printed)


def wait_until_known(edge: Edge, key: str) -> None:
    """Wait until the Ingress knows a new key."""
    headers = {"authorization": f"Bearer {key}"}
    wait_for(lambda: httpx.get(f"{edge.url}/v1/models", headers=headers).status_code == 200)
