"""Measure 30 starts on one node whose weights are on a slow shared volume.

    python -m bench.slow_volume [--starts 30]      # as root, on Linux with cgroup v1; 5 minutes

The volume is an ext4 file system in a file, and the kernel lets this program read `READ_BPS` from
it. Before each start the page cache is dropped, as if other programs needed the memory. Each start
is a fresh process that opens the FP8 checkpoint of a random model as a Generator does, and touches
every weight. The bytes are those that the kernel counts for the volume.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from .load_time import random_model
from .machine import machine

READ_BPS = 100 * 10**6
HEADS = 6  # a quarter of SD3.5 Medium's width
GROUP = Path("/sys/fs/cgroup/blkio/octet-bench")
WAYS = {
    "no digest remembered": (False, False),
    "digests remembered": (True, False),
    "digests remembered, copy on the node": (True, True),
}


@contextlib.contextmanager
def slow_volume(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Mount a slow volume; yield its folder, and the kernel's file with its counters."""
    image, mounted = folder / "image", folder / "volume"
    with image.open("wb") as file:
        file.truncate(2**30)
    mounted.mkdir()
    _run("mkfs.ext4", "-q", str(image))
    device = Path(_run("losetup", "--find", "--show", str(image)).strip())
    block = Path("/sys/block") / device.name
    try:
        _run("mount", str(device), str(mounted))
        GROUP.mkdir()
        try:
            number = (block / "dev").read_text().strip()
            (GROUP / "blkio.throttle.read_bps_device").write_text(f"{number} {READ_BPS}")
            (GROUP / "cgroup.procs").write_text(str(os.getpid()))
            yield mounted, block / "stat"
        finally:
            for process in (GROUP / "cgroup.procs").read_text().split():
                (GROUP.parent / "cgroup.procs").write_text(process)
            GROUP.rmdir()
            _run("umount", str(mounted))
    finally:
        _run("losetup", "--detach", str(device))


def start(checkpoint: str, cache: str, local: str | None) -> float:
    """Open the checkpoint and touch every weight; return the seconds that it took.

    `cache`: where digests are remembered. `local`: the folder for copies.
    """
    os.environ["XDG_CACHE_HOME"] = cache
    import torch

    from serve.engine.denoiser import load_transformer
    from serve.engine.precision import RECIPES
    from serve.models.checkpoints import open_checkpoint
    from serve.settings.models import Source

    began = time.perf_counter()
    source = Source(location=checkpoint)
    folder = open_checkpoint(source, None, ["transformer"], local)
    transformer = load_transformer(folder, RECIPES["fp8"], "cpu")
    for tensor in transformer.state_dict().values():
        tensor.view(torch.uint8).max()
    return time.perf_counter() - began


def measure(
    fresh: ProcessPoolExecutor,
    checkpoint: Path,
    counters: Path,
    folder: Path,
    starts: int,
    *,
    remembered: bool,
    copied: bool,
) -> tuple[list[float], int]:
    """The seconds of each start, and the bytes that all of them read from the volume."""
    local = str(folder / "disk") if copied else None
    took, before = [], _bytes_read(counters)
    for number in range(starts):
        Path("/proc/sys/vm/drop_caches").write_text("1")
        cache = folder / ("cache" if remembered else f"cache-{number}")
        took.append(fresh.submit(start, str(checkpoint), str(cache), local).result())
    return took, _bytes_read(counters) - before


def _bytes_read(counters: Path) -> int:
    return int(counters.read_text().split()[2]) * 512


def _run(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - ours
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=30)
    starts = parser.parse_args().starts
    from serve.engine.fp8_checkpoint import quantize
    from serve.models.checkpoints import size_bytes, write_manifest

    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["serve.engine.denoiser", "serve.models.checkpoints"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        random_model(folder / "bf16", HEADS)
        write_manifest(folder / "bf16", {})
        with (
            slow_volume(folder) as (volume, counters),
            ProcessPoolExecutor(1, processes, max_tasks_per_child=1) as fresh,
        ):
            checkpoint = volume / "fp8"
            quantize(folder / "bf16", checkpoint)
            os.sync()
            mib = size_bytes(checkpoint, "transformer") / 2**20
            print(f"{starts} starts, {mib:.0f} MiB at {READ_BPS / 1e6:.0f} MB/s, {machine()}\n")
            print("| | volume read, MiB | first start s | later starts s |")
            print("|---|---|---|---|")
            for name, (remembered, copied) in WAYS.items():
                (folder / name).mkdir()
                (first, *later), read = measure(
                    fresh,
                    checkpoint,
                    counters,
                    folder / name,
                    starts,
                    remembered=remembered,
                    copied=copied,
                )
                cells = f"{read / 2**20:.0f}", f"{first:.1f}", f"{statistics.median(later):.1f}"
                print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
