"""SD3.5 with its exact structure and random weights, in all ways to run it on a device."""

from __future__ import annotations

import gc
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import nn

from cluster.footprint import TEXT_TOKENS
from cluster.structure import TRANSFORMERS, config
from serve.engine.compiled import compile_blocks
from serve.engine.denoiser import Denoiser
from serve.engine.fused_attention import fuse_qkv
from serve.engine.precision import RECIPES, apply_recipe, fp8_layer
from serve.engine.prompt_embeds import PromptEmbeds

RESULTS = Path(__file__).parents[1] / "results"
SHIFT = 3.0
TINY = {"num_layers": 2, "num_attention_heads": 2, "dual_attention_layers": [0]}
TINY_VAE = {"block_out_channels": [32, 32, 32, 32]}

# Who chooses the kernels of compiled code: Octet, or torch by itself. `combined`: Octet's, and
# independent ones combined into one, which torch calls experimental.
Kernels = Literal["Octet", "torch", "combined"]


@dataclass(frozen=True)
class Way:
    """A way to run a transformer.

    `torchao`: whether torchao's row-wise FP8 is used instead of Octet's. `kernels`: who chooses the
    kernels of compiled code.
    """

    name: str
    recipe: str
    compiled: bool = False
    max_autotune: bool = False
    torchao: bool = False
    kernels: Kernels = "Octet"


_WAYS = (
    Way("fp8 compiled", "fp8", compiled=True),
    Way("bf16 compiled", "bf16", compiled=True),
    Way("bf16 eager", "bf16"),
    Way("fp8 eager", "fp8"),
    Way("torchao row-wise compiled", "bf16", compiled=True, torchao=True),
    Way("fp8-adaln8 compiled", "fp8-adaln8", compiled=True),
    Way("fp8 torch's kernels", "fp8", compiled=True, kernels="torch"),
    Way("fp8 combined kernels", "fp8", compiled=True, kernels="combined"),
    Way("fp8 max-autotune", "fp8", compiled=True, max_autotune=True),
)
WAYS = {way.name: way for way in _WAYS}
BF16, FP8, FP8_EAGER = (WAYS[name] for name in ("bf16 eager", "fp8 compiled", "fp8 eager"))


@dataclass(frozen=True)
class Bench:
    """A device to measure on. `tiny` shrinks every structure, for a CPU and for tests."""

    device: str
    tiny: bool

    @classmethod
    def here(cls, tiny: bool) -> Bench:
        """A bench on this machine's GPU, or on its CPU if `tiny`.

        Raises `SystemExit` if `tiny` is false and the machine has no GPU.
        """
        if not tiny and not torch.cuda.is_available():
            raise SystemExit("this machine has no GPU: use --tiny to run small shapes on the CPU")
        return cls("cpu" if tiny else "cuda", tiny)

    @property
    def sides(self) -> tuple[int, ...]:
        return (64,) if self.tiny else (1024, 512)

    @property
    def backend(self) -> str:
        return "eager" if self.tiny else "inductor"

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeats: int) -> float:
        """The median seconds of a call, after one call that does not count."""
        work()
        took = []
        for _ in range(repeats):
            self.sync()
            began = time.perf_counter()
            work()
            self.sync()
            took.append(time.perf_counter() - began)
        return statistics.median(took)

    @torch.no_grad()
    def transformer(
        self, model: str, way: Way, warm: Collection[tuple[int, int]] | None = None
    ) -> Any:
        """A transformer with random weights.

        `warm`: shapes (rows, image tokens) that get compiled code of their own; None stands for all
        shapes. Raises `ImportError` if the way needs torchao and torchao is not installed.
        """
        structure = config(TRANSFORMERS[model]) | (TINY if self.tiny else {})
        structure["caption_projection_dim"] = (
            structure["num_attention_heads"] * structure["attention_head_dim"]
        )
        with torch.device("meta"):
            made = SD3Transformer2DModel.from_config(structure)
            apply_recipe(made, RECIPES["bf16"])
        made = fill(made.to_empty(device=self.device)).eval()
        fuse_qkv(made)
        if way.torchao:
            quantize_by_torchao(made)
        else:
            apply_recipe(made, RECIPES[way.recipe], self.device)
        if way.compiled:
            mode: Literal["default", "max-autotune"]
            mode = "max-autotune" if way.max_autotune else "default"
            exact = _AllShapes() if warm is None else warm
            compile_blocks(made, exact, mode, self.backend)
            choose_kernels(way.kernels)
        return made

    @torch.no_grad()
    def vae(self) -> Any:
        """A VAE with random weights in bfloat16."""
        with torch.device("meta"):
            made: Any = AutoencoderKL.from_config(config("vae") | (TINY_VAE if self.tiny else {}))
        return fill(made.to(torch.bfloat16).to_empty(device=self.device)).eval()

    def denoiser(
        self, model: str, way: Way, warm: Collection[tuple[int, int]] | None = None
    ) -> Denoiser:
        """A denoiser with random weights; attention runs as `prefer_attention` has set it."""
        transformer = self.transformer(model, way, warm)
        made = Denoiser(transformer, self.vae(), RECIPES[way.recipe], self.device, SHIFT)
        self.free()  # making the model needs more memory than the model itself
        return made

    def embeds(self, rows: int) -> PromptEmbeds:
        """Random prompt embeddings, the same each time."""
        generator = torch.Generator("cpu").manual_seed(0)
        return PromptEmbeds(
            torch.randn(rows, TEXT_TOKENS, 4096, generator=generator),
            torch.randn(rows, 2048, generator=generator),
        )

    def free(self) -> None:
        """Free the memory of deleted models, and reset the peak."""
        torch._dynamo.reset()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        self.reset_peak()

    def reset_peak(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else None

    def machine(self) -> dict[str, str]:
        """The name of the device and the versions of the libraries, for the file of results."""
        found = {"device": platform.processor() or platform.machine()}
        if self.device == "cuda":
            found["device"] = torch.cuda.get_device_name(0)
            found["cuda"] = str(torch.version.cuda)
        else:
            found["cores"] = str(os.cpu_count())
        for package in ("torch", "diffusers", "transformers", "torchao", "optimum-quanto"):
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = "none"
        return found


def save(folder: Path, part: str, found: dict[str, Any]) -> Path:
    """Save results under the name `part` in today's file for this card; returns the file.

    Other parts of the file stay.
    """
    card = found["machine"]["device"].lower().replace("nvidia ", "").replace(" ", "-")
    file = folder / f"{date.today().isoformat()}-{card}.json"
    folder.mkdir(parents=True, exist_ok=True)
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | {part: found}, indent=1) + "\n")
    return file


class _AllShapes(frozenset[tuple[int, int]]):
    """A set that contains every shape."""

    def __contains__(self, _: object) -> bool:
        return True


def choose_kernels(choice: Kernels) -> None:
    """Make this thread's compiler choose kernels so, for blocks of the last `compile_blocks`."""
    from torch._inductor import config
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    config.combo_kernels = choice == "combined"
    if choice == "torch":
        config.inductor_choices_class = None
    V.set_choices_handler((config.inductor_choices_class or InductorChoices)())


@torch.no_grad()
def fill(module: nn.Module) -> nn.Module:
    """Fill a module on its device with random weights like those of a new model.

    The standard deviation of weights is 1/√inputs, that of buffers is 0.02.
    """
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.fill_(1)
    for buffer in module.buffers():
        buffer.normal_(0, 0.02)
    return module


def quantize_by_torchao(transformer: nn.Module) -> None:
    """Quantise the layers that Octet's FP8 recipe quantises, with torchao."""
    torchao = importlib.import_module("torchao.quantization")
    torchao.quantize_(
        transformer,
        torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerRow()),
        filter_fn=lambda module, name: (
            isinstance(module, nn.Linear) and fp8_layer(name, RECIPES["fp8"]) is not None
        ),
    )
