"""The documentation agrees with the tree: rooms, links, settings, and the names of commands."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from serve.cli.main import app
from serve.quality.suites import load_suite
from serve.settings.application import Settings
from serve.tenants.files import TENANTS, read_tenants

from ..builders import DEMO_MODEL, ROOT
from ..pages import PAGES, Block, blocks

BLOCKS = [block for page in PAGES for block in blocks(page)]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_code_is_fenced(page: Path) -> None:
    """An indented block would have no mark that says whether a test runs it."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert re.findall(r"\n\n {4}.*", text) == []


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_every_block_says_what_tests_do_with_it(block: Block) -> None:
    if block.language in ("sh", "python"):
        assert re.fullmatch(r"run|not run, because \w.+", block.mark), block
    else:
        assert block.mark in ("", "output", "settings", "model", "suite", "tenants"), block


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "yaml"], ids=lambda block: block.name
)
def test_settings_in_the_docs_are_valid(block: Block, tmp_path: Path) -> None:
    if block.mark == "tenants":
        (tmp_path / TENANTS).write_text(block.text)
        assert read_tenants(tmp_path)
        return
    if block.mark == "suite":
        (tmp_path / "suite.yaml").write_text(block.text)
        assert load_suite(str(tmp_path / "suite.yaml")).prompts
        return
    laptop = yaml.safe_load((ROOT / "examples" / "laptop.yaml").read_text())
    for part in (*laptop["models"], *laptop["text_encoders"]):
        part["source"]["location"] = str(DEMO_MODEL)
    changes = yaml.safe_load(block.text)
    if block.mark == "model":
        laptop["models"][0] |= changes
        changes = {}
    assert Settings.model_validate({**laptop, "data_folder": "data", **changes})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_the_text_names_exist(page: Path) -> None:
    """Check the command and the options of each `octet …` in the text."""
    for line in re.findall(r"`octet ([a-zC][^`]*)`", page.read_text(encoding="utf-8")):
        command, (word, *rest) = get_command(app), line.replace("COMMAND ", "").split()
        while hasattr(command, "commands") and not word.startswith("-"):
            assert word in command.commands, f"octet {line}"
            command = command.commands[word]
            word, rest = (rest[0], rest[1:]) if rest else ("-", [])
        options = {name for param in command.params for name in param.opts}
        options |= {"--help", "--install-completion"}
        given = {part.partition("=")[0] for part in line.split() if part.startswith("--")}
        assert given <= options, f"octet {line}"
