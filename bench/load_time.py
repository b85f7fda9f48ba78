"""Measure the time and the peak memory of loading an FP8 replica's transformer, and whole starts.

    python -m bench.load_time [--heads 12] [--repeats 5]
    python -m bench.load_time --starts

With `--starts`, fresh processes load the demo model as a Generator does, with compiled blocks and
with copies on the node's disk, and print the seconds of each phase: the first one on a node that
has nothing yet, the second on the same node. Without it:

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
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

SD35_MEDIUM_HEADS = 24
DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"


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


def start(folder: str) -> dict[str, float]:
    """Start like a Generator of the demo model; return the seconds of each phase.

    `folder`: everything that a node keeps for later starts.
    """
    os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
    began = time.monotonic()
    import torch

    from serve.engine.denoiser import DENOISER_COMPONENTS, Denoiser
    from serve.engine.denoising_loop import DenoisingLoop
    from serve.engine.precision import RECIPES
    from serve.engine.prompt_embeds import PromptEmbeds
    from serve.engine.warm_up import Phases, WarmUp
    from serve.models.checkpoints import open_checkpoint
    from serve.settings.models import Pool, Source

    phases = Phases()
    phases.seconds["import"] = time.monotonic() - began
    pool = Pool(precision="fp8", slots=1, compile="default", warm_sizes=("128x128",))
    found = open_checkpoint(
        Source(location=f"{folder}/shared"),
        None,
        DENOISER_COMPONENTS,
        f"{folder}/disk",
        phases.timed,
    )
    with phases.timed("load"):
        denoiser = Denoiser.load(found, RECIPES["fp8"], "cpu")
    warm_up = WarmUp(denoiser, pool, f"{folder}/compiled")
    warm_up.prepare()
    loop = DenoisingLoop(denoiser, max_rows=2)
    config = denoiser.transformer.config
    embeds = PromptEmbeds(
        torch.randn(2, 32, config.joint_attention_dim),
        torch.randn(2, config.pooled_projection_dim),
    )
    warm_up.run(loop, embeds, phases)
    loop.close()
    return phases.seconds


def measure_starts() -> dict[str, dict[str, float]]:
    """The phases of a start on a new node, and of the next one on the same node."""
    from serve.models.checkpoints import write_manifest

    processes = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, processes, max_tasks_per_child=1) as fresh,
    ):
        shared = Path(folder) / "shared"
        shutil.copytree(DEMO_MODEL, shared)
        write_manifest(shared, {})
        return {name: fresh.submit(start, folder).result() for name in ("cold", "warm")}


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
    parser.add_argument("--starts", action="store_true", help="phases of whole starts")
    arguments = parser.parse_args()
    if arguments.starts:
        from .machine import machine

        print(f"demo model, compiled, {machine()}\n")
        starts = measure_starts()
        print("| start | " + " | ".join([*starts["cold"], "sum"]) + " |")
        print("|---" * (len(starts["cold"]) + 2) + "|")
        for name, phases in starts.items():
            seconds = [f"{phases[phase]:.2f}" for phase in starts["cold"]]
            print(f"| {name} | " + " | ".join([*seconds, f"{sum(phases.values()):.2f}"]) + " |")
        return
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
