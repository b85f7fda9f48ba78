"""Compare the ways to store T5: `python -m bench.t5 [--layers 2]`, about a minute on 2 cores.

T5-XXL has its exact widths, random weights and only some of its 24 layers; times are those of all
24, by proportion. Prints for each way the seconds of a prompt of 256 tokens, the GiB of the
weights, and the signal to noise ratio of the embeddings against float32.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from typing import Any, get_args

import torch
from transformers import T5Config, T5EncoderModel

from cluster.structure import config
from serve.engine.precision import T5Storage, store_in_fp8

from .machine import machine

ALL_LAYERS, TOKENS, REPEATS = 24, 256, 5


@torch.inference_mode()
def measure(t5: Any, ids: torch.Tensor, exact: torch.Tensor) -> tuple[float, float, float]:
    """Seconds of a prompt per layer, bytes of a layer, and the error of the embeddings in dB."""
    found = t5(ids).last_hidden_state.float()
    took = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        t5(ids)
        took.append(time.perf_counter() - began)
    noise = (found - exact).square().mean()
    db = 10 * math.log10(exact.square().mean() / noise) if noise else math.inf
    layers = len(t5.encoder.block)
    stored = sum(t.nbytes for t in t5.encoder.block.state_dict().values())
    return statistics.median(took) / layers, stored / layers, db


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    settings = T5Config(**(config("t5_xxl") | {"num_layers": arguments.layers, "vocab_size": 64}))
    original: Any = T5EncoderModel(settings).eval()
    ids = torch.randint(64, (1, TOKENS))
    with torch.inference_mode():
        exact = original(ids).last_hidden_state
    print(f"{machine()}, torch {torch.__version__}\n")
    columns = "T5-XXL stored in", "computed in", "s per prompt", "GiB", "signal to noise, dB"
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for how in (None, *get_args(T5Storage)):
            t5 = copy.deepcopy(original).to(dtype)
            if how:
                store_in_fp8(t5, how)
            seconds, stored, db = measure(t5, ids, exact)
            found = f"{ALL_LAYERS * seconds:.1f} | {ALL_LAYERS * stored / 2**30:.2f} | {db:.1f}"
            print(f"| {how or name} | {name} | {found} |", flush=True)


if __name__ == "__main__":
    main()
