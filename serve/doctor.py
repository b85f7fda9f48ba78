"""`octet doctor`: what this machine, or a cluster, can do, and what stands in the way, in words."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cluster.capability import Device, capability, probe
from cluster.card_memory import is_free
from cluster.cards import BF16_SINCE, card_of_device
from cluster.footprint import ENCODER_PEAK_GIB, GIB, WORKSPACE_GIB, footprint
from cluster.placement import Need, Node, fits, unknown_cards
from cluster.telemetry import NoTelemetry, driver_version

from .engine.checkpoint import DEFAULT_MODELS_FOLDER, node_folder, on_this_node
from .planning import CLIP_TOKENS, encoder_gib, most_pixels, structure_of
from .settings import Encoder, Model, OnCard, Pool, Settings, SettingsError, Source

OLDEST_DRIVER = {"12": 535, "13": 580}  # NVIDIA's branch, by the CUDA that torch is built for
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
    cpus: int
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
        cpus=os.cpu_count() or 1,
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


def examine(machine: Machine, needs_gpu: bool = True) -> Iterator[Finding]:
    """The machine alone. `needs_gpu`: whether it is a problem that a card cannot be used."""
    device = machine.device
    found = capability(device)
    problem: Verdict = "problem" if needs_gpu else "note"
    if machine.has_gpu:
        free = f"{machine.free_gib:.1f} of {device.memory_gib:.1f} GiB free"
        yield Finding("ok", f"{machine.gpus} × {device.name}, {free}")
        yield Finding("ok" if found.fp8 == "native" else "note", found.reason)
        card = card_of_device(device.name, device.memory_gib)
        yield (
            Finding("ok", f"its facts are known as '{card.id}'; Ray labels it {card.ray_names[0]}")
            if card
            else Finding("note", "no facts of this card are known: `octet plan` leaves it out")
        )
    else:
        yield Finding("note", f"no GPU: {device.memory_gib:.0f} GiB of memory on a CPU")
    if machine.driver:
        yield from _examine_driver(machine, problem)
    elif machine.has_gpu:
        yield Finding("note", "the driver does not say its version")
    cuda = f"CUDA {machine.torch_cuda}" if machine.torch_cuda else "no CUDA"
    yield Finding("ok", f"torch {machine.torch}, {cuda}")
    yield _examine_compile(machine, problem)
    enough = machine.disk_free_gib >= ROOMY_GIB
    yield Finding(
        "ok" if enough else "note",
        f"{machine.disk_free_gib:.0f} GiB of disk free for weights"
        + ("" if enough else f"; SD3.5 Large and an FP8 copy take about {ROOMY_GIB:.0f}"),
    )


def _examine_driver(machine: Machine, problem: Verdict) -> Iterator[Finding]:
    major = (machine.driver or "").partition(".")[0]
    oldest = OLDEST_DRIVER.get((machine.torch_cuda or "").partition(".")[0], 535)
    if major.isdigit() and int(major) < oldest:
        wanted = f"R{oldest}, which torch for CUDA {machine.torch_cuda or '12'} needs"
        yield Finding(problem, f"driver {machine.driver} is older than {wanted}: update it")
    elif machine.has_gpu:
        yield Finding("ok", f"driver {machine.driver}")
    elif machine.torch_cuda is None:
        yield Finding(
            problem,
            f"driver {machine.driver} is here, but torch {machine.torch} is built without CUDA",
        )
    else:
        yield Finding(problem, f"driver {machine.driver} is here, but torch sees no card")


def _examine_compile(machine: Machine, problem: Verdict) -> Finding:
    if not machine.compile_error:
        return Finding("ok", "torch.compile works")
    if machine.has_gpu:
        return Finding(
            problem,
            f"torch.compile does not work ({machine.compile_error}): FP8 without it is slower than "
            "16 bit. It needs a C compiler and Python's headers",
        )
    return Finding("note", f"torch.compile does not work ({machine.compile_error}); CPUs need none")


# -- settings on it -------------------------------------------------------------------------------


def needs_gpu(settings: Settings) -> bool:
    pools = [pool for model in settings.models for pool in model.pools]
    return any(part.num_gpus for part in (*settings.text_encoders, *pools))


def examine_settings(settings: Settings, machine: Machine) -> Iterator[Finding]:
    """Whether all models of the settings could be served by this machine alone."""
    least: list[OnCard] = [*settings.text_encoders]
    for encoder in settings.text_encoders:
        reason = _cannot_hold(encoder, machine, _encoder_weights_gib(encoder, settings))
        name = f"text encoder {encoder.id}"
        yield Finding("problem", f"{name}: {reason}") if reason else Finding("ok", name)
    for model in settings.models:
        reasons = {pool: _cannot_run(model, pool, settings, machine) for pool in model.pools}
        able = [pool for pool, reason in reasons.items() if not reason]
        least += sorted(able, key=lambda pool: (pool.num_gpus, pool.num_cpus))[:1]
        for pool, reason in reasons.items():
            verdict: Verdict = "ok" if not reason else "note" if able else "problem"
            why = f": {reason}" if reason else ""
            yield Finding(verdict, f"pool {model.pool_name(pool)}{why}")
        yield from _examine_promises(model, able, settings, machine)
        for location in dict.fromkeys(_missing_weights(model, settings)):
            yield Finding("note", f"{model.id}: {location} is not on this node yet: octet pull")
    yield from _examine_together(least, settings, machine)
    yield _examine_port(settings.http.host, settings.http.port)


def _examine_together(
    least: Sequence[OnCard], settings: Settings, machine: Machine
) -> Iterator[Finding]:
    """Whether the text encoders and a replica of each model find room at once."""
    gpus = sum(part.num_gpus for part in least)
    if machine.has_gpu and gpus > machine.gpus:
        yield Finding(
            "problem",
            f"text encoders and one replica of each model take {gpus:.2f} GPUs together, and there "
            f"are {machine.gpus}",
        )
    cpus = sum(part.num_cpus for part in least) + settings.dispatcher_num_cpus
    cpus += settings.ingress.num_cpus
    if cpus > machine.cpus:
        yield Finding(
            "problem",
            f"with one replica of each model everything takes {cpus:.1f} CPUs, and there are "
            f"{machine.cpus}: set num_cpus",
        )


def _cannot_run(model: Model, pool: Pool, settings: Settings, machine: Machine) -> str:
    """Why a replica of a pool cannot run here; empty if it can."""
    device = machine.device if pool.num_gpus else replace(machine.device, compute_capability=None)
    found = capability(device, allow_emulated_fp8=settings.emulate_fp8)
    if pool.num_gpus and not machine.has_gpu:
        return _cannot_hold(pool, machine, 0.0)
    if pool.precision == "fp8" and found.fp8 == "none":
        return found.reason
    if pool.precision == "fp16" and not pool.allow_fp8_nodes and found.fp8 == "native":
        return "allow_fp8_nodes is false, and this card has FP8"
    recipe = _recipe(pool, found.sixteen_bit)
    return _cannot_hold(pool, machine, _weights_gib(model, recipe, settings))


def _cannot_hold(part: OnCard, machine: Machine, weights_gib: float) -> str:
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
    promised_gib = _promised_gib(part, device.memory_gib)
    if promised_gib < weights_gib:
        return f"promised {promised_gib:.1f} GiB, and its weights alone need {weights_gib:.1f}"
    if not is_free(promised_gib, machine.free_gib):
        return f"promised {promised_gib:.1f} GiB, and {machine.free_gib:.1f} are free"
    return ""


def _promised_gib(part: OnCard, memory_gib: float) -> float:
    return part.memory_gib or min(part.num_gpus, 1.0) * memory_gib


def _recipe(pool: Pool, sixteen_bit: str) -> str:
    if pool.precision == "fp16":
        return sixteen_bit
    return "fp8-adaln8" if pool.adaln_8_bit else "fp8"


def _weights_gib(model: Model, recipe: str, settings: Settings) -> float:
    """With CUDA's context; zero where the model's structure is not known."""
    try:
        found = footprint(structure_of(model, settings), recipe, 1, 256 * 256)
    except SettingsError:
        return 0.0
    return found.transformer + found.vae + found.context


def _encoder_weights_gib(encoder: Encoder, settings: Settings) -> float:
    try:
        return encoder_gib(encoder, settings) - ENCODER_PEAK_GIB - WORKSPACE_GIB
    except SettingsError:
        return 0.0


def _examine_promises(
    model: Model, pools: Iterable[Pool], settings: Settings, machine: Machine
) -> Iterator[Finding]:
    """Whether what replicas are promised is what they need by computation with all slots full."""
    try:
        structure = structure_of(model, settings)
    except SettingsError:
        return
    for pool in pools:
        if not pool.num_gpus:
            continue
        promised_gib = _promised_gib(pool, machine.device.memory_gib)
        recipe = _recipe(pool, capability(machine.device).sixteen_bit)
        tokens, pixels = CLIP_TOKENS + model.max_sequence_length, most_pixels(model)
        needed = footprint(structure, recipe, pool.slots, pixels, tokens).total
        if needed > promised_gib + 0.01:
            yield Finding(
                "note",
                f"pool {model.pool_name(pool)}: {pool.slots} images of {pixels} pixels need "
                f"{needed:.1f} GiB as computed, and {promised_gib:.1f} are promised",
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
    if settings is None:
        return
    for model in settings.models:
        homes = {model.pool_name(p): _homes(model, p, nodes, settings) for p in model.pools}
        for name, count in homes.items():
            verdict: Verdict = "ok" if count else "note" if any(homes.values()) else "problem"
            yield Finding(verdict, f"pool {name}: {count or 'none'} of the nodes can hold it")
    for encoder in settings.text_encoders:
        weights_gib = _encoder_weights_gib(encoder, settings)
        need = Need("fp16", encoder.num_cpus, encoder.num_gpus, card=encoder.card)
        count = sum(fits(need, n) and _has_memory(encoder, n, weights_gib) for n in nodes)
        yield Finding(
            "ok" if count else "problem",
            f"text encoder {encoder.id}: {count or 'none'} of the nodes can hold it",
        )


def _homes(model: Model, pool: Pool, nodes: Iterable[Node], settings: Settings) -> int:
    need = Need(pool.precision, pool.num_cpus, pool.num_gpus, pool.allow_fp8_nodes, pool.card)
    count = 0
    for node in nodes:
        old = node.card and node.card.compute_capability < BF16_SINCE
        recipe = _recipe(pool, "fp16" if old else "bf16")
        weights_gib = _weights_gib(model, recipe, settings)
        count += fits(need, node) and _has_memory(pool, node, weights_gib)
    return count


def _has_memory(part: OnCard, node: Node, weights_gib: float) -> bool:
    """Whether its part of the node's card, if that is known, holds the weights."""
    if not part.num_gpus or node.card is None:
        return True
    return _promised_gib(part, node.card.memory_gib) >= weights_gib
