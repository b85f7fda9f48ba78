"""Measure the time and the peak memory of loading an FP8 replica's transformer.

    python -m bench.load_time [--heads 12] [--repeats 5]

Makes a random model with SD3.5 Medium's structure (24 layers, dual attention in the first 13, heads
of 64) at a reduced width, once in bfloat16 and once as `octet quantize` writes it. Fresh processes,
which have imported everything already, load each checkpoint and then touch every weight. The files
are in the page cache. Peak memory is the process's largest resident set, mapped files included,
minus its resident set before loading.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

SD35_MEDIUM_HEADS = 24


def random_model(folder: Path, heads: int) -> None:
    """Write a bfloat16 checkpoint with only a transformer; `heads`: its width, 24 in Medium."""
    import torch
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        num_layers=24,
        num_attention_heads=heads,
        attention_head_dim=64,
        caption_projection_dim=heads * 64,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        in_channels=16,
        out_channels=16,
        patch_size=2,
        sample_size=128,
        pos_embed_max_size=384,
        qk_norm="rms_norm",
        dual_attention_layers=tuple(range(13)),
    )
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        tensor.data = tensor.data.bfloat16()
    transformer.save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text("{}")


def load(folder: Path) -> dict[str, float]:
    """Load the transformer in this process; return seconds and peak bytes."""
    import torch

    from serve.engine.denoiser import load_transformer
    from serve.engine.precision import RECIPES
    from serve.models.checkpoints import verify

    before = _peak_bytes()
    began = time.perf_counter()
    verify(folder, ["transformer"])
    verified = time.perf_counter()
    transformer = load_transformer(folder, RECIPES["fp8"], "cpu")
    for tensor in transformer.state_dict().values():
        tensor.view(torch.uint8).max()
    done = time.perf_counter()
    return {
        "verify_s": verified - began,
        "load_s": done - verified,
        "peak_bytes": _peak_bytes() - before,
    }


def measure(heads: int, repeats: int) -> dict[str, Any]:
    """Medians of loading both kinds of checkpoint, and their sizes on disk.

    The two kinds take turns.
    """
    from serve.engine.fp8_checkpoint import quantize
    from serve.models.checkpoints import size_bytes, write_manifest

    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["serve.engine.denoiser", "serve.models.checkpoints"])
    with (
        tempfile.TemporaryDirectory() as temporary,
        ProcessPoolExecutor(1, processes, max_tasks_per_child=1) as fresh,
    ):
        folders = {"bf16": Path(temporary) / "bf16", "fp8": Path(temporary) / "fp8"}
        random_model(folders["bf16"], heads)
        write_manifest(folders["bf16"], {})
        quantize(folders["bf16"], folders["fp8"])
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in folders}
        for _ in range(repeats):
            for kind, folder in folders.items():
                runs[kind].append(fresh.submit(load, folder).result())
        sizes = {kind: size_bytes(folder, "transformer") for kind, folder in folders.items()}
    medians = {
        kind: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for kind, found in runs.items()
    }
    return {kind: {"file_bytes": sizes[kind], **medians[kind]} for kind in folders}


def _peak_bytes() -> int:
    """The largest resident set of this program in bytes.

    getrusage would also count the parent process before the fork.
    """
    (line,) = [s for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s]
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--heads", type=int, default=12, help="attention heads; 24 is the width of SD3.5 Medium"
    )
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    found = measure(arguments.heads, arguments.repeats)
    width = arguments.heads / SD35_MEDIUM_HEADS
    print(f"SD3.5 Medium's structure at {width:g} of its width, {platform.machine()}, ", end="")
    print(f"{os.cpu_count()} cores, medians of {arguments.repeats}")
    print("weights on disk         file MiB  verify s  load s  peak MiB")
    for kind, row in found.items():
        mib = [row[key] / 2**20 for key in ("file_bytes", "peak_bytes")]
        name = "bf16, quantised at load" if kind == "bf16" else "FP8, made beforehand"
        print(f"{name:23} {mib[0]:9.0f} {row['verify_s']:9.2f} {row['load_s']:7.2f} {mib[1]:9.0f}")
    ratio = found["bf16"]["load_s"] / found["fp8"]["load_s"]
    both = [sum(found[kind][key] for key in ("verify_s", "load_s")) for kind in ("bf16", "fp8")]
    print(f"made beforehand: {ratio:.1f} × faster, {both[0] / both[1]:.1f} × with verification")


if __name__ == "__main__":
    main()
