"""The CUDA kernels of a block of SD3.5, counted without a GPU: `make check-kernels`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed: make check-kernels installs it")


@pytest.fixture(scope="module")
def blocks() -> Any:
    """The kernels of a block, by model and by who chose them."""
    command = [sys.executable, "-W", "ignore", "-m", "bench.gpu.kernels", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    return json.loads(done.stdout)


def total(block: Any, what: str) -> float:
    return float(sum(kernel["calls"] * kernel[what] for kernel in block["kernels"]))


@pytest.mark.parametrize(
    ("model", "calls"),
    [
        ("sd3.5-large", {"triton": 15, "_scaled_mm": 8, "attention": 1}),
        ("sd3.5-medium", {"triton": 18, "_scaled_mm": 10, "attention": 2}),
    ],
)
def test_a_block_calls_so_many_kernels_and_no_linear_layer_is_in_16_bit(
    blocks: Any, model: str, calls: dict[str, int]
) -> None:
    assert blocks[model]["Octet"]["calls"] == calls


@pytest.mark.parametrize("model", ["sd3.5-large", "sd3.5-medium"])
def test_a_row_is_read_once_and_gelu_is_computed_once(blocks: Any, model: str) -> None:
    ours, torchs = blocks[model]["Octet"], blocks[model]["torch"]
    assert total(ours, "gelus") == 2  # one of the image, one of the text
    assert total(ours, "loads") < total(torchs, "loads")
    # Octet does not write the normalised rows: those of attention and feed-forward, in bfloat16.
    assert total(ours, "gb") < 0.93 * total(torchs, "gb")


def test_each_kernel_finds_room_in_the_registers(blocks: Any) -> None:
    for by_choice in blocks.values():
        for kernel in by_choice["Octet"]["kernels"]:
            assert kernel["spilled"] == 0, kernel
