"""Findings of `octet doctor` about this machine: its cards, driver, torch and disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.capability import Device, capability, probe
from cluster.cards import card_of_device
from cluster.footprint import GIB
from cluster.telemetry import NoTelemetry, driver_version

from ..models.checkpoints import DEFAULT_MODELS_FOLDER

OLDEST_DRIVER = {"12": 535, "13": 580}  # NVIDIA's driver branch, by torch's CUDA version
COMPILE_S = 180.0
ROOMY_GIB = 60.0  # SD3.5 Large as published, with its text encoders, plus an FP8 copy
COMPILE = """
import torch
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.compile(lambda x: (x * 2).relu().sum(-1))(torch.ones(8, 8, device=device))
"""

Verdict = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. Only a `problem` keeps something from being served."""

    verdict: Verdict
    text: str


@dataclass(frozen=True, slots=True)
class Machine:
    """The cards, driver and software that were found on this machine.

    `free_gib`: free memory of the device. `fp8_error`: what is wrong with a small FP8 product;
    empty if it works, or if the device has no FP8. `compile_error`: empty if torch.compile works.
    `nvcc`: whether CUDA's compiler is on the path.
    """

    device: Device  # the first GPU, or the CPU
    gpus: int
    cpus: int
    free_gib: float
    torch: str
    torch_cuda: str | None
    driver: str | None
    fp8_error: str
    compile_error: str
    disk_free_gib: float
    nvcc: bool

    @property
    def has_gpu(self) -> bool:
        return self.device.compute_capability is not None


def look(models_folder: str | None) -> Machine:
    """Examine this machine.

    Compiles a small function with torch, which takes seconds. `models_folder`: the folder whose
    free disk space is measured; None stands for the default folder.
    """
    import torch

    from ..engine.precision import fp8_fault

    device = probe()
    free_gib = device.memory_gib
    if device.compute_capability:
        free_gib = torch.cuda.mem_get_info()[0] / GIB
    try:
        driver = driver_version()
    except NoTelemetry:
        driver = None
    return Machine(
        device=device,
        gpus=torch.cuda.device_count(),
        cpus=os.cpu_count() or 1,
        free_gib=free_gib,
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        driver=driver,
        fp8_error=(capability(device).fp8 == "native" and fp8_fault("cuda")) or "",
        compile_error=_compile_error(),
        disk_free_gib=_disk_free_gib(Path(models_folder or DEFAULT_MODELS_FOLDER).expanduser()),
        nvcc=shutil.which("nvcc") is not None,
    )


def _compile_error() -> str:
    """Run torch.compile in a process of its own; return its last error line, or "" if it works."""
    try:
        done = subprocess.run(  # noqa: S603 - this interpreter, Octet's program
            [sys.executable, "-W", "ignore", "-c", COMPILE],
            capture_output=True,
            text=True,
            timeout=COMPILE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not finished after {COMPILE_S:g} s"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line] or lines
    return (errors[-1] if errors else "failed") if done.returncode else ""


def _disk_free_gib(folder: Path) -> float:
    """Free GiB on the disk of `folder`, or of its nearest parent that exists."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / GIB


# -- this machine ---------------------------------------------------------------------------------


def examine(machine: Machine, needs_gpu: bool = True) -> Iterator[Finding]:
    """Findings about the machine alone, without settings.

    `needs_gpu`: whether a card that cannot be used is a problem or only a note.
    """
    device = machine.device
    found = capability(device)
    problem: Verdict = "problem" if needs_gpu else "note"
    if machine.has_gpu:
        free = f"{machine.free_gib:.1f} of {device.memory_gib:.1f} GiB free"
        yield Finding("ok", f"{machine.gpus} × {device.name}, {free}")
        yield Finding("ok" if found.fp8 == "native" else "note", found.reason)
        if machine.fp8_error:
            yield Finding(problem, f"{machine.fp8_error}: FP8 pools cannot run on this card")
        card = card_of_device(device.name, device.memory_gib)
        yield (
            Finding("ok", f"the card is known as '{card.id}'; Ray labels it {card.ray_names[0]}")
            if card
            else Finding(
                "note", "the card is not in Octet's list of cards: `octet plan` leaves it out"
            )
        )
    else:
        yield Finding("note", f"no GPU: {device.memory_gib:.0f} GiB of memory on a CPU")
    if machine.driver:
        yield from _examine_driver(machine, problem)
    elif machine.has_gpu:
        yield Finding("note", "the version of the driver could not be read")
    cuda = f"CUDA {machine.torch_cuda}" if machine.torch_cuda else "no CUDA"
    yield Finding("ok", f"torch {machine.torch}, {cuda}")
    yield _examine_compile(machine, problem)
    enough = machine.disk_free_gib >= ROOMY_GIB
    yield Finding(
        "ok" if enough else "note",
        f"{machine.disk_free_gib:.0f} GiB of disk free for weights"
        + ("" if enough else f"; SD3.5 Large and an FP8 copy take about {ROOMY_GIB:.0f} GiB"),
    )


def _examine_driver(machine: Machine, problem: Verdict) -> Iterator[Finding]:
    major = (machine.driver or "").partition(".")[0]
    oldest = OLDEST_DRIVER.get((machine.torch_cuda or "").partition(".")[0], 535)
    if major.isdigit() and int(major) < oldest:
        needed = f"R{oldest}, which torch for CUDA {machine.torch_cuda or '12'} needs"
        yield Finding(problem, f"driver {machine.driver} is older than {needed}: update it")
    elif machine.has_gpu:
        yield Finding("ok", f"driver {machine.driver}")
    elif machine.torch_cuda is None:
        yield Finding(
            problem,
            f"driver {machine.driver} is installed, but torch {machine.torch} is built without "
            "CUDA",
        )
    else:
        yield Finding(problem, f"driver {machine.driver} is installed, but torch sees no card")


def _examine_compile(machine: Machine, problem: Verdict) -> Finding:
    if not machine.compile_error:
        return Finding("ok", "torch.compile works")
    if machine.has_gpu:
        return Finding(
            problem,
            f"torch.compile does not work ({machine.compile_error}): FP8 without it is slower than "
            "16 bit. It needs a C compiler and Python's header files",
        )
    return Finding(
        "note", f"torch.compile does not work ({machine.compile_error}); a CPU does not need it"
    )
