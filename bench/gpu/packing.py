"""Measure what packing gains on one card: images/s and p99 latency of several processes.

    python -m bench.gpu.packing [--model sd3.5-medium] [--side 512] [--out FOLDER]   # --tiny: CPU
    python -m bench.gpu.packing --together [--mps]

Each process holds its own model (exact structure, random weights, compiled FP8) and runs the
denoising loop with all slots taken, like replicas that share a card. All processes run from the
start. In each cell of the table, some of them generate images at the same time and the others wait.

Without `--together` 1, 2 and 4 processes hold the same model. With it, Large, Large Turbo and
Medium have a process each, and each of them is measured alone and beside the others, with its usual
steps and guidance. `kept` is the sum of the parts of its own rate that each model keeps beside the
others: 1 if the processes lose nothing to each other. Give each cell time for some images of the
slowest model (`--seconds 60`). Text encoders are left out, because they are seldom busy. `--mps`:
with NVIDIA's MPS.
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
from serve.engine.denoising_loop import DenoisingLoop, StepDone, bucket

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

    `steps`, `rows`: of each image. The rate counts the steps of all images, also of those that are
    unfinished at the end. So processes that are asked at the same time are all busy for as long as
    they count, however long their images take.
    """
    loop = DenoisingLoop(engine.denoiser, rows * slots)
    key = engine.sizes[0], rows, steps
    end = time.monotonic() + seconds
    latencies: list[float] = []
    done = 0

    def note(event: object) -> None:  # called in the loop's thread only
        nonlocal done
        done += isinstance(event, StepDone) and time.monotonic() < end

    def one_slot(seed: int) -> None:
        while (left_s := end - (began := time.monotonic())) > 0:
            image = loop.generate(engine.request(key, seed), engine.embeds(rows), 0, note)
            try:
                image.result(timeout=left_s)
            except TimeoutError:
                image.cancel()
                return
            latencies.append(time.monotonic() - began)

    threads = [threading.Thread(target=one_slot, args=(seed,)) for seed in range(slots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loop.close()
    return {"images_s": done / steps / seconds, "latencies_s": sorted(latencies)}


def run_replica(bench: Bench, arguments: argparse.Namespace) -> None:
    """The program of a process: answer each line of slots and seconds with the results."""
    if arguments.mps_folder:
        mps.join(arguments.mps_folder)
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

    `mps_folder`: where MPS has its pipes; None: no MPS.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        model: str,
        steps: int,
        rows: int,
        mps_folder: str | None,
    ) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "bench.gpu.packing", "--replica"]
        command += ["--model", model, "--side", str(arguments.side)]
        command += ["--steps", str(steps), "--rows", str(rows)]
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

    Returns images/s and sorted latencies for each process.
    """
    for replica in replicas:
        replica.ask(slots, seconds)
    return [replica.answer() for replica in replicas]


def at(latencies: Sequence[float], share: float) -> float | None:
    """A percentile of sorted latencies; None if no image was finished."""
    return percentile(latencies, share) if latencies else None


def equal_processes(arguments: argparse.Namespace, mps_folder: str | None) -> dict[str, Any]:
    """Measure 1, 2 and 4 processes with the same model; prints the table."""

    def replica() -> Replica:
        return Replica(arguments, arguments.model, arguments.steps, arguments.rows, mps_folder)

    first = replica()  # starts alone, so that the others find its compiled code
    peaks = [first.answer()]
    others = [replica() for _ in range(max(arguments.processes) - 1)]
    peaks += [other.answer() for other in others]
    replicas, cells = [first, *others], []
    print(f"{arguments.model}, {arguments.side}², {arguments.steps} steps")
    print("processes  slots  images/s   p50 s   p99 s")
    for n in arguments.processes:
        for slots in arguments.slots:
            found = generate(replicas[:n], slots, arguments.seconds)
            latencies = sorted(latency for each in found for latency in each["latencies_s"])
            cell = {
                "processes": n,
                "slots": slots,
                "images": len(latencies),
                "images_s": sum(each["images_s"] for each in found),
                "latency_p50_s": at(latencies, 0.5),
                "latency_p99_s": at(latencies, 0.99),
            }
            cells.append(cell)
            numbers = [cell[name] for name in ("images_s", "latency_p50_s", "latency_p99_s")]
            print(f"{n:9} {slots:6}  " + " ".join(map(_number, numbers)), flush=True)
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
        replica = Replica(arguments, model, steps, rows, mps_folder)
        replicas[model], peaks[model] = replica, replica.answer()["peak_gib"]
    cells = []
    print(f"{arguments.side}²\nslots  model               alone/s beside/s    part   p99 s  beside")
    for slots in arguments.slots:
        alone = [generate([replica], slots, arguments.seconds)[0] for replica in replicas.values()]
        beside = generate([*replicas.values()], slots, arguments.seconds)
        kept, models = 0.0, {}
        for model, own, shared in zip(replicas, alone, beside, strict=True):
            part = shared["images_s"] / own["images_s"]
            kept += part
            models[model] = found = {
                "alone_images_s": own["images_s"],
                "beside_images_s": shared["images_s"],
                "part": part,
                "alone_p99_s": at(own["latencies_s"], 0.99),
                "beside_p99_s": at(shared["latencies_s"], 0.99),
            }
            print(f"{slots:5}  {model:18} " + " ".join(map(_number, found.values())))
        print(f"{slots:5}  kept: {kept:.2f}", flush=True)
        cells.append({"slots": slots, "kept": kept, "models": models})
    for replica in replicas.values():
        replica.close()
    return {"peak_gib": peaks, "cells": cells}


def _number(value: float | None) -> str:
    return "      –" if value is None else f"{value:7.3f}"


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
    parser.add_argument("--mps-folder", type=Path, help=argparse.SUPPRESS)
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
        try:
            found = measure(arguments, mps_folder)
        finally:
            if mps_folder:
                mps.stop(Path(mps_folder))
    what = "together" if arguments.together else arguments.model
    name = " ".join(["packing", what, str(arguments.side), *(["mps"] if arguments.mps else [])])
    save(arguments.out, name, {"machine": machine, "side": arguments.side, **found})


if __name__ == "__main__":
    main()
