"""Compiling a pool's code ahead of its replicas, and finding out whether that is done."""

from __future__ import annotations

import json

import torch

from cluster.capability import capability, probe
from cluster.cards import card_of_device

from ..errors import OctetError
from ..models.checkpoints import node_folder, open_checkpoint, read_json
from ..models.reference_work import CLIP_TOKENS
from ..settings.serve_config import PoolArguments
from .card import device_for
from .compiled_code import code_folder
from .denoiser import DENOISER_COMPONENTS, Denoiser
from .denoising_loop import DenoisingLoop, bucket, buckets
from .fp8_format import TRANSFORMER
from .generator import choose_recipe
from .precision import Recipe
from .preview import VAE_FACTOR
from .prompt_embeds import PromptEmbeds
from .warm_up import Phases, WarmUp, card_name, chosen_mode, warm_shapes


def compile_pool(arguments: PoolArguments) -> Phases:
    """Compile the code of a pool's replicas on this machine; return the seconds of each phase.

    Does what a replica does at its start, without prompts. Blocks. Raises `OctetError` if the pool
    cannot run here, and `CheckpointError` if its weights cannot be loaded.
    """
    pool, model = arguments.pool, arguments.model
    phases = Phases()
    folder = open_checkpoint(
        pool.source or model.source,
        arguments.models_folder,
        DENOISER_COMPONENTS,
        arguments.local_models_folder,
        phases.timed,
    )
    with phases.timed("load"):
        denoiser = Denoiser.load(folder, recipe_here(arguments), device_for(pool))
    warm_up = WarmUp(denoiser, pool, arguments.compiled_folder)
    warm_up.prepare()
    loop = DenoisingLoop(denoiser, max_rows=2 * pool.slots)
    try:
        warm_up.run(loop, _any_embeds(denoiser, model.max_sequence_length), phases)
    finally:
        loop.close()
    return phases


def is_compiled(arguments: PoolArguments) -> bool | None:
    """Return whether all code of a pool's replicas is compiled for this machine.

    None if its replicas compile nothing here, or if its weights are not on this node. Raises
    `OctetError` if the pool cannot run here.
    """
    pool, model = arguments.pool, arguments.model
    on_cuda = device_for(pool) == "cuda"
    recipe = recipe_here(arguments)
    mode = chosen_mode(pool, on_cuda=on_cuda)
    file = node_folder(pool.source or model.source, arguments.models_folder)
    file = file / TRANSFORMER / "config.json"
    if mode == "off" or not file.is_file():
        return None
    structure = read_json(file)
    native_px = int(structure["sample_size"]) * VAE_FACTOR
    wanted = {
        "card": card_name(on_cuda=on_cuda),
        "recipe": recipe.name,
        "mode": mode,
        "text_tokens": CLIP_TOKENS + model.max_sequence_length,
        "shapes": [
            list(shape)
            for shape in sorted(warm_shapes(pool, native_px, buckets(bucket(2 * pool.slots))))
        ],
    }
    for mark in code_folder(arguments.compiled_folder).glob("*.json"):
        found = json.loads(mark.read_text(encoding="utf-8"))
        same = all(found.get(key) == value for key, value in wanted.items())
        if same and _is_structure(found.get("structure", {}), structure):
            return True
    return False


def recipe_here(arguments: PoolArguments) -> Recipe:
    """The number formats of the pool on this machine.

    Raises `OctetError` if the pool is bound to another card than the machine's, or is an FP8 pool
    and the machine cannot compute in FP8.
    """
    pool, device = arguments.pool, probe(device_for(arguments.pool))
    card = card_of_device(device.name, device.memory_gib)
    if pool.card and not (card and card.id == pool.card):
        raise OctetError(f"bound to {pool.card}, and this machine has {device.name}")
    found = capability(device, allow_emulated_fp8=arguments.emulate_fp8)
    return choose_recipe(pool, found)


def _is_structure(compiled: dict[str, object], configured: dict[str, object]) -> bool:
    """Return whether code was compiled for the structure in a configuration file."""
    return all(
        compiled.get(key) == value
        for key, value in configured.items()
        if not key.startswith("_") and key != "quantization_config"
    )


def _any_embeds(denoiser: Denoiser, max_sequence_length: int) -> PromptEmbeds:
    config = denoiser.transformer.config
    tokens = CLIP_TOKENS + max_sequence_length
    return PromptEmbeds(
        torch.zeros(2, tokens, config.joint_attention_dim),
        torch.zeros(2, config.pooled_projection_dim),
    )
