"""The commands of the README and of the API's page: each is run as it is printed."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from ..builders import ROOT
from ..pages import Shell


@pytest.mark.parametrize("name", ["README.md", "docs/api.md"])
def test_the_commands_of_a_page_work_as_printed(name: str, url: str, tmp_path: Path) -> None:
    with Shell(tmp_path, {8000: urlsplit(url).port or 0}) as shell:
        shell.run_page(ROOT / name)
    for file in ("ocean.png", "mountains-0.png", "mountains-1.png") if "api" in name else ():
        with Image.open(tmp_path / file) as image:
            assert image.size in ((192, 128), (128, 128))
