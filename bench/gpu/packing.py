"""Measure what packing gains on one card: images/s and p99 latency of 1, 2 and 4 processes.

    python -m bench.gpu.packing [--model sd3.5-medium] [--side 512] [--out FOLDER]   # --tiny: CPU

Each process holds its own model (exact structure, random weights, compiled FP8) and runs the
denoising loop with all slots taken, like replicas that share a card. All processes run from the
start. In each cell of the table, some of them generate images at the same time and the others wait.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from cluster.structure import TRANSFORMERS
from serve.engine.compiled import prefer_attention, preferred
from serve.engine.denoising_loop import DenoisingLoop, bucket

from ..demo_engine import Engine
from ..replay import percentile
from .model import FP8, FP8_EAGER, RESULTS, Bench, save
from .steps import attention_s

PROCESSES = 1, 2, 4
SLOTS = 1, 2, 4


def generate_for(engine: Engine, slots: int, seconds: float, steps: int) -> dict[str, Any]:
    """Generate images in all slots for `seconds`; return images/s and latencies.

    A slot's rate counts from the end of its first image to the end of its last. So an image that is
    unfinished when the time is over does not lower the rate.
    """
    loop = DenoisingLoop(engine.denoiser, 2 * slots)
    key = engine.sizes[0], 2, steps
    end = time.monotonic() + seconds
    rates: list[float] = []
    latencies: list[float] = []

    def one_slot(seed: int) -> None:
        done: list[float] = []
        while len(done) < 2 or time.monotonic() < end:
            began = time.monotonic()
            loop.generate(engine.request(key, seed), engine.embeds(2)).result()
            done.append(time.monotonic())
            if len(done) > 1:
                latencies.append(done[-1] - began)
        rates.append((len(done) - 1) / (done[-1] - done[0]))

    threads = [threading.Thread(target=one_slot, args=(seed,)) for seed in range(slots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loop.close()
    return {"images_s": sum(rates), "latencies_s": latencies}


def run_replica(bench: Bench, arguments: argparse.Namespace) -> None:
    """The program of a process: answer each line of slots and seconds with the results."""
    prefer_attention(preferred(attention_s(bench, arguments.model)))
    way = FP8_EAGER if arguments.tiny else FP8
    engine = Engine(bench.denoiser(arguments.model, way), bench.embeds(2), [arguments.side])
    for slots in arguments.slots:  # warm up every number of rows
        batch = [engine.begin((arguments.side, 2, 2), seed) for seed in range(slots)]
        engine.denoiser.denoise_step(batch, bucket(2 * slots))
    engine.denoiser.decode(batch[0].latents)
    print(json.dumps({"peak_gib": bench.peak_gib()}), flush=True)
    for line in sys.stdin:
        slots, seconds = json.loads(line)
        print(json.dumps(generate_for(engine, slots, seconds, arguments.steps)), flush=True)


class Replica:
    """A process with a model, seen from its parent."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "bench.gpu.packing", "--replica"]
        command += ["--model", arguments.model, "--side", str(arguments.side)]
        command += ["--steps", str(arguments.steps), *(["--tiny"] if arguments.tiny else [])]
        command += ["--slots", *map(str, arguments.slots)]
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, this module
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, slots: int, seconds: float) -> None:
        """Have the process generate images in `slots` slots for `seconds`."""
        assert self._process.stdin
        print(json.dumps((slots, seconds)), file=self._process.stdin, flush=True)

    def answer(self) -> Any:
        """The next line of the process, read as JSON; `RuntimeError` if the process has ended."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a replica ended with exit code {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate()


def cell(replicas: list[Replica], slots: int, seconds: float) -> dict[str, Any]:
    """Measure one cell of the table: these processes at the same time, with `slots` slots each."""
    for replica in replicas:
        replica.ask(slots, seconds)
    results = [replica.answer() for replica in replicas]
    latencies = sorted(latency for result in results for latency in result["latencies_s"])
    return {
        "processes": len(replicas),
        "slots": slots,
        "images": len(latencies),
        "images_s": sum(result["images_s"] for result in results),
        "latency_p50_s": percentile(latencies, 0.5),
        "latency_p99_s": percentile(latencies, 0.99),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sd3.5-medium", choices=[*TRANSFORMERS])
    parser.add_argument("--side", type=int, default=512, help="of the images, in pixels")
    parser.add_argument("--steps", type=int, default=20, help="of each image")
    parser.add_argument("--processes", type=int, nargs="+", default=PROCESSES)
    parser.add_argument("--slots", type=int, nargs="+", default=SLOTS, help="of each process")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each cell")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU")
    parser.add_argument("--replica", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    bench = Bench.here(arguments.tiny)
    if arguments.replica:
        run_replica(bench, arguments)
        return
    first = Replica(arguments)  # starts alone, so that the others find its compiled code
    peaks = [first.answer()]
    others = [Replica(arguments) for _ in range(max(arguments.processes) - 1)]
    peaks += [other.answer() for other in others]
    replicas = [first, *others]
    cells = [
        cell(replicas[:n], slots, arguments.seconds)
        for n in arguments.processes
        for slots in arguments.slots
    ]
    for replica in replicas:
        replica.close()
    found = {
        "machine": bench.machine(),
        "model": arguments.model,
        "side": arguments.side,
        "steps": arguments.steps,
        "peak_gib": [peak["peak_gib"] for peak in peaks],
        "cells": cells,
    }
    save(arguments.out, f"packing {arguments.model} {arguments.side}", found)
    print(found["machine"])
    print(f"{arguments.model}, {arguments.side}², {arguments.steps} steps")
    print("processes  slots  images/s  p50 s  p99 s")
    for c in cells:
        latencies = f"{c['latency_p50_s']:6.2f} {c['latency_p99_s']:6.2f}"
        print(f"{c['processes']:9} {c['slots']:6} {c['images_s']:9.2f} {latencies}")


if __name__ == "__main__":
    main()
