"""The code blocks of the documentation, and a shell that runs them.

The line that opens a block says what tests do with it:

    ```sh run                      the commands are run; all of them must succeed
    ```text output                 the block before has printed these lines, in this order, perhaps
                                   with others between them; … stands for any text
    ```python run                  like `sh run`; the blocks of a page share their variables
    ```sh not run, because REASON
    ```yaml settings               these keys are valid settings
    ```yaml tenants                these are valid tenants
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Self

from .builders import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"( *)```(\w*) *(.*)")
END = "-- end of the block --"
# Runs the file that each line of its input names; all have the same variables.
PYTHON = f"""
import sys
shared = {{}}
for line in sys.stdin:
    with open(line.strip()) as file:
        exec(compile(file.read(), file.name, "exec"), shared)
    print({END!r}, flush=True)
"""


class Block(NamedTuple):
    """A fenced block; `line`: where it begins. `mark`: the words behind the language."""

    page: Path
    line: int
    language: str
    mark: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    found, opened, inside = [], None, list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = FENCE.fullmatch(line)
        if fence and opened is None:
            opened, inside = (number, fence), []
        elif fence and opened:
            begins, (indent, language, mark) = opened[0], opened[1].groups()
            text = "\n".join(one.removeprefix(indent) for one in inside)
            found.append(Block(page, begins, language, mark, text))
            opened = None
        elif opened:
            inside.append(line)
    assert opened is None, f"{page}: a block is not closed"
    return found


def check_output(block: Block, printed: str) -> None:
    """Check that the lines of an output block were printed, in their order."""
    lines = iter(printed.splitlines())
    for expected in block.text.splitlines():
        pattern = ".*".join(map(re.escape, expected.rstrip().split("…")))
        fits = any(re.fullmatch(pattern, line.rstrip()) for line in lines)
        assert fits, f"{block.name}: not printed: {expected}\n{printed}"


class Shell:
    """Runs the blocks of one page in a folder that looks like the repository's.

    What the commands write stays there. `ports`: the port that stands for a port of the page.
    """

    def __init__(self, folder: Path, ports: Mapping[int, int], **environ: str) -> None:
        self._folder, self._ports = folder, ports
        for entry in ROOT.iterdir():
            if entry.name != "k8s":
                (folder / entry.name).symlink_to(entry)
        shutil.copytree(ROOT / "k8s", folder / "k8s")
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._environ: dict[str, str] = {**os.environ, "PATH": path, "COLUMNS": "112", **environ}
        self._shell = self._start(["bash", "-eo", "pipefail"])
        self._python: subprocess.Popen[str] | None = None

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(  # noqa: S603 - bash and this interpreter
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self._folder,
            env=self._environ,
            start_new_session=True,
        )

    def run(self, block: Block) -> str:
        """Run a block; return what it printed."""
        text = re.sub(
            r"(127\.0\.0\.1:|-p )(\d+)", lambda m: f"{m[1]}{self._ports[int(m[2])]}", block.text
        )
        file = self._folder / f"block-{block.line}"
        file.write_text(text + "\n", encoding="utf-8")
        if block.language == "sh":
            return self._ask(
                self._shell, f"source ./{file.name} </dev/null; echo '{END}'", block.name
            )
        if self._python is None:
            self._environ |= self._variables()
            self._python = self._start([sys.executable, "-W", "ignore", "-c", PYTHON])
        return self._ask(self._python, str(file), block.name)

    def variable(self, name: str) -> str:
        """The value of a variable that the commands have exported."""
        return self._variables()[name]

    def _variables(self) -> dict[str, str]:
        lines = self._ask(self._shell, f"env; echo '{END}'", "env").splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def _ask(self, process: subprocess.Popen[str], line: str, name: str) -> str:
        assert process.stdin
        assert process.stdout
        process.stdin.write(line + "\n")
        process.stdin.flush()
        printed = ""
        for out in process.stdout:
            if out.rstrip("\n").endswith(END):
                return printed + out.rstrip("\n").removesuffix(END)
            printed += out
        raise AssertionError(f"{name} failed:\n{printed}")

    def run_page(self, page: Path) -> None:
        """Run the blocks of a page, and compare what they print with its output blocks."""
        printed = ""
        for block in blocks(page):
            if block.mark == "run":
                printed = self.run(block)
            elif block.mark == "output":
                check_output(block, printed)

    def close(self) -> None:
        """End the interpreters and what they have started."""
        for process in filter(None, (self._shell, self._python)):
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
