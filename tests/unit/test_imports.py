"""The rooms of the house: imports run downward, never in a circle, and pure files stay pure."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From top to bottom. A file belongs to the longest name that fits, and imports only from its own
# room and from those below it.
ROOMS = (
    *("bench", "demo"),
    *("serve.cli", "k8s", "serve.app", "serve.launch"),
    *("serve.api", "serve.api.wire"),
    "serve.engine",
    *("serve.results.cache", "serve.results"),
    *("serve.dispatch.client", "serve.dispatch"),
    *("serve.models", "serve.settings", "serve.tenants", "serve.usage"),
    *("serve.request", "serve.errors", "serve.deployments", "serve.atomic_file"),
    *("serve.ray_errors", "serve.metric_catalogue"),
    *("autoscaling.simulation", "autoscaling"),
    "cluster",
)
PACKAGES = ("serve", "cluster", "autoscaling", "k8s", "bench", "demo")
UNIQUE = ("serve", "cluster", "autoscaling")
# A pure file says so in its docstring; it needs neither a clock nor anything that is installed.
PURE_MARK = "Pure: "
NOT_PURE = {"os", "time", "socket", "subprocess", "asyncio", "threading", "logging", "tempfile"}
BLOCKED = "ray", "torch", "starlette", "pydantic"


def sources(*packages: str) -> dict[str, str]:
    """Source texts by module name; a package's `__init__` by the package's name."""
    found = {}
    for package in packages:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file.read_text()
    return found


def imports_of(module: str, source: str, known: Mapping[str, str]) -> Iterator[str]:
    """Modules that a module imports, anywhere in it; of ours by their full name."""
    package = module if (ROOT / module.replace(".", "/")).is_dir() else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join((up if node.level else []) + ([node.module] if node.module else []))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in known else base


def graph(texts: Mapping[str, str]) -> dict[str, set[str]]:
    """Which of these modules imports which others of them."""
    return {
        module: {name for name in imports_of(module, text, texts) if name in texts} - {module}
        for module, text in texts.items()
    }


def room_of(module: str) -> str:
    fitting = [room for room in ROOMS if f"{module}.".startswith(f"{room}.")]
    return max(fitting, key=len, default="")


def upward(imports: Mapping[str, set[str]]) -> list[str]:
    order = {room: place for place, room in enumerate(ROOMS)}
    return [
        f"{module} imports {other}: {room_of(module)} stands below {room_of(other)}"
        for module, others in imports.items()
        for other in sorted(others)
        if order.get(room_of(module), -1) > order.get(room_of(other), len(ROOMS))
    ]


def circle(imports: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; none if there is no circle."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def impure(texts: Mapping[str, str]) -> dict[str, str]:
    """For each module that is not pure, one import that makes it so."""
    reasons: dict[str, str] = {}
    imports = {module: set(imports_of(module, text, texts)) for module, text in texts.items()}
    for module, names in imports.items():
        for name in sorted(names - texts.keys()):
            top = name.partition(".")[0]
            if top in NOT_PURE or top not in sys.stdlib_module_names:
                reasons.setdefault(module, name)
    changed = True
    while changed:
        changed = False
        for module, names in imports.items():
            bad = sorted(name for name in names if name in reasons)
            if bad and module not in reasons:
                reasons[module], changed = bad[0], True
    return reasons


def test_every_file_is_in_a_room() -> None:
    homeless = [module for module in sources(*PACKAGES) if "." in module and not room_of(module)]
    assert homeless == []


def test_imports_run_downward() -> None:
    assert upward(graph(sources(*PACKAGES))) == []


def test_no_imports_run_in_a_circle() -> None:
    assert circle(graph(sources(*PACKAGES))) == []


def test_files_that_say_that_they_are_pure_are_pure_and_no_others_are() -> None:
    texts = sources(*UNIQUE)
    reasons = impure(texts)
    say = {
        m for m, text in texts.items() if PURE_MARK in (ast.get_docstring(ast.parse(text)) or "")
    }
    files = {m for m in texts if (ROOT / m.replace(".", "/")).with_suffix(".py").is_file()}
    broken = [
        f"{module} says that it is pure and imports {reasons[module]}"
        for module in sorted(say & reasons.keys())
    ]
    silent = [
        f"{module} is pure and does not say so" for module in sorted(files - reasons.keys() - say)
    ]
    assert broken + silent == []


def test_pure_files_import_without_ray_torch_starlette_and_pydantic() -> None:
    texts = sources(*UNIQUE)
    result = import_blocked(*sorted(texts.keys() - impure(texts).keys()))
    assert result.returncode == 0, result.stderr


def test_no_public_class_name_is_defined_twice() -> None:
    homes: dict[str, list[str]] = {}
    for module, text in sources(*UNIQUE).items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module)
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


# -- the keeper itself ----------------------------------------------------------------------------


def test_an_upward_import_is_named_with_both_files() -> None:
    texts = {"cluster.cards": "from serve.errors import did_you_mean", "serve.errors": ""}
    assert upward(graph(texts)) == [
        "cluster.cards imports serve.errors: cluster stands below serve.errors"
    ]


def test_a_circle_is_found_also_inside_functions() -> None:
    texts = {
        "serve.engine.sd3": "from .preview import x",
        "serve.engine.preview": "def f():\n    from . import sd3",
    }
    assert set(circle(graph(texts))) == {"serve.engine.sd3", "serve.engine.preview"}


def test_a_file_is_impure_through_what_it_imports() -> None:
    texts = {
        "serve.request": "from .errors import E",
        "serve.errors": "import time",
        "cluster.cards": "import re",
    }
    assert impure(texts) == {"serve.errors": "time", "serve.request": "serve.errors"}


@pytest.mark.parametrize("name", BLOCKED)
def test_the_blocking_blocks(name: str) -> None:
    result = import_blocked(name)
    assert f"{name} is blocked" in result.stderr


PROGRAM = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
for module in sys.argv[1:]:
    __import__(module)
"""


def import_blocked(*modules: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - our own interpreter and arguments
        [sys.executable, "-c", PROGRAM, *modules],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
