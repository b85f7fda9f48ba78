"""The transformer's blocks compiled, and its attention by measurement.

FP8 pays only compiled: in eager execution the scaling of activations costs more than the matrix
products save. Blocks are compiled one kind at a time, not the whole model: all blocks of a kind
share the code. Sizes that were asked for beforehand (`warm`) get code for exactly their shape; any
other size runs code with flexible shapes, so that no request waits for the compiler. Which of the
two an image runs depends on its size and rows alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Mode = Literal["default", "max-autotune"]
Shape = tuple[int, int]  # rows and image tokens

DEFAULT_COMPILED_FOLDER = "~/.cache/octet/compiled"
MOST_SHAPES = 1024  # torch gives up on a function after so many kinds of input; by default 8
MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}
TRIALS = 10


def keep_compiled_code(folder: str | None) -> None:
    """In a folder of this node, by torch's version: a later start finds it there."""
    root = Path(folder or DEFAULT_COMPILED_FOLDER).expanduser() / torch.__version__
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(root)  # torch itself may have set it


class CompiledBlock(nn.Module):
    """A block that runs its exact code for warm shapes, and its flexible code for others."""

    def __init__(self, block: nn.Module, warm: Collection[Shape], mode: Mode, backend: str) -> None:
        super().__init__()
        self.block = block
        self._warm = warm
        inductors = MODES[mode] if backend == "inductor" else None
        # Not as sub-modules: they would name the block's weights a second time.
        self._code = {
            exact: torch.compile(
                block, fullgraph=True, dynamic=not exact, backend=backend, mode=inductors
            )
            for exact in (True, False)
        }

    def forward(self, *, hidden_states: torch.Tensor, **inputs: Any) -> Any:
        rows, tokens, _ = hidden_states.shape
        code = self._code[(rows, tokens) in self._warm]
        return code(hidden_states=hidden_states, **inputs)


def compile_blocks(
    transformer: nn.Module,
    warm: Collection[Shape],
    mode: Mode = "default",
    backend: str = "inductor",
) -> nn.Module:
    """In place; nothing is compiled before its first call."""
    torch._dynamo.config.recompile_limit = MOST_SHAPES
    torch._dynamo.config.accumulated_recompile_limit = MOST_SHAPES
    blocks: Any = transformer.transformer_blocks
    for i, block in enumerate(blocks):
        blocks[i] = CompiledBlock(block, warm, mode, backend)
    return transformer


# -- attention ------------------------------------------------------------------------------------

ATTENTION = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def those_that_work(candidates: Iterable[str], seconds: Callable[[str], float]) -> dict[str, float]:
    """What each takes, fastest first; `seconds` raises `RuntimeError` for what does not work."""
    took: dict[str, float] = {}
    for name in candidates:
        # torch's answer to a kernel that this card or shape does not have
        with suppress(RuntimeError):
            took[name] = seconds(name)
    return dict(sorted(took.items(), key=lambda item: item[1]))


def choose_attention(
    heads: int, head_width: int, tokens: int, device: str, dtype: torch.dtype
) -> dict[str, float]:
    """Time each kind of fused attention on this card for one image, and use the fastest for good.

    For the whole process; nothing changes where none of them works. Returns seconds, fastest first.
    """
    q, k, v = torch.randn(3, 2, heads, tokens, head_width, device=device, dtype=dtype)

    def seconds(name: str) -> float:
        with sdpa_kernel(ATTENTION[name]):
            F.scaled_dot_product_attention(q, k, v)
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(TRIALS):
                F.scaled_dot_product_attention(q, k, v)
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / TRIALS

    took = those_that_work(ATTENTION, seconds)
    if took:
        chosen = next(iter(took))
        torch.backends.cuda.enable_cudnn_sdp(chosen == "cudnn")
        torch.backends.cuda.enable_flash_sdp(chosen == "flash")
        torch.backends.cuda.enable_mem_efficient_sdp(chosen == "efficient")
    return took
