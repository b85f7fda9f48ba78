"""Measure what packing gains on one card: images/s and p99 latency of several processes.

    python -m bench.gpu.packing [--model sd3.5-medium] [--side 512] [--out FOLDER]   # --tiny: CPU
    python -m bench.gpu.packing --together [--mps]

Each process holds its own model (exact structure, random weights, compiled FP8) and runs the
denoising loop with all slots taken, like replicas that share a card. All processes run from the
start. In each cell of the table, some of them generate images at the same time and the others wait.

Without `--together` 1, 2 and 4 processes hold the same model. With it, Large, Large Turbo and
Medium have a process each, and each of them is measured alone and beside the others, with its usual
steps and guidance. `kept` is the sum of the parts of its own rate that each model keeps beside the
others: 1 if the processes lose nothing to each other. Text encoders are left out, because they are
seldom busy. `--mps`: with NVIDIA's MPS.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster import mps
from cluster.structure import TRANSFORMERS, USUAL_IMAGES
from serve.engine.compiled import prefer_attention, preferred
from serve.engine.denoising_loop import DenoisingLoop, bucket

from ..demo_engine import Engine
from ..replay import percentile
from .model import FP8, FP8_EAGER, RESULTS, Bench, save
from .steps import attention_s

PROCESSES = 1, 2, 4
SLOTS = 1, 2, 4


def generate_for(
    engine: Engine, slots: int, seconds: float, steps: int, rows: int
) -> dict[str, Any]:
    """Generate images in all slots for `seconds`; return images/s and latencies.

    `steps`, `rows`: of each image.

    A slot's rate counts from the end of its first image to the end of its last. So an image that is
    unfinished when the time is over does not lower the rate.
    """
    loop = DenoisingLoop(engine.denoiser, 2 * slots)
    key = engine.sizes[0], rows, steps
    end = time.monotonic() + seconds
    rates: list[float] = []
    latencies: list[float] = []

    def one_slot(seed: int) -> None:
        done: list[float] = []
        while len(done) < 2 or time.monotonic() < end:
            began = time.monotonic()
            loop.generate(engine.request(key, seed), engine.embeds(rows)).result()
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
    if arguments.mps_folder:
        mps.join(arguments.mps_folder, arguments.fraction)
    prefer_attention(preferred(attention_s(bench, arguments.model)))
    way = FP8_EAGER if arguments.tiny else FP8
    engine = Engine(bench.denoiser(arguments.model, way), bench.embeds(2), [arguments.side])
    rows = arguments.rows
    for images in range(1, max(arguments.slots) + 1):  # warm up every number of rows
        batch = [engine.begin((arguments.side, rows, 2), seed) for seed in range(images)]
        engine.denoiser.denoise_step(batch, bucket(rows * images))
    engine.denoiser.decode(batch[0].latents)
    print(json.dumps({"peak_gib": bench.peak_gib()}), flush=True)
    for line in sys.stdin:
        slots, seconds = json.loads(line)
        found = generate_for(engine, slots, seconds, arguments.steps, arguments.rows)
        print(json.dumps(found), flush=True)


class Replica:
    """A process with a model, seen from its parent.

    `fraction`: its part of the card. `mps_folder`: where MPS has its pipes; None: no MPS.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        model: str,
        steps: int,
        rows: int,
        fraction: float,
        mps_folder: str | None,
    ) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "bench.gpu.packing", "--replica"]
        command += ["--model", model, "--side", str(arguments.side)]
        command += ["--steps", str(steps), "--rows", str(rows), "--fraction", str(fraction)]
        command += ["--slots", *map(str, arguments.slots)]
        command += ["--tiny"] if arguments.tiny else []
        command += ["--mps-folder", mps_folder] if mps_folder else []
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


def generate(replicas: Sequence[Replica], slots: int, seconds: float) -> list[dict[str, Any]]:
    """Let these processes generate images at the same time, with `slots` slots each.

    Returns images/s and latencies for each process.
    """
    for replica in replicas:
        replica.ask(slots, seconds)
    found = []
    for replica in replicas:
        result = replica.answer()
        latencies = sorted(result["latencies_s"])
        found.append(
            {
                "images": len(latencies),
                "images_s": result["images_s"],
                "latencies_s": latencies,
                "latency_p50_s": percentile(latencies, 0.5),
                "latency_p99_s": percentile(latencies, 0.99),
            }
        )
    return found


def equal_processes(arguments: argparse.Namespace, mps_folder: str | None) -> dict[str, Any]:
    """Measure 1, 2 and 4 processes with the same model; prints the table."""

    def replica() -> Replica:
        fraction = 1 / max(arguments.processes)
        return Replica(
            arguments, arguments.model, arguments.steps, arguments.rows, fraction, mps_folder
        )

    first = replica()  # starts alone, so that the others find its compiled code
    peaks = [first.answer()]
    others = [replica() for _ in range(max(arguments.processes) - 1)]
    peaks += [other.answer() for other in others]
    replicas, cells = [first, *others], []
    print(f"{arguments.model}, {arguments.side}², {arguments.steps} steps")
    print("processes  slots  images/s  p50 s  p99 s")
    for n in arguments.processes:
        for slots in arguments.slots:
            found = generate(replicas[:n], slots, arguments.seconds)
            latencies = sorted(latency for each in found for latency in each["latencies_s"])
            images_s = sum(each["images_s"] for each in found)
            p50, p99 = percentile(latencies, 0.5), percentile(latencies, 0.99)
            cells.append(
                {
                    "processes": n,
                    "slots": slots,
                    "images": len(latencies),
                    "images_s": images_s,
                    "latency_p50_s": p50,
                    "latency_p99_s": p99,
                }
            )
            print(f"{n:9} {slots:6} {images_s:9.2f} {p50:6.2f} {p99:6.2f}", flush=True)
    for each in replicas:
        each.close()
    return {
        "model": arguments.model,
        "steps": arguments.steps,
        "peak_gib": [peak["peak_gib"] for peak in peaks],
        "cells": cells,
    }


def together(arguments: argparse.Namespace, mps_folder: str | None) -> dict[str, Any]:
    """Measure different models alone and beside each other; prints the table."""
    replicas, peaks = {}, {}
    for model in TRANSFORMERS:  # one after the other, so that each finds compiled code
        steps, rows = (1, 1) if arguments.tiny else USUAL_IMAGES[model]
        replica = Replica(arguments, model, steps, rows, 1 / len(TRANSFORMERS), mps_folder)
        replicas[model], peaks[model] = replica, replica.answer()["peak_gib"]
    cells = []
    print(f"{arguments.side}²\nslots  model               alone/s  beside/s  part  p99 s  beside")
    for slots in arguments.slots:
        alone = {m: generate([r], slots, arguments.seconds)[0] for m, r in replicas.items()}
        each = generate([*replicas.values()], slots, arguments.seconds)
        beside = dict(zip(replicas, each, strict=True))
        parts = {m: beside[m]["images_s"] / alone[m]["images_s"] for m in replicas}
        for m, part in parts.items():
            rates = f"{alone[m]['images_s']:8.3f} {beside[m]['images_s']:9.3f} {part:5.2f}"
            p99s = f"{alone[m]['latency_p99_s']:6.2f} {beside[m]['latency_p99_s']:7.2f}"
            print(f"{slots:5}  {m:18} {rates} {p99s}")
        kept = sum(parts.values())
        print(f"{slots:5}  kept: {kept:.2f}", flush=True)
        for found in (*alone.values(), *beside.values()):
            del found["latencies_s"]
        cells.append({"slots": slots, "kept": kept, "alone": alone, "beside": beside})
    for replica in replicas.values():
        replica.close()
    return {"peak_gib": peaks, "cells": cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--together", action="store_true", help="different models")
    parser.add_argument("--mps", action="store_true", help="with NVIDIA's MPS")
    parser.add_argument("--model", default="sd3.5-medium", choices=[*TRANSFORMERS])
    parser.add_argument("--side", type=int, default=512, help="of the images, in pixels")
    parser.add_argument("--steps", type=int, default=20, help="of each image")
    parser.add_argument("--rows", type=int, default=2, help="of each image")
    parser.add_argument("--processes", type=int, nargs="+", default=PROCESSES)
    parser.add_argument("--slots", type=int, nargs="+", default=SLOTS, help="of each process")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each cell")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU")
    for hidden, kind in (("--fraction", float), ("--mps-folder", Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--replica", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    bench = Bench.here(arguments.tiny)
    if arguments.replica:
        run_replica(bench, arguments)
        return
    print(machine := bench.machine())
    with tempfile.TemporaryDirectory() as folder:
        mps_folder = folder if arguments.mps else None
        measure = together if arguments.together else equal_processes
        found = measure(arguments, mps_folder)
        if mps_folder:
            mps.stop(Path(mps_folder))
    what = "together" if arguments.together else arguments.model
    name = " ".join(["packing", what, str(arguments.side), *(["mps"] if arguments.mps else [])])
    save(arguments.out, name, {"machine": machine, "side": arguments.side, **found})


if __name__ == "__main__":
    main()
