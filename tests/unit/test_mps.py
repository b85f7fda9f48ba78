"""Tests of `cluster.mps` with a program that stands for NVIDIA's daemon."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import mps
from cluster.mps import MpsError

# A daemon is there while its file is. Each start is a line in `starts`, with the cards it serves.
PROGRAM = """#!/bin/sh
cd "$CUDA_MPS_PIPE_DIRECTORY" || exit 1
if [ "$1" = -d ]; then
  [ -e broken ] && echo "no permission" >&2 && exit 1
  sleep 0.2
  echo "cards:$CUDA_VISIBLE_DEVICES" >> starts
  touch daemon
else
  read -r command
  [ -e daemon ] || exit 1
  [ "$command" = quit ] && rm daemon
  exit 0
fi
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the daemon's pipes, on a node that has the program."""
    program = tmp_path / "bin" / mps.CONTROL
    program.parent.mkdir()
    program.write_text(PROGRAM)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return tmp_path / "mps"


def test_replicas_of_a_node_share_one_daemon_that_serves_all_cards(folder: Path) -> None:
    program = (
        "import sys, pathlib, os; from cluster import mps;"
        f"mps.join(pathlib.Path({str(folder)!r}));"
        "print(os.environ['CUDA_MPS_PIPE_DIRECTORY'])"
    )
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "1"}
    replicas = [
        subprocess.Popen(  # noqa: S603 - this interpreter
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environ
        )
        for _ in range(3)
    ]
    assert [replica.communicate()[0].strip() for replica in replicas] == 3 * [str(folder)]
    assert (folder / "starts").read_text() == "cards:\n"
    mps.stop(folder)
    assert not (folder / "daemon").exists()
    mps.stop(folder)  # there is none any more


def test_a_node_that_cannot_start_the_daemon_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir()
    (folder / "broken").touch()
    with pytest.raises(MpsError, match="does not start: no permission; see"):
        mps.join(folder, {})
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MpsError, match="has no nvidia-cuda-mps-control"):
        mps.join(folder, {})
    with pytest.raises(MpsError, match="File exists"):
        mps.join(folder / "broken", {})
    mps.stop(folder)
    mps.stop(folder / "nothing")
