"""Precision recipes: what runs in which number format, as data, and the FP8 linear layer.

FP8 here means W8A8 with E4M3 on both sides: weights with one scale per output channel, quantised
once at load; activations with one scale per token, computed on the fly. Per-token scales are a
matter of correctness: with one scale for a whole batch, one tenant's outliers would change
another tenant's image. `torch._scaled_mm` multiplies the FP8 numbers on the tensor cores of
capability 8.9 and up, and in software on a CPU: the code is the same.

optimum-quanto stores the T5 encoder's weights in FP8 and computes in 16 bit. It is not used for
the transformer: it never reaches FP8 tensor cores, and its Marlin kernel leaves out biases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from torch import nn

from cluster.capability import SixteenBit

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max  # 448
ALIGNMENT = 16  # K and N of the matrix product; the CPU kernel does not check it

ADALN = "*.norm1*.linear"
# Linear layers of the transformer that stay in 16 bit, with the reason.
KEEP_16_BIT = {
    "pos_embed*": "patch embedding: sees raw latents, negligible time",
    "time_text_embed*": "timestep and pooled text: one row per image, steers every block",
    "context_embedder*": "text embeddings have outliers; runs once per row and step",
    ADALN: "AdaLN: one row per image, and its error scales whole blocks",
    "norm_out.linear": "AdaLN of the output",
    "proj_out": "writes the velocity itself",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a transformer runs: `dtype` of all that is not FP8, and whether its linears are FP8.

    `adaln_8_bit`: AdaLN's weights are stored in FP8 and computed with in 16 bit; a quarter less of
    SD3.5 Large.
    """

    name: str
    dtype: torch.dtype
    fp8_linears: bool = False
    adaln_8_bit: bool = False

    @property
    def vae_dtype(self) -> torch.dtype:
        """float16 overflows in the VAE's decoder; bfloat16 does not."""
        return torch.float32 if self.dtype is torch.float16 else self.dtype


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp8", torch.bfloat16, fp8_linears=True),
        Recipe("fp8-adaln8", torch.bfloat16, fp8_linears=True, adaln_8_bit=True),
        Recipe("bf16", torch.bfloat16),
        Recipe("fp16", torch.float16),
        Recipe("fp32", torch.float32),
    )
}


@dataclass(frozen=True, slots=True)
class EncoderRecipe:
    """How text encoders run: `dtype` of their arithmetic, and whether T5 is stored in FP8."""

    name: str
    dtype: torch.dtype
    t5_stored_in_fp8: bool = False

    def on(self, sixteen_bit: SixteenBit) -> EncoderRecipe:
        """The recipe on a device: without bfloat16, float32. T5 is inaccurate in float16."""
        return self if sixteen_bit == "bf16" else replace(self, dtype=torch.float32)


ENCODER_RECIPES = {
    recipe.name: recipe
    for recipe in (
        EncoderRecipe("t5-quanto", torch.bfloat16, t5_stored_in_fp8=True),
        EncoderRecipe("bf16", torch.bfloat16),
        EncoderRecipe("fp32", torch.float32),
    )
}


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 numbers (rows, k) and their scales (rows, 1) in float32: x ≈ numbers · scales."""
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / E4M3_MAX
    # In place: what eager execution holds here at a time is the peak of a whole step.
    return x.to(torch.float32, copy=True).div_(scale).to(E4M3), scale


class Fp8Linear(nn.Module):
    """`nn.Linear` in row-wise E4M3; forward takes (…, in_features) and keeps its dtype.

    Buffers: `weight` (out, in) E4M3, `weight_scale` (1, out) float32, `bias` (out,) or None, all
    in the state dict, so a quantised model is saved and loaded as plain safetensors.
    Raises `ValueError` for sizes that are not multiples of 16.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        if in_features % ALIGNMENT or out_features % ALIGNMENT:
            raise ValueError(
                f"FP8 linear {in_features} → {out_features}: both must be multiples of {ALIGNMENT}"
            )
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    @classmethod
    def quantize(cls, linear: nn.Linear) -> Fp8Linear:
        """The FP8 form of a linear layer; on the meta device, its shape alone."""
        weight, scale = quantize_rows(linear.weight.detach())
        bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)
        return cls(weight, scale.t().contiguous(), bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
        y = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.weight_scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,  # Hopper's other way of adding up is much slower
        )
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


class Fp8StoredLinear(Fp8Linear):
    """The same weights, only stored in FP8: activations stay in 16 bit. For few rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight.to(x.dtype)) * self.weight_scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def fp8_layer(name: str, recipe: Recipe) -> type[Fp8Linear] | None:
    """What becomes of the transformer's linear layer of this module path; None: it stays."""
    if recipe.adaln_8_bit and fnmatch(name, ADALN):
        return Fp8StoredLinear
    stays = not recipe.fp8_linears or any(fnmatch(name, pattern) for pattern in KEEP_16_BIT)
    return None if stays else Fp8Linear


def apply_recipe(transformer: nn.Module, recipe: Recipe, device: str | None = None) -> nn.Module:
    """Bring a transformer into a recipe's formats, in place, and onto a device if one is given.

    Linears are quantised one by one on that device, so it never holds the whole model in 16 bit.
    Applied to a meta model it makes the structure into which a saved state dict is loaded
    (assign=True).
    """
    linears = [(n, m) for n, m in transformer.named_modules() if isinstance(m, nn.Linear)]
    for name, linear in linears:
        if layer := fp8_layer(name, recipe):
            transformer.set_submodule(name, layer.quantize(linear.to(device)))
    for module in transformer.modules():
        if not isinstance(module, Fp8Linear):
            _convert_own(module, recipe.dtype)
    return transformer if device is None else transformer.to(device)


def _convert_own(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert a module's own floating-point parameters and buffers, not its children's."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype)
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point():
            setattr(module, name, buffer.to(dtype))


def store_in_fp8(t5: nn.Module) -> None:
    """T5's weights stored in E4M3, in place; it computes in the dtype that it had."""
    from optimum.quanto import freeze, qfloat8_e4m3fn, quantize

    quantize(t5, weights=qfloat8_e4m3fn)
    freeze(t5)
