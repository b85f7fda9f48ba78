"""What `octet doctor` says of settings, on this machine or on a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from cluster.capability import capability
from cluster.card_memory import is_free
from cluster.cards import BF16_SINCE, card_of_device
from cluster.footprint import ENCODER_PEAK_GIB, WORKSPACE_GIB, footprint
from cluster.placement import Node, fits, unknown_cards

from ..errors import SettingsError
from ..launch import check_port
from ..models.checkpoints import node_folder, on_this_node
from ..models.reference_work import CLIP_TOKENS, structure_of
from ..settings.application import Settings
from ..settings.models import CardResources, Encoder, Model, Pool, Source
from .doctor_machine import Finding, Machine, Verdict
from .plan_inputs import encoder_gib, most_pixels


def needs_gpu(settings: Settings) -> bool:
    pools = [pool for model in settings.models for pool in model.pools]
    return any(part.num_gpus for part in (*settings.text_encoders, *pools))


def examine_settings(settings: Settings, machine: Machine) -> Iterator[Finding]:
    """Whether all models of the settings could be served by this machine alone."""
    least: list[CardResources] = [*settings.text_encoders]
    for encoder in settings.text_encoders:
        reason = _cannot_hold(encoder, machine, _encoder_weights_gib(encoder, settings))
        name = f"text encoder {encoder.id}"
        yield Finding("problem", f"{name}: {reason}") if reason else Finding("ok", name)
        if encoder.num_gpus and encoder.precision == "t5-quanto" and not machine.nvcc:
            why = "quanto builds its kernel with nvcc at the first start, and there is none"
            yield Finding("note", f"{name}: {why}")
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
    least: Sequence[CardResources], settings: Settings, machine: Machine
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


def _cannot_hold(part: CardResources, machine: Machine, weights_gib: float) -> str:
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


def _promised_gib(part: CardResources, memory_gib: float) -> float:
    return part.memory_gib or min(part.num_gpus, 1.0) * memory_gib


def _recipe(pool: Pool, sixteen_bit: str) -> str:
    if pool.precision == "fp16":
        return sixteen_bit
    return "fp8-adaln8" if pool.adaln_8_bit else "fp8"


def _weights_gib(model: Model, recipe: str, settings: Settings) -> float:
    """With CUDA's context; zero where the model's structure is not known."""
    try:
        found = footprint(structure_of(model, settings.models_folder), recipe, 1, 256 * 256)
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
        structure = structure_of(model, settings.models_folder)
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
    try:
        check_port(host, port)
    except SettingsError as error:
        return Finding("problem", str(error))
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
        count = sum(fits(encoder.need, n) and _has_memory(encoder, n, weights_gib) for n in nodes)
        yield Finding(
            "ok" if count else "problem",
            f"text encoder {encoder.id}: {count or 'none'} of the nodes can hold it",
        )


def _homes(model: Model, pool: Pool, nodes: Iterable[Node], settings: Settings) -> int:
    count = 0
    for node in nodes:
        old = node.card and node.card.compute_capability < BF16_SINCE
        recipe = _recipe(pool, "fp16" if old else "bf16")
        weights_gib = _weights_gib(model, recipe, settings)
        count += fits(pool.need, node) and _has_memory(pool, node, weights_gib)
    return count


def _has_memory(part: CardResources, node: Node, weights_gib: float) -> bool:
    """Whether its part of the node's card, if that is known, holds the weights."""
    if not part.num_gpus or node.card is None:
        return True
    return _promised_gib(part, node.card.memory_gib) >= weights_gib
