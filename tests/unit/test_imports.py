"""The rooms of the house: imports run downward, never in a circle, and pure files stay pure."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
# From top to bottom. A file belongs to the longest name that fits, and imports only from its own
# room and from those below it.
ROOMS = (
    *("bench", "demo"),
    *("serve.cli", "k8s", "serve.app", "serve.launch"),
    *("serve.api", "serve.api.wire", "serve.jobs"),
    "serve.quality",
    "serve.engine",
    *("serve.results.cache", "serve.results"),
    *("serve.dispatch.client", "serve.dispatch"),
    *("serve.models", "serve.settings", "serve.tenants", "serve.usage", "serve.store"),
    *("serve.request", "serve.errors", "serve.deployments", "serve.atomic_file"),
    *("serve.edit_pixels", "serve.ray_errors", "serve.metric_catalogue"),
    *("autoscaling.simulation", "autoscaling"),
    "cluster",
)
PACKAGES = ("serve", "cluster", "autoscaling", "k8s", "bench", "demo")
UNIQUE = ("serve", "cluster", "autoscaling")
# A pure file says so in its docstring; it needs neither a clock nor anything that is installed.
PURE_MARK = "Pure: "
NOT_PURE = {"os", "time", "socket", "subprocess", "asyncio", "threading", "logging", "tempfile"}
BLOCKED = "ray", "torch", "starlette", "pydantic"


@functools.cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


@functools.cache
def sources(*packages: str) -> dict[str, str]:
    """Source texts by module name; a package's `__init__` by the package's name."""
    found = {}
    for package in packages:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file.read_text()
    return found


def imports_of(module: str, source: str, known: Mapping[str, str]) -> Iterator[str]:
    """Modules that a module imports anywhere in it; known modules by their full name."""
    package = module if (ROOT / module.replace(".", "/")).is_dir() else module.rpartition(".")[0]
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join((up if node.level else []) + ([node.module] if node.module else []))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in known else base


def graph(texts: Mapping[str, str]) -> dict[str, set[str]]:
    """For each of these modules, the others of them that it imports."""
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


def without_functions(source: str) -> str:
    """The source without its functions, whose imports run only when they are called."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
    return ast.unparse(tree)


def reached(modules: set[str], texts: Mapping[str, str]) -> set[str]:
    """The first names of all modules that these import, directly or through each other."""
    found, waiting = set(modules), list(modules)
    while waiting:
        module = waiting.pop()
        if module in texts:
            new = set(imports_of(module, texts[module], texts)) - found
            found |= new
            waiting += new
    return {module.partition(".")[0] for module in found}


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


def test_exactly_the_pure_files_say_that_they_are_pure() -> None:
    texts = sources(*UNIQUE)
    reasons = impure(texts)
    say = {m for m, text in texts.items() if PURE_MARK in (ast.get_docstring(parsed(text)) or "")}
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


def test_the_gpu_scripts_load_without_ray_and_starlette() -> None:
    """A machine with a GPU may have torch and diffusers only."""
    texts = {m: without_functions(text) for m, text in sources(*PACKAGES).items()}
    loaded = reached({m for m in texts if m.startswith("bench.gpu")}, texts)
    assert "torch" in loaded
    assert {"ray", "starlette"} & loaded == set()


def test_programs_that_start_a_ray_do_not_load_it_before() -> None:
    """Ray reads its environment when it is imported, and `serve.launch` sets it before."""
    texts = {m: without_functions(text) for m, text in sources(*PACKAGES).items()}
    programs = "serve.cli.main", "bench.fairness", "bench.autoscaling_ray", "bench.repeats"
    assert [program for program in programs if "ray" in reached({program}, texts)] == []


def test_no_public_class_name_is_defined_twice() -> None:
    homes: dict[str, list[str]] = {}
    for module, text in sources(*UNIQUE).items():
        for node in parsed(text).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module)
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


# -- the checks themselves ------------------------------------------------------------------------


def test_an_upward_import_is_named_with_both_files() -> None:
    texts = {"cluster.cards": "from serve.errors import did_you_mean", "serve.errors": ""}
    assert upward(graph(texts)) == [
        "cluster.cards imports serve.errors: cluster stands below serve.errors"
    ]


def test_a_circle_is_found_also_inside_functions() -> None:
    texts = {
        "serve.engine.denoiser": "from .preview import x",
        "serve.engine.preview": "def f():\n    from . import denoiser",
    }
    assert set(circle(graph(texts))) == {"serve.engine.denoiser", "serve.engine.preview"}


def test_a_file_is_impure_through_what_it_imports() -> None:
    texts = {
        "serve.request": "from .errors import E",
        "serve.errors": "import time",
        "cluster.cards": "import re",
    }
    assert impure(texts) == {"serve.errors": "time", "serve.request": "serve.errors"}


def test_the_import_blocker_blocks() -> None:
    result = import_blocked(*BLOCKED)
    assert result.returncode == 1
    assert all(f"{name} is blocked" in result.stderr for name in BLOCKED)


PROGRAM = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
failed = False
for module in sys.argv[1:]:
    try:
        __import__(module)
    except ImportError as error:
        print(f"{{module}}: {{error}}", file=sys.stderr)
        failed = True
sys.exit(failed)
"""


def import_blocked(*modules: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - this interpreter, and arguments of the tests
        [sys.executable, "-c", PROGRAM, *modules],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
