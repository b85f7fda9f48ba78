"""Measure what matters most on a card, in less than ten minutes: `make bench-gpu QUICK=1`.

    python -m bench.gpu.quick [--minutes 8] [--out FOLDER]     # --tiny: small shapes, on a CPU too

The parts run in the order of their value. A part begins only if its usual time is left, and the
results are written after each part, so that an early end loses nothing. Models have their exact
structures and random weights. Needs torch, diffusers, transformers and pydantic, but not Ray.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from cluster.footprint import TEXT_TOKENS, footprint
from cluster.structure import TOKEN_PX, structure
from serve.engine.compiled import ATTENTION
from serve.engine.denoiser import Denoiser, DenoisingState
from serve.engine.precision import quantize_rows

from .floor import MeasuredRates, floor_s
from .model import BF16, FP8, FP8_EAGER, RESULTS, Bench, save
from .steps import MODELS, Clock, fp8_here, guarded, rates, structure_of

LARGE, MEDIUM = MODELS
STEPS = 8  # measured steps
# Classes of CUDA kernels by parts of their names; the first class that fits counts.
KERNELS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "matrix product": ("gemm", "nvjet", "cutlass", "_scaled_mm", "addmm", "::mm", "xmma", "cublas"),
    "fused by Inductor": ("triton",),
    "copy": ("memcpy", "memset", "::copy_", "::to"),
}


@dataclass(frozen=True)
class Part:
    """A part of the measurement; `usual_s`: how long it took elsewhere, or a guess."""

    name: str
    usual_s: float
    measure: Callable[[], Any]


class Parts:
    """The parts of the measurement on one device."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.way = FP8 if fp8_here(bench) and not bench.tiny else FP8_EAGER
        if not fp8_here(bench):
            self.way = BF16
        self._large: Denoiser | None = None

    @cached_property
    def rates(self) -> MeasuredRates:
        """The card's rates, measured once: every part's least time follows from them."""
        return rates(self.bench)

    def in_order(self) -> list[Part]:
        return [
            Part("rates", 15, lambda: self.rates._asdict()),
            Part("large_step", 120, self.large_step),
            Part("attention", 20, self.attention),
            Part("products", 20, self.products),
            Part("cpu_time", 60, self.cpu_time),
            Part("decode", 30, self.decode),
            Part("memory", 5, self.memory),
            Part("medium_step", 90, self.medium_step),
            Part("two_processes", 120, self.two_processes),
        ]

    # -- steps ------------------------------------------------------------------------------------

    def large_step(self) -> dict[str, Any]:
        """A step of Large at the larger size, by kernel class, and the least that is possible."""
        self._large = self.bench.denoiser(LARGE, self.way)
        found = self._step(self._large, LARGE, self.bench.sides[0])
        found["kernels_ms"] = self._by_kernel(self._large, self.bench.sides[0])
        return found

    def medium_step(self) -> dict[str, Any]:
        """The same for Medium, at every size."""
        self._large = None
        denoiser = self.bench.denoiser(MEDIUM, self.way)
        return {str(side): self._step(denoiser, MEDIUM, side) for side in self.bench.sides}

    def cpu_time(self) -> dict[str, float]:
        """Milliseconds of CPU and of wall time of a step of Large at the smaller size.

        If both are about equal, the card waits for its host.
        """
        denoiser, side = self._loaded(), self.bench.sides[-1]
        batch = self._batch(denoiser, side)
        denoiser.denoise_step(batch)
        cpu, began = time.process_time(), time.perf_counter()
        for _ in range(STEPS):
            denoiser.denoise_step(batch)
        self.bench.sync()
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        return {"side": side, "wall_ms": 1e3 * wall_s / STEPS, "cpu_ms": 1e3 * cpu_s / STEPS}

    def _step(self, denoiser: Denoiser, model: str, side: int) -> dict[str, Any]:
        batch = self._batch(denoiser, side)
        began = time.perf_counter()
        denoiser.denoise_step(batch)
        self.bench.sync()
        first_s = time.perf_counter() - began
        step_s = self.bench.seconds(lambda: denoiser.denoise_step(batch), STEPS)
        floor = floor_s(
            structure_of(self.bench, model),
            2,
            side,
            TEXT_TOKENS,
            self.rates,
            fp8=self.way is not BF16,
        )
        return {
            "way": self.way.name,
            "first_s": first_s,
            "step_ms": 1e3 * step_s,
            "floor_ms": 1e3 * floor,
            "over_floor": step_s / floor,
            "finite": bool(batch[0].latents.isfinite().all()),
        }

    def _by_kernel(self, denoiser: Denoiser, side: int) -> dict[str, float]:
        """Milliseconds of a step by kernel class; on a CPU by torch's operators."""
        cuda = self.bench.device == "cuda"
        activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
        batch = self._batch(denoiser, side)
        with profile(activities=[activity]) as profiler:
            denoiser.denoise_step(batch)
            self.bench.sync()
        found: Counter[str] = Counter()
        for event in profiler.key_averages():
            spent_us = event.self_device_time_total if cuda else event.self_cpu_time_total
            name = event.key.lower()
            kinds = (kind for kind, parts in KERNELS.items() if any(p in name for p in parts))
            found[next(kinds, "other")] += spent_us / 1e3
        return dict(found)

    def _batch(self, denoiser: Denoiser, side: int) -> list[DenoisingState]:
        return [
            denoiser.begin(
                self.bench.embeds(2),
                width=side,
                height=side,
                num_inference_steps=1000,
                guidance_scale=4.5,
                seed=0,
            )
        ]

    def _loaded(self) -> Denoiser:
        self._large = self._large or self.bench.denoiser(LARGE, self.way)
        return self._large

    # -- kernels ----------------------------------------------------------------------------------

    def attention(self) -> dict[str, dict[str, float]]:
        """Milliseconds of each attention kernel: its first calls in two threads, and later ones.

        cuDNN keeps plans by thread, so the first call in the second thread may be slow again.
        """
        s = structure_of(self.bench, LARGE)
        heads, tokens = s.width // s.head_width, (self.bench.sides[0] // TOKEN_PX) ** 2
        q, k, v = torch.randn(
            *(3, 2, heads, tokens + TEXT_TOKENS, s.head_width),
            device=self.bench.device,
            dtype=torch.bfloat16,
        )

        def attend() -> None:
            F.scaled_dot_product_attention(q, k, v)

        def first_ms() -> float:
            took: list[float] = []

            def run() -> None:
                with sdpa_kernel(backend):
                    took.append(1e3 * self._once(attend))

            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            return took[0]

        found = {}
        for name, backend in ATTENTION.items():
            try:
                with sdpa_kernel(backend):
                    attend()
                found[name] = {"first_ms": first_ms(), "first_of_second_thread_ms": first_ms()}
                with sdpa_kernel(backend):
                    found[name]["ms"] = 1e3 * self.bench.seconds(attend, 10)
            except (RuntimeError, IndexError):  # the card has no such kernel
                found.pop(name, None)
        return found

    def products(self) -> dict[str, dict[str, float]]:
        """TFLOP/s of FP8 products with one scale for each row and with one for the whole matrix.

        By the number of rows: those of a large product, of two rows of text, and of one.
        """
        if not fp8_here(self.bench):
            return {}
        width = structure_of(self.bench, LARGE).width
        found: dict[str, dict[str, float]] = {}
        for m in (64, 33) if self.bench.tiny else (8192, 2 * TEXT_TOKENS, TEXT_TOKENS):
            x = torch.randn(m, width, device=self.bench.device)
            w = torch.randn(4 * width, width, device=self.bench.device)
            (rows, row_scale), (columns, column_scale) = quantize_rows(x), quantize_rows(w)
            one = row_scale[:1].reshape(())
            scales = {
                "by row": (row_scale, column_scale.t().contiguous()),
                "one": (one, one),
            }
            found[str(m)] = {}
            for name, (scale_a, scale_b) in scales.items():
                multiply = partial(
                    torch._scaled_mm,
                    rows,
                    columns.t(),
                    scale_a=scale_a,
                    scale_b=scale_b,
                    out_dtype=torch.bfloat16,
                    use_fast_accum=True,
                )
                seconds = self.bench.seconds(multiply, 20)
                found[str(m)][name] = 2 * m * width * 4 * width / seconds / 1e12
        return found

    def decode(self) -> dict[str, float]:
        """Milliseconds of a decode: in both memory layouts, and compiled."""
        denoiser, side = self._loaded(), self.bench.sides[0]
        latents = torch.randn(1, 16, side // 8, side // 8, device=self.bench.device)
        found: dict[str, float] = {}
        for layout in (torch.channels_last, torch.contiguous_format):
            denoiser.vae.to(memory_format=layout)
            name = str(layout).removeprefix("torch.")
            found[name] = 1e3 * self.bench.seconds(lambda: denoiser.decode(latents), 5)
        denoiser.vae.decoder.compile(backend=self.bench.backend)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about caches in diffusers
            found["compiled"] = 1e3 * self.bench.seconds(lambda: denoiser.decode(latents), 5)
        return found

    def memory(self) -> dict[str, float]:
        """GiB of this process on the card after the warm-up, and what was computed; {} on a CPU."""
        if self.bench.device != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info()
        reserved, peak = torch.cuda.memory_reserved(), torch.cuda.max_memory_allocated()
        computed = footprint(structure(LARGE), "fp8", 1, self.bench.sides[0] ** 2)
        return {
            "context_gib": (total - free - reserved) / 2**30,
            "reserved_gib": reserved / 2**30,
            "peak_gib": peak / 2**30,
            "computed_peak_gib": computed.torch_peak,
        }

    # -- processes --------------------------------------------------------------------------------

    def two_processes(self) -> Any:
        """Images/s of Medium in one process and in two, with one slot each: `bench.gpu.packing`."""
        self._large = None
        self.bench.free()
        command = [sys.executable, "-W", "ignore", "-m", "bench.gpu.packing"]
        command += ["--processes", "1", "2", "--slots", "1", "--side", str(self.bench.sides[-1])]
        command += ["--seconds", "2" if self.bench.tiny else "10"]
        command += ["--tiny", "--steps", "1"] if self.bench.tiny else []
        with tempfile.TemporaryDirectory() as out:
            command += ["--out", out]
            subprocess.run(command, check=True, capture_output=True)  # noqa: S603 - this interpreter
            (file,) = Path(out).iterdir()
            (found,) = json.loads(file.read_text()).values()
        return found["cells"]

    def _once(self, work: Callable[[], object]) -> float:
        self.bench.sync()
        began = time.perf_counter()
        work()
        self.bench.sync()
        return time.perf_counter() - began


def measure(
    parts: Parts,
    clock: Clock,
    on_part: Callable[[dict[str, Any]], object],
    names: Collection[str] | None = None,
) -> dict[str, Any]:
    """Measure the parts for which there is time; `on_part` gets all results after each of them.

    `names`: the parts to measure; by default all.
    """
    found: dict[str, Any] = {"machine": parts.bench.machine()}
    for part in parts.in_order():
        if names and part.name not in names:
            continue
        if clock.allows(part.usual_s):
            began = time.monotonic()
            guarded(found, part.name, part.measure)
            print(f"{part.name}: {time.monotonic() - began:.0f} s", flush=True)
        else:
            found[part.name] = "left out: no time"
        on_part(found)
    return found


def report(found: dict[str, Any]) -> str:
    """The results as short text for a terminal."""
    lines = [" ".join(f"{key} {value}" for key, value in found["machine"].items())]
    for name, part in found.items():
        if name == "machine":
            continue
        lines.append(f"{name}: {_short(part)}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit")
    parser.add_argument("--part", action="append", help="measure only this part; repeatable")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU")
    arguments = parser.parse_args()
    parts, clock = Parts(Bench.here(arguments.tiny)), Clock(arguments.minutes)
    found = measure(parts, clock, lambda found: save(arguments.out, "quick", found), arguments.part)
    print(report(found))


if __name__ == "__main__":
    main()
