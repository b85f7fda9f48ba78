"""The documentation agrees with the tree: the README's table of rooms, and every relative link."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

from ..builders import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def test_the_readmes_table_of_rooms_says_what_their_first_lines_say() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w/.]+)` \| (.+) \|$", text, re.MULTILINE))
    described = {
        place: file
        for place in rows
        if (file := ROOT / place / "__init__.py" if place.endswith("/") else ROOT / place).is_file()
        and not place.startswith("tests")
    }
    assert len(described) > 20
    for place, file in described.items():
        first_line = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]
        assert rows[place] == first_line
    for package in ("serve", "cluster", "autoscaling", "k8s", "bench", "demo"):
        for init in (ROOT / package).rglob("__init__.py"):
            assert f"{init.parent.relative_to(ROOT)}/" in described


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_picture_of_the_request_path_is_the_one_of_its_script() -> None:
    """`python docs/request_path.py` draws it."""
    script = runpy.run_path(str(ROOT / "docs" / "request_path.py"))
    assert script["OUT"].read_text(encoding="utf-8") == script["svg"]()
