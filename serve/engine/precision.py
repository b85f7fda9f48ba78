"""Precision recipes, which say what runs in which number format, and the FP8 linear layer.

FP8 here means W8A8 with E4M3 for both weights and activations. Weights have one scale per output
channel and are quantised once, at load. Activations have one scale per token, which is computed
during the step. Correctness demands scales per token: with one scale for a whole batch, one
tenant's outliers would change another tenant's image. `torch._scaled_mm` multiplies the FP8
numbers. It uses the tensor cores of cards from compute capability 8.9 on; on a CPU the same code
runs in software.

The T5 encoder stores its weights in FP8 and computes in 16 bit. optimum-quanto can do this too
(`t5-quanto`), but it compiles a kernel for the card when it runs for the first time. The
transformer does not use optimum-quanto, because that library never uses FP8 tensor cores and its
Marlin kernel leaves out biases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import nn

from cluster.capability import SixteenBit

T5Storage = Literal["fp8", "quanto"]

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max  # 448
FP8_ERROR = 0.1  # the relative error of a product of random numbers is about 0.04
ALIGNMENT = 16  # K and N of the matrix product are multiples of it; the CPU kernel does not check

ADALN = "*.norm1*.linear"
# The transformer's linear layers that stay in 16 bit, by module path, with the reason.
KEEP_16_BIT = {
    "pos_embed*": "patch embedding: reads raw latents, takes negligible time",
    "time_text_embed*": "timestep and pooled text: one row per image, affects every block",
    "context_embedder*": "text embeddings have outliers; runs once per row and step",
    ADALN: "AdaLN: one row per image, and its error scales whole blocks",
    "norm_out.linear": "AdaLN of the output",
    "proj_out": "computes the velocity itself",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """The number formats of a transformer.

    `dtype`: the format of everything that is not FP8. `fp8_linears`: whether linear layers compute
    in FP8. `adaln_8_bit`: whether AdaLN's weights are stored in FP8, which makes SD3.5 Large a
    quarter smaller; AdaLN still computes in 16 bit.
    """

    name: str
    dtype: torch.dtype
    fp8_linears: bool = False
    adaln_8_bit: bool = False

    def vae_dtype(self, device: str) -> torch.dtype:
        """The VAE's format on a device: that of the recipe on a card, but never float16.

        The VAE's decoder overflows in float16. CPUs run it in float32, which is much faster where
        they have no bfloat16 instructions.
        """
        on_card = torch.device(device).type == "cuda" and self.dtype is not torch.float16
        return self.dtype if on_card else torch.float32


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
    """The number formats of the text encoders.

    `dtype`: the format of their arithmetic. `t5`: how T5's weights are stored, if not in `dtype`:
    in FP8 by this module, or by optimum-quanto.
    """

    name: str
    dtype: torch.dtype
    t5: T5Storage | None = None

    def on(self, sixteen_bit: SixteenBit) -> EncoderRecipe:
        """The same recipe, adapted to a device with this 16-bit format.

        On a device without bfloat16 the encoders compute in float32, because T5 is inaccurate in
        float16. Encoders that are not stored in FP8 stay in bfloat16 on a CPU: in float32 they
        would take twice the memory.
        """
        keeps = sixteen_bit == "bf16" or (sixteen_bit == "fp32" and self.t5 is None)
        return self if keeps else replace(self, dtype=torch.float32)


ENCODER_RECIPES = {
    recipe.name: recipe
    for recipe in (
        EncoderRecipe("t5-fp8", torch.bfloat16, t5="fp8"),
        EncoderRecipe("t5-quanto", torch.bfloat16, t5="quanto"),
        EncoderRecipe("bf16", torch.bfloat16),
        EncoderRecipe("fp32", torch.float32),
    )
}


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows (rows, k) to E4M3 with one scale per row.

    Returns the numbers (rows, k) and the scales (rows, 1) in float32: x ≈ numbers · scales.
    """
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / E4M3_MAX
    # Works in place, because in eager execution a step needs the most memory here.
    return x.to(torch.float32, copy=True).div_(scale).to(E4M3), scale


class Fp8Linear(nn.Module):
    """A linear layer like `nn.Linear` that computes in row-wise E4M3.

    `forward` takes (…, in_features) and returns (…, out_features) in the input's dtype. The buffers
    are `weight` (out, in) in E4M3, `weight_scale` (1, out) in float32, and `bias` (out,) or None.
    All are part of the state dict, so a quantised model is saved and loaded as plain safetensors.
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
    def quantize(cls, linear: nn.Linear) -> Self:
        """Quantise a linear layer. On the meta device this makes a layer of the same shapes."""
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
            use_fast_accum=True,  # Hopper's other way to accumulate is much slower
        )
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


class Fp8StoredLinear(Fp8Linear):
    """A linear layer that stores its weights in FP8 but computes in 16 bit.

    This suits calls with few rows, because every call converts all weights.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight.to(x.dtype)) * self.weight_scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def fp8_fault(device: str) -> str | None:
    """Multiply small matrices by an `Fp8Linear` on a device; return what is wrong, or None.

    A card may have FP8 by its number while torch has no row-wise product for it. The number of rows
    is odd, as that of text tokens may be.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(333, 64, generator=generator).to(device, torch.bfloat16)
    linear = nn.Linear(64, 96, device=device, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.copy_(torch.randn(96, 64, generator=generator))
    exact = linear(x).float()
    try:
        noise = Fp8Linear.quantize(linear)(x).float() - exact
        error = (noise.square().mean() / exact.square().mean()).sqrt().item()
    except RuntimeError as failure:
        return f"a small FP8 product fails: {[*str(failure).splitlines(), ''][0]}"
    if not error < FP8_ERROR:  # also if it is not a number
        return f"a small FP8 product is wrong by {100 * error:.0f} %"
    return None


def fp8_layer(name: str, recipe: Recipe) -> type[Fp8Linear] | None:
    """The class of FP8 layer that replaces the linear layer at the module path `name`.

    None if the layer stays as it is.
    """
    if recipe.adaln_8_bit and fnmatch(name, ADALN):
        return Fp8StoredLinear
    kept = not recipe.fp8_linears or any(fnmatch(name, pattern) for pattern in KEEP_16_BIT)
    return None if kept else Fp8Linear


def apply_recipe(transformer: nn.Module, recipe: Recipe, device: str | None = None) -> nn.Module:
    """Convert a transformer to a recipe's formats, in place, and move it to `device` if given.

    Linear layers are moved and quantised one by one, so the device never holds the whole model in
    16 bit. A model on the meta device has shapes but no weights. After this conversion, the state
    dict of a quantised model can be loaded into it with `assign=True`.
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


def store_in_fp8(t5: nn.Module, how: T5Storage) -> None:
    """Store T5's weights in E4M3, in place; T5 goes on computing in its present dtype."""
    if how == "fp8":
        for name, linear in list(t5.named_modules()):
            if isinstance(linear, nn.Linear):
                t5.set_submodule(name, T5Fp8Linear(Fp8StoredLinear.quantize(linear)))
        return
    from optimum.quanto import freeze, qfloat8_e4m3fn, quantize

    quantize(t5, weights=qfloat8_e4m3fn)
    freeze(t5)


class T5Fp8Linear(nn.Module):
    """A linear layer of T5 with its weights stored in FP8."""

    # transformers converts T5's activations to the dtype of `weight`, if that is a tensor.
    weight = None

    def __init__(self, stored: Fp8StoredLinear) -> None:
        super().__init__()
        self.stored = stored

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stored(x)  # type: ignore[no-any-return]  # nn.Module's
