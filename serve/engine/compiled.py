"""Compilation of the transformer's blocks, and choice of its attention kernel by measurement.

FP8 saves time only when compiled: in eager execution the scaling of activations costs more than the
matrix products save. Blocks are compiled one by one, not the whole model at once, because all
blocks of a kind share their compiled code.

A *warm* shape is one that is named before the start; it gets code compiled for just this shape. All
other shapes run *flexible* code, which is compiled once for any shape. So no request waits for the
compiler. The number of rows and of image tokens alone decide which code a call runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Mode = Literal["default", "max-autotune"]
Shape = tuple[int, int]  # rows, and image tokens of a row

MAX_SHAPES = 1024  # kinds of input after which torch stops compiling a function; its default is 8
MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}
# Rows up to this length are read once: see `whole_rows`. The longest one in SD3.5 Large has 9,728
# numbers, and kernels pad to powers of two.
LONGEST_ROW = 16384
TRIALS = 10  # measurements of each attention kernel


class CompiledBlock(nn.Module):
    """A transformer block that runs compiled code.

    Each warm shape has code of its own; all other shapes run the flexible code.
    """

    def __init__(self, block: nn.Module, warm: Collection[Shape], mode: Mode, backend: str) -> None:
        super().__init__()
        self.block = block
        self._warm = warm
        inductor_mode = MODES[mode] if backend == "inductor" else None
        # A dictionary, because submodules would list the block's weights a second time.
        self._code = {
            exact: torch.compile(
                block, fullgraph=True, dynamic=not exact, backend=backend, mode=inductor_mode
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
    """Replace the transformer's blocks, in place, by a `CompiledBlock` each; returns it.

    Nothing is compiled yet: the code for a shape is compiled when the shape first runs.
    """
    torch._dynamo.config.recompile_limit = MAX_SHAPES
    torch._dynamo.config.accumulated_recompile_limit = MAX_SHAPES
    torch._inductor.config.inductor_choices_class = _whole_rows
    blocks: Any = transformer.transformer_blocks
    for i, block in enumerate(blocks):
        blocks[i] = CompiledBlock(block, warm, mode, backend)
    return transformer


def _whole_rows() -> Any:
    from .whole_rows import WholeRows  # its imports take long, and only a compiler needs them

    return WholeRows(LONGEST_ROW)


# -- attention ------------------------------------------------------------------------------------

# Attention kernels in order of preference. A later one is used only if it takes less than
# `WORTH_SWITCHING` times as long as the first one that works.
ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
WORTH_SWITCHING = 0.9
_kept_contexts = ExitStack()  # contexts that last as long as the process


def preferred(took: Mapping[str, float]) -> list[str]:
    """The names of the attention kernels that work, in the order in which they should be used.

    `took`: the seconds of each kernel that works.
    """
    names = [name for name in ATTENTION if name in took]
    fastest = min(names, key=lambda name: took[name], default=None)
    if fastest and took[fastest] < WORTH_SWITCHING * took[names[0]]:
        names.remove(fastest)
        names.insert(0, fastest)
    return names


def time_attention(
    heads: int, head_width: int, tokens: int, device: str, dtype: torch.dtype
) -> dict[str, float]:
    """Measure the attention kernels; returns the median seconds of each that works on this card.

    `heads`, `head_width`, `tokens`: the size of the measured attention, which has two rows, like
    one image with guidance.
    """
    q, k, v = torch.randn(3, 2, heads, tokens, head_width, device=device, dtype=dtype)
    took = {}
    for name, backend in ATTENTION.items():
        # torch raises RuntimeError if the card or the shape does not support a kernel
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
    """Make torch prefer these attention kernels, in this order, in the whole process from now on.

    The other kernels stay available for inputs that the preferred ones do not support, such as the
    VAE's attention with one wide head.
    """
    order = [ATTENTION[name] for name in names]
    others = [backend for backend in ATTENTION.values() if backend not in order]
    backends = [*order, *others, SDPBackend.MATH]
    _kept_contexts.enter_context(sdpa_kernel(backends, set_priority=True))
