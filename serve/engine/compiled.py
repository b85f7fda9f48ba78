"""The transformer's blocks compiled, and its attention by measurement.

FP8 pays only compiled: in eager execution the scaling of activations costs more than the matrix
products save. Blocks are compiled one kind at a time, not the whole model: all blocks of a kind
share the code. Sizes that were asked for beforehand (`warm`) get code for exactly their shape; any
other size runs code with flexible shapes, so that no request waits for the compiler. Which of the
two an image runs depends on its size and rows alone.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Mode = Literal["default", "max-autotune"]
Shape = tuple[int, int]  # rows and image tokens

DEFAULT_COMPILED_FOLDER = "~/.cache/octet/compiled"
MOST_SHAPES = 1024  # torch gives up on a function after so many kinds of input; by default 8
MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}
TRIALS = 10


def keep_compiled_code(folder: str | None) -> FileLock:
    """In a folder of this node, by torch's version: a later start finds it there.

    Who holds the lock compiles; replicas that start together would else all compile the same.
    """
    root = Path(folder or DEFAULT_COMPILED_FOLDER).expanduser() / torch.__version__
    root.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(root)  # torch itself may have set it
    return FileLock(root / "compiling.lock")


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

# In order of preference; another is used if it takes less by `WORTH`.
ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
WORTH = 0.9
_for_good = ExitStack()  # what is entered here is never left


def preferred(took: Mapping[str, float]) -> list[str]:
    """Those that work, the one to be used first."""
    names = [name for name in ATTENTION if name in took]
    fastest = min(names, key=lambda name: took[name], default=None)
    if fastest and took[fastest] < WORTH * took[names[0]]:
        names.remove(fastest)
        names.insert(0, fastest)
    return names


def time_attention(
    heads: int, head_width: int, tokens: int, device: str, dtype: torch.dtype
) -> dict[str, float]:
    """Seconds of each kind of fused attention that works on this card, for one image's two rows."""
    q, k, v = torch.randn(3, 2, heads, tokens, head_width, device=device, dtype=dtype)
    took = {}
    for name, backend in ATTENTION.items():
        # RuntimeError: torch's answer to a kernel that this card or shape does not have
        with suppress(RuntimeError), sdpa_kernel(backend):
            seconds = []
            for _ in range(TRIALS):
                torch.cuda.synchronize()
                began = time.perf_counter()
                F.scaled_dot_product_attention(q, k, v)
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
            took[name] = statistics.median(seconds)
    return took


def prefer_attention(names: Sequence[str]) -> None:
    """In this process from now on, where they work; others stay for what these cannot do.

    The VAE's attention, with one wide head, is such.
    """
    order = [ATTENTION[name] for name in names]
    rest = [backend for backend in ATTENTION.values() if backend not in order]
    _for_good.enter_context(sdpa_kernel([*order, *rest, SDPBackend.MATH], set_priority=True))
