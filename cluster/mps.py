"""NVIDIA's Multi-Process Service (MPS): kernels of several processes run on a card at once.

Without it, processes that share a card take turns, and never overlap. With it, a fault of one
process can end its neighbours on the card. So replicas use it only if the settings ask for it.

The service is a daemon of the node, which its first replica starts. Processes find it by a folder
with its pipes. It stays when they end: it may also serve programs that are not Octet's.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import MutableMapping
from pathlib import Path

CONTROL = "nvidia-cuda-mps-control"
ANSWER_S = 30.0


class MpsError(Exception):
    """The daemon does not start; the message says why."""


def join(folder: Path, environ: MutableMapping[str, str] = os.environ) -> None:
    """Let this process use its card through the daemon of `folder`; start the daemon if needed.

    Must be called before this process uses CUDA. Raises `MpsError` if the daemon does not start.
    """
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(folder / "starting.lock"):
            if not _told(folder, "get_server_list"):
                _start(folder)
    except OSError as error:
        raise MpsError(f"{folder}: {error.strerror or error}") from None
    environ.update(_pipes(folder))


def stop(folder: Path) -> None:
    """End the daemon of `folder`, if there is one."""
    if folder.is_dir():
        _told(folder, "quit")


def _pipes(folder: Path) -> dict[str, str]:
    return {"CUDA_MPS_PIPE_DIRECTORY": str(folder), "CUDA_MPS_LOG_DIRECTORY": str(folder)}


def _start(folder: Path) -> None:
    # Ray shows a replica only its own card, but the daemon serves all cards of the node.
    environ = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | _pipes(folder)
    try:
        done = subprocess.run(  # noqa: S603 - NVIDIA's program
            [CONTROL, "-d"],
            env=environ,
            timeout=ANSWER_S,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    except FileNotFoundError:
        raise MpsError(f"this node has no {CONTROL}, which comes with NVIDIA's driver") from None
    except subprocess.TimeoutExpired:
        raise MpsError(f"{CONTROL} does not start within {ANSWER_S:.0f} s") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise MpsError(f"{CONTROL} does not start: {said}; see {folder}/control.log")


def _told(folder: Path, command: str) -> bool:
    """Give the daemon a command; return whether there is a daemon that takes it."""
    try:
        done = subprocess.run(  # noqa: S603 - NVIDIA's program
            [CONTROL],
            input=f"{command}\n",
            env={**os.environ, **_pipes(folder)},
            timeout=ANSWER_S,
            capture_output=True,
            text=True,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0
