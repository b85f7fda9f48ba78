"""`octet doctor`: what this machine, or a cluster, can do, and what stands in the way, in words."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.capability import Device, capability, probe
from cluster.cards import CARDS, card_of_device
from cluster.footprint import GIB, footprint
from cluster.placement import CARD_LABEL, Need, Node, fits, unknown_cards
from cluster.telemetry import NoTelemetry, driver_version

from .engine.checkpoint import DEFAULT_MODELS_FOLDER, node_folder, on_this_node
from .planning import CLIP_TOKENS, structure_of
from .settings import Encoder, Model, OnCard, Pool, Settings, SettingsError, Source

OLDEST_DRIVER = 535  # of NVIDIA's branches, the oldest that runs CUDA 12.2 and later
COMPILE_S = 180.0
ROOMY_GIB = 60.0  # SD3.5 Large as it is published, with its text encoders, and an FP8 copy
COMPILE = """
import torch
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.compile(lambda x: (x * 2).relu().sum(-1))(torch.ones(8, 8, device=device))
"""

Verdict = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    verdict: Verdict
    text: str


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found here; `compile_error` is empty if torch.compile works."""

    device: Device  # the first GPU, or the CPU
    gpus: int
    free_gib: float
    torch: str
    torch_cuda: str | None
    driver: str | None
    compile_error: str
    disk_free_gib: float

    @property
    def has_gpu(self) -> bool:
        return self.device.compute_capability is not None


def look(models_folder: str | None) -> Machine:
    """Look at this machine; compiles a small function, which takes seconds."""
    import torch

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
        free_gib=free_gib,
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        driver=driver,
        compile_error=_compile_error(),
        disk_free_gib=_disk_free_gib(Path(models_folder or DEFAULT_MODELS_FOLDER).expanduser()),
    )


def _compile_error() -> str:
    """The last line of what torch.compile says, in a process of its own; empty if it works."""
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and program
            [sys.executable, "-W", "ignore", "-c", COMPILE],
            capture_output=True,
            text=True,
            timeout=COMPILE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not done after {COMPILE_S:g} s"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line] or lines
    return (errors[-1] if errors else "failed") if done.returncode else ""


def _disk_free_gib(folder: Path) -> float:
    """Of the nearest folder that is there."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / GIB


# -- this machine ---------------------------------------------------------------------------------


def examine(machine: Machine) -> Iterator[Finding]:
    """The machine alone."""
    device = machine.device
    found = capability(device)
    if not machine.has_gpu:
        yield Finding("note", f"no GPU: {device.memory_gib:.0f} GiB of memory on a CPU")
        if machine.driver and machine.torch_cuda is None:
            yield Finding(
                "problem",
                f"driver {machine.driver} is here, but torch {machine.torch} is built without CUDA",
            )
        elif machine.driver:
            yield Finding("problem", f"driver {machine.driver} is here, but torch sees no card")
    else:
        yield Finding(
            "ok",
            f"{machine.gpus} × {device.name}, {machine.free_gib:.1f} of "
            f"{device.memory_gib:.1f} GiB free",
        )
        yield Finding("ok" if found.fp8 == "native" else "note", found.reason)
        yield from _examine_driver(machine.driver)
        card = card_of_device(device.name, device.memory_gib)
        yield (
            Finding("ok", f"its facts are known as '{card.id}'; Ray labels it {card.ray_names[0]}")
            if card
            else Finding("note", f"no facts of this card are known: see {CARD_LABEL} in the docs")
        )
    cuda = f"CUDA {machine.torch_cuda}" if machine.torch_cuda else "no CUDA"
    yield Finding("ok", f"torch {machine.torch}, {cuda}")
    yield _examine_compile(machine)
    enough = machine.disk_free_gib >= ROOMY_GIB
    yield Finding(
        "ok" if enough else "note",
        f"{machine.disk_free_gib:.0f} GiB of disk free for weights"
        + ("" if enough else f"; SD3.5 Large and an FP8 copy take about {ROOMY_GIB:.0f}"),
    )


def _examine_driver(driver: str | None) -> Iterator[Finding]:
    major = (driver or "").partition(".")[0]
    if not major.isdigit():
        yield Finding("note", "the driver does not say its version")
    elif int(major) < OLDEST_DRIVER:
        yield Finding("problem", f"driver {driver} is older than R{OLDEST_DRIVER}: update it")
    else:
        yield Finding("ok", f"driver {driver}")


def _examine_compile(machine: Machine) -> Finding:
    if not machine.compile_error:
        return Finding("ok", "torch.compile works")
    if machine.has_gpu:
        return Finding(
            "problem",
            f"torch.compile does not work ({machine.compile_error}): FP8 without it is slower than "
            "16 bit. It needs a C compiler and Python's headers",
        )
    return Finding("note", f"torch.compile does not work ({machine.compile_error}); CPUs need none")


# -- settings on it -------------------------------------------------------------------------------


def examine_settings(settings: Settings, machine: Machine) -> Iterator[Finding]:
    """Whether all models of the settings could be served by this machine alone."""
    for encoder in settings.text_encoders:
        reason = _cannot_hold(encoder, machine)
        name = f"text encoder {encoder.id}"
        yield Finding("problem", f"{name}: {reason}") if reason else Finding("ok", name)
    for model in settings.models:
        reasons = {
            model.pool_name(pool): _cannot_run(pool, settings, machine) for pool in model.pools
        }
        served = not all(reasons.values())
        for name, reason in reasons.items():
            verdict: Verdict = "ok" if not reason else "note" if served else "problem"
            yield Finding(verdict, f"pool {name}" + (f": {reason}" if reason else ""))
        yield from _examine_promises(model, settings, machine)
        for location in dict.fromkeys(_missing_weights(model, settings)):
            yield Finding("note", f"{model.id}: {location} is not on this node yet: octet pull")
    yield _examine_port(settings.http.host, settings.http.port)


def _cannot_run(pool: Pool, settings: Settings, machine: Machine) -> str:
    """Why a replica of a pool cannot run here; empty if it can."""
    if reason := _cannot_hold(pool, machine):
        return reason
    emulate = settings.emulate_fp8
    found = capability(machine.device, allow_emulated_fp8=emulate)
    if pool.precision == "fp8" and found.fp8 == "none":
        return found.reason
    if pool.precision == "fp16" and not pool.allow_fp8_nodes and found.fp8 == "native":
        return "allow_fp8_nodes is false, and this card has FP8"
    return ""


def _cannot_hold(part: OnCard, machine: Machine) -> str:
    if not part.num_gpus:
        return ""
    if not machine.has_gpu:
        return f"takes {part.num_gpus:g} GPU, and there is none"
    if part.num_gpus > machine.gpus:
        return f"takes {part.num_gpus:g} GPUs, and there are {machine.gpus}"
    device = machine.device
    card = card_of_device(device.name, device.memory_gib)
    if part.card and part.card != (card and card.id):
        return f"bound to {part.card}, and this is {card.id if card else device.name}"
    promised_gib = part.memory_gib or min(part.num_gpus, 1.0) * device.memory_gib
    if promised_gib > machine.free_gib:
        return f"promised {promised_gib:.1f} GiB, and {machine.free_gib:.1f} are free"
    return ""


def _examine_promises(model: Model, settings: Settings, machine: Machine) -> Iterator[Finding]:
    """Whether what replicas are promised is what they need by computation."""
    try:
        structure = structure_of(model, settings)
    except SettingsError:
        return
    for pool in model.pools:
        card = CARDS.get(pool.card or "")
        memory_gib = card.memory_gib if card else machine.device.memory_gib
        if not pool.num_gpus or not (card or machine.has_gpu):
            continue
        promised_gib = pool.memory_gib or min(pool.num_gpus, 1.0) * memory_gib
        recipe = "bf16" if pool.precision == "fp16" else "fp8"
        recipe = "fp8-adaln8" if pool.adaln_8_bit else recipe
        tokens = CLIP_TOKENS + model.max_sequence_length
        needed = footprint(structure, recipe, pool.slots, model.limits.max_pixels, tokens).total
        if needed > promised_gib:
            yield Finding(
                "note",
                f"pool {model.pool_name(pool)}: {pool.slots} images of {model.limits.max_pixels} "
                f"pixels need {needed:.1f} GiB as computed, and {promised_gib:.1f} are promised",
            )


def _missing_weights(model: Model, settings: Settings) -> Iterator[str]:
    (encoder,) = [e for e in settings.text_encoders if e.id == model.text_encoder]
    sources: list[Source] = [encoder.source, *(pool.source or model.source for pool in model.pools)]
    for source in sources:
        if not on_this_node(source, settings.models_folder):
            folder = node_folder(source, settings.models_folder)
            yield source.location if source.revision else str(folder)


def _examine_port(host: str, port: int) -> Finding:
    with socket.socket() as probe_socket:
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe_socket.bind((host, port))
        except OSError as error:
            return Finding("problem", f"cannot listen on {host}:{port}: {error.strerror}")
    return Finding("ok", f"{host}:{port} is free")


# -- a cluster ------------------------------------------------------------------------------------


def examine_cluster(nodes: Sequence[Node], settings: Settings | None) -> Iterator[Finding]:
    """The nodes of a cluster, and whether each model has one."""
    for node in nodes:
        card = node.card.id if node.card else "an unknown card"
        cards = f"{node.num_gpus:g} × {card}" if node.num_gpus else "no GPU"
        fp8 = ", FP8" if node.num_gpus and node.has_fp8(node.card) else ""
        yield Finding("ok", f"node {node.id[:8]}: {cards}{fp8}, {node.num_cpus:g} CPUs")
    yield from (Finding("note", text) for text in unknown_cards(nodes).values())
    for model in settings.models if settings else ():
        homes = {model.pool_name(pool): _homes(pool, nodes) for pool in model.pools}
        for name, count in homes.items():
            verdict: Verdict = "ok" if count else "note" if any(homes.values()) else "problem"
            yield Finding(verdict, f"pool {name}: {count or 'none'} of the nodes can hold it")
    for encoder in settings.text_encoders if settings else ():
        count = _homes(encoder, nodes)
        yield Finding(
            "ok" if count else "problem",
            f"text encoder {encoder.id}: {count or 'none'} of the nodes can hold it",
        )


def _homes(part: Pool | Encoder, nodes: Iterable[Node]) -> int:
    if isinstance(part, Pool):
        need = Need(part.precision, part.num_cpus, part.num_gpus, part.allow_fp8_nodes, part.card)
    else:  # any precision will do
        need = Need("fp16", part.num_cpus, part.num_gpus, card=part.card)
    return sum(fits(need, node) for node in nodes)
