"""A tiny SD3.5 model as one safetensors file with Stability's names for its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import save_file

from cluster.structure import config

WIDTH = 128
TRANSFORMER: dict[str, Any] = config("medium") | {
    "num_layers": 3,
    "dual_attention_layers": [0, 1],
    "num_attention_heads": 2,
    "caption_projection_dim": WIDTH,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 16,
}
VAE: dict[str, Any] = config("vae") | {"block_out_channels": [32, 32, 32, 32]}
LINEARS = {  # of a block, by Stability's names and diffusers'
    "mlp.fc1": "ff{}.net.0.proj",
    "mlp.fc2": "ff{}.net.2",
    "adaLN_modulation.1": "norm1{}.linear",
}


def swapped(tensor: torch.Tensor) -> torch.Tensor:
    """Stability puts shift before scale, and diffusers scale before shift."""
    shift, scale = tensor.chunk(2)
    return torch.cat([scale, shift])


def stabilitys_transformer(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A transformer's state under Stability's names, as sd3.5_medium.safetensors has them."""
    found = {
        "pos_embed": state["pos_embed.pos_embed"],
        **both(state, "x_embedder.proj", "pos_embed.proj"),
        **both(state, "context_embedder", "context_embedder"),
        **both(state, "final_layer.linear", "proj_out"),
    }
    for i in (1, 2):
        number = 2 * i - 2
        time, text = "time_text_embed.timestep_embedder", "time_text_embed.text_embedder"
        found |= both(state, f"t_embedder.mlp.{number}", f"{time}.linear_{i}")
        found |= both(state, f"y_embedder.mlp.{number}", f"{text}.linear_{i}")
    for kind in ("weight", "bias"):
        found[f"final_layer.adaLN_modulation.1.{kind}"] = swapped(state[f"norm_out.linear.{kind}"])
    layers = TRANSFORMER["num_layers"]
    for i in range(layers):
        block, last = f"transformer_blocks.{i}", i == layers - 1
        for attention in [
            "attn",
            *(["attn2"] if i in TRANSFORMER["dual_attention_layers"] else []),
        ]:
            own, theirs = f"joint_blocks.{i}.x_block.{attention}", f"{block}.{attention}"
            found |= qkv(state, own, [f"{theirs}.to_{x}" for x in "qkv"])
            found |= both(state, f"{own}.proj", f"{theirs}.to_out.0")
            for x in "qk":
                found[f"{own}.ln_{x}.weight"] = state[f"{theirs}.norm_{x}.weight"]
        own = f"joint_blocks.{i}.context_block.attn"
        found |= qkv(state, own, [f"{block}.attn.add_{x}_proj" for x in "qkv"])
        for x in "qk":
            found[f"{own}.ln_{x}.weight"] = state[f"{block}.attn.norm_added_{x}.weight"]
        if not last:
            found |= both(state, f"{own}.proj", f"{block}.attn.to_add_out")
        for stability, diffusers in LINEARS.items():
            found |= both(
                state, f"joint_blocks.{i}.x_block.{stability}", f"{block}.{diffusers.format('')}"
            )
            context = f"{block}.{diffusers.format('_context')}"
            name = f"joint_blocks.{i}.context_block.{stability}"
            if not last:
                found |= both(state, name, context)
            elif "adaLN" in stability:
                for kind in ("weight", "bias"):
                    found[f"{name}.{kind}"] = swapped(state[f"{context}.{kind}"])
    return found


def both(state: dict[str, torch.Tensor], new: str, old: str) -> dict[str, torch.Tensor]:
    return {f"{new}.{kind}": state[f"{old}.{kind}"] for kind in ("weight", "bias")}


def qkv(state: dict[str, torch.Tensor], new: str, old: list[str]) -> dict[str, torch.Tensor]:
    return {
        f"{new}.qkv.{kind}": torch.cat([state[f"{name}.{kind}"] for name in old])
        for kind in ("weight", "bias")
    }


def stabilitys_vae(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A VAE's state under Stability's names."""
    replaced = {
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0": "mid.attn_1",
        "downsamplers.0": "downsample",
        "upsamplers.0": "upsample",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
        ".resnets.": ".block.",
        **{f"down_blocks.{i}": f"down.{i}" for i in range(4)},
        **{f"up_blocks.{i}": f"up.{3 - i}" for i in range(4)},
    }
    found = {}
    for name, tensor in state.items():
        new = name
        for old, by in replaced.items():
            new = new.replace(old, by)
        is_attention = ".attn_1." in new and new.endswith("weight") and ".norm." not in new
        found[new] = tensor[:, :, None, None] if is_attention else tensor
    return found


def tiny_models() -> tuple[Any, Any]:
    """A transformer and a VAE with random weights."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel.from_config(TRANSFORMER).to(torch.bfloat16).eval()
    vae = AutoencoderKL.from_config(VAE).to(torch.bfloat16).eval()
    for model in (transformer, vae):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    return transformer, vae


def stabilitys_model(models: tuple[Any, Any]) -> dict[str, torch.Tensor]:
    """The tensors of both models under Stability's names, and one of a text encoder."""
    transformer, vae = (model.state_dict() for model in models)
    return {
        **{f"model.diffusion_model.{n}": t for n, t in stabilitys_transformer(transformer).items()},
        **{f"first_stage_model.{n}": t for n, t in stabilitys_vae(vae).items()},
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.bias": torch.zeros(4),
    }


def saved(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    """Write the tensors to a file in the folder; returns it."""
    file = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file
