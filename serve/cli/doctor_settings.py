"""Findings of `octet doctor` about settings: whether a machine or a cluster can serve them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from cluster.capability import capability
from cluster.card_memory import is_free
from cluster.cards import BF16_SINCE, card_of_device
from cluster.footprint import ENCODER_PEAK_GIB, WORKSPACE_GIB, footprint
from cluster.placement import Node, fits, unknown_cards

from ..errors import SettingsError, StoreFailed
from ..launch import check_port
from ..models.checkpoints import on_this_node
from ..models.reference_work import CLIP_TOKENS
from ..models.structures import structure_of
from ..settings.application import Settings
from ..settings.models import CardResources, Encoder, Model, Pool, Source
from .doctor_machine import Finding, Machine, Verdict
from .plan_inputs import encoder_gib, most_pixels


def needs_gpu(settings: Settings) -> bool:
    """Return whether a pool or a set of text encoders of the settings takes a GPU."""
    pools = [pool for model in settings.models for pool in model.pools]
    return any(part.num_gpus for part in (*settings.text_encoders, *pools))


def examine_settings(settings: Settings, machine: Machine) -> Iterator[Finding]:
    """Findings on whether this machine alone could serve all models of the settings."""
    minimum: list[CardResources] = [*settings.text_encoders]  # what must run at the same time
    for encoder in settings.text_encoders:
        reason = _cannot_hold(encoder, machine, _encoder_weights_gib(encoder, settings))
        name = f"text encoder {encoder.id}"
        yield Finding("problem", f"{name}: {reason}") if reason else Finding("ok", name)
        if encoder.num_gpus and encoder.precision == "t5-quanto" and not machine.nvcc:
            why = "quanto builds its kernel with nvcc at the first start, and nvcc is not installed"
            yield Finding("note", f"{name}: {why}")
    for model in settings.models:
        reasons = {pool: _cannot_run(model, pool, settings, machine) for pool in model.pools}
        runnable = [pool for pool, reason in reasons.items() if not reason]
        minimum += sorted(runnable, key=lambda pool: (pool.num_gpus, pool.num_cpus))[:1]
        for pool, reason in reasons.items():
            verdict: Verdict = "ok" if not reason else "note" if runnable else "problem"
            why = f": {reason}" if reason else ""
            yield Finding(verdict, f"pool {model.pool_name(pool)}{why}")
        yield from _examine_promises(model, runnable, settings, machine)
        for source in dict.fromkeys(_missing_sources(model, settings)):
            place = source.location
            if source.revision:
                text = f"{model.id}: {place} is not on this node yet: octet pull --config FILE"
                yield Finding("note", text)
            else:
                text = f"{model.id}: the folder {place} has no model_index.json: no model is there"
                yield Finding("problem", text)
    yield from _examine_together(minimum, settings, machine)
    if settings.s3:
        reason = bucket_fault(settings)
        ok = f"bucket {settings.s3.bucket}: an object was written, read and deleted"
        yield Finding("problem", reason) if reason else Finding("ok", ok)
    if settings.database:
        yield _examine_database(settings.database)
    yield _examine_port(settings.http.host, settings.http.port)


def _examine_database(arguments: dict[str, Any]) -> Finding:
    """Open the database of tenants and usage, which makes its tables if needed."""
    from ..store.database import Database  # SQLAlchemy takes half a second to import

    try:
        with closing(Database(**arguments)) as database:
            return Finding("ok", f"database {database.name}: its tables are up to date")
    except (SettingsError, OSError) as error:
        return Finding("problem", f"database: {error}")


def bucket_fault(settings: Settings) -> str:
    """Why images cannot be kept in the bucket of the settings; "" if they can, or without one."""
    if settings.s3 is None:
        return ""
    from ..results.s3 import S3Store  # importing boto3 takes long

    store = S3Store(settings.s3)
    try:
        store.probe()
    except StoreFailed as error:
        return error.message
    finally:
        store.close()
    return ""


def _examine_together(
    minimum: Sequence[CardResources], settings: Settings, machine: Machine
) -> Iterator[Finding]:
    """Problems if the text encoders and one replica of each model (`minimum`) do not all fit."""
    gpus = sum(part.num_gpus for part in minimum)
    if machine.has_gpu and gpus > machine.gpus:
        yield Finding(
            "problem",
            f"text encoders and one replica of each model take {gpus:.2f} GPUs together, and this "
            f"machine has {machine.gpus}",
        )
    cpus = sum(part.num_cpus for part in minimum) + settings.dispatcher_num_cpus
    cpus += settings.ingress.num_cpus
    if cpus > machine.cpus:
        yield Finding(
            "problem",
            f"with one replica of each model everything takes {cpus:.1f} CPUs, and this machine "
            f"has {machine.cpus}: set num_cpus",
        )


def _cannot_run(model: Model, pool: Pool, settings: Settings, machine: Machine) -> str:
    """The reason why a replica of the pool cannot run on this machine; "" if it can."""
    device = machine.device if pool.num_gpus else replace(machine.device, compute_capability=None)
    found = capability(device, allow_emulated_fp8=settings.emulate_fp8)
    if pool.num_gpus and not machine.has_gpu:
        return _cannot_hold(pool, machine, 0.0)
    if pool.precision == "fp8" and found.fp8 == "none":
        return found.reason
    if pool.precision == "fp16" and not pool.allow_fp8_nodes and found.fp8 == "native":
        return "allow_fp8_nodes is false, and the card here has FP8"
    if not pool.num_gpus:
        return ""
    recipe = _recipe(pool, found.sixteen_bit)
    return _cannot_hold(pool, machine, _weights_gib(model, recipe, settings))


def _cannot_hold(part: CardResources, machine: Machine, weights_gib: float) -> str:
    """The reason why the machine's cards have no room for a replica; "" if there is room.

    `part`: the replica's resources. `weights_gib`: the memory that its weights need.
    """
    if not part.num_gpus:
        return ""
    if not machine.has_gpu:
        return f"takes {part.num_gpus:g} GPU, and this machine has none"
    if part.num_gpus > machine.gpus:
        return f"takes {part.num_gpus:g} GPUs, and this machine has {machine.gpus}"
    device = machine.device
    card = card_of_device(device.name, device.memory_gib)
    if part.card and part.card != (card and card.id):
        return f"bound to {part.card}, and the card here is {card.id if card else device.name}"
    promised_gib = _promised_gib(part, device.memory_gib)
    if promised_gib < weights_gib:
        return f"promised {promised_gib:.1f} GiB, and its weights alone need {weights_gib:.1f} GiB"
    if not is_free(promised_gib, machine.free_gib):
        return f"promised {promised_gib:.1f} GiB, and only {machine.free_gib:.1f} GiB are free"
    return ""


def _promised_gib(part: CardResources, memory_gib: float) -> float:
    """GiB that a replica may use on a card of `memory_gib`, by its settings."""
    return part.memory_gib or min(part.num_gpus, 1.0) * memory_gib


def _recipe(pool: Pool, sixteen_bit: str) -> str:
    if pool.precision == "fp16":
        return sixteen_bit
    return "fp8-adaln8" if pool.adaln_8_bit else "fp8"


def _weights_gib(model: Model, recipe: str, settings: Settings) -> float:
    """GiB of a replica's weights and CUDA context; 0 if the model's structure is not known."""
    try:
        found = footprint(structure_of(model, settings.models_folder), recipe, 1, 256 * 256)
    except SettingsError:
        return 0.0
    return found.transformer + found.vae + found.context


def _encoder_weights_gib(encoder: Encoder, settings: Settings) -> float:
    """GiB that the text encoders' weights and a CUDA context take.

    The result is 0 if the files that describe the encoders' structure are not on this machine.
    """
    try:
        return encoder_gib(encoder, settings) - ENCODER_PEAK_GIB - WORKSPACE_GIB
    except SettingsError:
        return 0.0


def _examine_promises(
    model: Model, pools: Iterable[Pool], settings: Settings, machine: Machine
) -> Iterator[Finding]:
    """Notes on replicas that are promised less memory than all their slots need.

    The need is computed with `cluster.footprint`, for the largest images that the model allows.
    """
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
                f"{needed:.1f} GiB by computation, and {promised_gib:.1f} GiB are promised",
            )


def _missing_sources(model: Model, settings: Settings) -> Iterator[Source]:
    """The sources of the model's weights that are not on this node."""
    (encoder,) = [e for e in settings.text_encoders if e.id == model.text_encoder]
    sources: list[Source] = [encoder.source, *(pool.source or model.source for pool in model.pools)]
    for source in sources:
        if not on_this_node(source, settings.models_folder):
            yield source


def _examine_port(host: str, port: int) -> Finding:
    try:
        check_port(host, port)
    except SettingsError as error:
        return Finding("problem", str(error))
    return Finding("ok", f"{host}:{port} is free")


# -- a cluster ------------------------------------------------------------------------------------


def examine_cluster(nodes: Sequence[Node], settings: Settings | None) -> Iterator[Finding]:
    """Findings about the nodes of a cluster, and on which of them each model can run."""
    for node in nodes:
        card = node.card.id if node.card else "an unknown card"
        cards = f"{node.num_gpus:g} × {card}" if node.num_gpus else "no GPU"
        fp8 = ", FP8" if node.num_gpus and node.has_fp8(node.card) else ""
        yield Finding("ok", f"node {node.id[:8]}: {cards}{fp8}, {node.num_cpus:g} CPUs")
    yield from (Finding("note", text) for text in unknown_cards(nodes).values())
    if settings is None:
        return
    for model in settings.models:
        counts = {model.pool_name(p): _count_nodes(model, p, nodes, settings) for p in model.pools}
        for name, count in counts.items():
            verdict: Verdict = "ok" if count else "note" if any(counts.values()) else "problem"
            yield Finding(verdict, f"pool {name}: {count or 'none'} of the nodes can hold it")
    for encoder in settings.text_encoders:
        weights_gib = _encoder_weights_gib(encoder, settings)
        count = sum(fits(encoder.need, n) and _has_memory(encoder, n, weights_gib) for n in nodes)
        yield Finding(
            "ok" if count else "problem",
            f"text encoder {encoder.id}: {count or 'none'} of the nodes can hold it",
        )


def _count_nodes(model: Model, pool: Pool, nodes: Iterable[Node], settings: Settings) -> int:
    """The number of nodes that can hold a replica of the pool."""
    count = 0
    for node in nodes:
        old = node.card and node.card.compute_capability < BF16_SINCE
        recipe = _recipe(pool, "fp16" if old else "bf16")
        weights_gib = _weights_gib(model, recipe, settings)
        count += fits(pool.need, node) and _has_memory(pool, node, weights_gib)
    return count


def _has_memory(part: CardResources, node: Node, weights_gib: float) -> bool:
    """Return whether the promised part of the card holds the weights; True for unknown cards."""
    if not part.num_gpus or node.card is None:
        return True
    return _promised_gib(part, node.card.memory_gib) >= weights_gib
