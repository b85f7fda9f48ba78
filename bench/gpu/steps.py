"""Measure the milliseconds of a denoising step, compared with the least that this card allows.

    python -m bench.gpu.steps [--minutes 9] [--out FOLDER]    # --tiny: small shapes, on a CPU too

Measures on this card: matrix products and copies; steps of Large and Medium in every way to run
them, at 1024² and 512² for 1, 2 and 4 requests with guidance; the VAE's decode; T5; peak memory;
and the signal-to-noise ratio of each kind of FP8 linear layer. The script needs torch and
diffusers; the comparisons with torchao and optimum-quanto need these libraries too. When the time
is over, the remaining cells are left out; the last lines of the report list them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import T5Config, T5EncoderModel

from cluster.cards import FP8_SINCE
from cluster.footprint import TEXT_TOKENS, footprint
from cluster.structure import TOKEN_PX, Structure, config, structure
from serve.engine.compiled import prefer_attention, preferred, time_attention
from serve.engine.precision import RECIPES, Fp8Linear, fp8_layer, quantize_rows, store_in_fp8

from .floor import PUBLISHED_H100, MeasuredRates, floor_s
from .model import BF16, RESULTS, WAYS, Bench, Way, fill, save

MODELS = "sd3.5-large", "sd3.5-medium"
REQUESTS = 1, 4, 2
SIDE_OF_RATES = 8192
STEP_REPEATS = 8


class Clock:
    """Counts down `minutes` from its creation; `allows` says whether enough time is left."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def allows(self, seconds: float) -> bool:
        return time.monotonic() + seconds < self._end


# -- the card -------------------------------------------------------------------------------------


def rates(bench: Bench) -> MeasuredRates:
    """Rates that this card reaches in large matrix products of random numbers, and in a copy."""
    n = 256 if bench.tiny else SIDE_OF_RATES
    a, b = torch.randn(2, n, n, device=bench.device, dtype=torch.bfloat16)
    (rows, row_scale), (columns, column_scale) = quantize_rows(a), quantize_rows(b)

    def fp8() -> object:
        return torch._scaled_mm(
            rows,
            columns.t(),
            scale_a=row_scale,
            scale_b=column_scale.t().contiguous(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    def one_scale() -> object:  # one scale for the whole matrix; slow on a CPU
        scale = row_scale[:1].reshape(())
        return torch._scaled_mm(
            rows,
            columns.t(),
            scale_a=scale,
            scale_b=scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    if not fp8_here(bench):
        fp8_s = math.inf
    else:
        fp8_s = min(bench.seconds(way, 20) for way in ([fp8] if bench.tiny else [fp8, one_scale]))

    source = torch.empty(n * n * 8, device=bench.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return MeasuredRates(
        bf16=2 * n**3 / bench.seconds(lambda: a @ b, 20),
        fp8=2 * n**3 / fp8_s,
        bandwidth=2 * source.nbytes / bench.seconds(lambda: target.copy_(source), 20),
        attention=attention_rate(bench),
    )


def attention_rate(bench: Bench) -> float:
    """Operations per second of attention as in Large, for one request at the larger size."""
    s = structure_of(bench, MODELS[0])
    heads, tokens = s.width // s.head_width, (bench.sides[0] // TOKEN_PX) ** 2 + TEXT_TOKENS
    q, k, v = torch.randn(
        3, 2, heads, tokens, s.head_width, device=bench.device, dtype=torch.bfloat16
    )
    if bench.device == "cuda":
        prefer_attention(preferred(attention_s(bench, MODELS[0])))
    seconds = bench.seconds(lambda: F.scaled_dot_product_attention(q, k, v), 10)
    return float(4 * q.numel() * tokens / seconds)


# -- steps ----------------------------------------------------------------------------------------


def fp8_here(bench: Bench) -> bool:
    """Return whether the device runs FP8; a CPU emulates it."""
    return bench.device == "cpu" or torch.cuda.get_device_capability() >= FP8_SINCE


def structure_of(bench: Bench, model: str) -> Structure:
    """The structure of a model, shrunk if the bench is tiny."""
    return Structure.of(bench.transformer(model, BF16).config) if bench.tiny else structure(model)


Cell = tuple[int, int]  # side in pixels, and requests with guidance


def cells(
    bench: Bench, model: str, way: Way, card: MeasuredRates, asked: list[Cell], clock: Clock
) -> Iterator[dict[str, Any]]:
    """Measure the cells one after the other.

    `card`: the measured rates, from which the least time of a step follows. A cell comes without
    results if the time that is left is under 1.2 times that of the cell before.
    """
    shape = structure_of(bench, model)
    prefer_attention(preferred(attention_s(bench, model)))
    bench.free()
    denoiser = bench.denoiser(model, way)
    embeds = bench.embeds(2)
    last_s = 0.0
    for side, requests in asked:
        cell: dict[str, Any] = {
            "model": model, "way": way.name, "side": side, "requests": requests,
        }  # fmt: skip
        if not clock.allows(1.2 * last_s):
            yield cell
            continue
        batch = [
            denoiser.begin(
                embeds,
                width=side,
                height=side,
                num_inference_steps=1000,
                guidance_scale=4.5,
                seed=seed,
            )
            for seed in range(requests)
        ]
        began = time.perf_counter()
        denoiser.denoise_step(batch)
        bench.sync()
        first_s = time.perf_counter() - began
        bench.reset_peak()
        step_s = bench.seconds(partial(denoiser.denoise_step, batch), STEP_REPEATS)
        peak_gib = bench.peak_gib()
        bench.reset_peak()
        with denoiser.beside_steps():
            denoiser.decode(batch[0].latents)
        denoiser.denoise_step(batch)
        bench.sync()
        floor = floor_s(
            shape,
            2 * requests,
            side,
            TEXT_TOKENS,
            card,
            fp8=way.recipe != "bf16" or way.torchao,
            adaln_bytes=1 if way.recipe == "fp8-adaln8" else 2,
        )
        last_s = time.perf_counter() - began
        yield cell | {
            "step_ms": 1e3 * step_s,
            "first_s": first_s,
            "floor_ms": 1e3 * floor,
            "over_floor": step_s / floor,
            "finite": bool(batch[0].latents.isfinite().all()),
            "peak_gib": peak_gib,
            "peak_with_decode_gib": bench.peak_gib(),
        }
    del denoiser


def rounds(bench: Bench, names: Collection[str]) -> Iterator[tuple[str, str, list[Cell]]]:
    """Each model and way with the cells to measure, in the order of measuring.

    `names`: the ways to measure. One request at the larger size comes first in every way, because
    `ratios` needs these cells.
    """
    first = [(bench.sides[0], 1)]
    rest = [(side, n) for side in bench.sides for n in REQUESTS if (side, n) != first[0]]
    last = "fp8 max-autotune"
    ways = [name for name in names if name != last]
    for name in sorted(ways, key=lambda name: WAYS[name].compiled):
        for model in MODELS:
            yield model, name, first
    for name in ("fp8 compiled", "bf16 compiled"):
        for model in MODELS:
            if name in names:
                yield model, name, rest
    for model in MODELS:
        if last in names:
            yield model, last, first


def attention_s(bench: Bench, model: str) -> dict[str, float]:
    """Seconds of each fused attention kernel for one request at the larger size; {} on a CPU."""
    if bench.device != "cuda":
        return {}
    s = structure(model)
    tokens = (bench.sides[0] // TOKEN_PX) ** 2 + TEXT_TOKENS
    heads = s.width // s.head_width
    return time_attention(heads, s.head_width, tokens, bench.device, torch.bfloat16)


def decode_ms(bench: Bench) -> dict[str, float]:
    """Milliseconds of a decode by size, in both memory layouts of the VAE."""
    denoiser = bench.denoiser("sd3.5-medium", BF16)
    found = {}
    for layout in (torch.channels_last, torch.contiguous_format):
        denoiser.vae.to(memory_format=layout)
        for side in bench.sides:
            latents = torch.randn(1, 16, side // 8, side // 8, device=bench.device)
            seconds = bench.seconds(partial(denoiser.decode, latents), 5)
            found[f"{side} {str(layout).removeprefix('torch.')}"] = 1e3 * seconds
    return found


def t5_ms(bench: Bench) -> dict[str, Any]:
    """Milliseconds of T5 for 4 prompts of 256 tokens, in bf16 and stored in FP8 in both ways."""
    tiny = {"num_layers": 1, "d_model": 64, "d_ff": 64, "num_heads": 1, "vocab_size": 32}
    settings = T5Config(**(config("t5_xxl") | (tiny if bench.tiny else {})))
    found: dict[str, Any] = {}
    for how in ("bf16", "fp8", "quanto"):
        with torch.device("meta"):
            t5: Any = T5EncoderModel(settings).to(torch.bfloat16)
        t5 = fill(t5.to_empty(device=bench.device)).eval()
        if how != "bf16":
            try:
                store_in_fp8(t5, how)  # type: ignore[arg-type]  # one of the two
            except Exception as error:  # quanto compiles a kernel here, which can fail in many ways
                found[how] = f"not measured: {_in_words(error)}"
                continue
        ids = torch.zeros(4, 256, dtype=torch.long, device=bench.device)
        with torch.inference_mode():
            found[how] = 1e3 * bench.seconds(partial(t5, ids), 5)
        del t5
        bench.free()
    return found


# -- accuracy -------------------------------------------------------------------------------------


@torch.inference_mode()
def sqnr_db(bench: Bench, model: str) -> dict[str, float]:
    """Signal to quantisation noise, in dB, of each kind of FP8 linear, on random activations."""
    transformer = bench.transformer(model, BF16)
    found: dict[str, float] = {}
    for name, linear in transformer.named_modules():
        kind = name.partition(".")[2].partition(".")[2]
        if not isinstance(linear, nn.Linear) or kind in found:
            continue
        if not fp8_layer(name, RECIPES["fp8"]):
            continue
        x = torch.randn(512, linear.in_features, device=bench.device, dtype=torch.bfloat16)
        exact = linear.float()(x.float())
        noise = Fp8Linear.quantize(linear)(x).float() - exact
        ratio = exact.square().mean() / noise.square().mean()
        found[kind] = 10 * math.log10(ratio.item())
    return found


# -- the report -----------------------------------------------------------------------------------


def report(found: dict[str, Any]) -> str:
    """The results as short text for a terminal."""
    lines = [" ".join(f"{k} {v}" for k, v in found["machine"].items())]
    card = MeasuredRates(*found["rates"])
    lines.append(
        f"bf16 {card.bf16 / 1e12:.0f} TFLOP/s, FP8 {card.fp8 / 1e12:.0f} TFLOP/s, "
        f"attention {card.attention / 1e12:.0f} TFLOP/s, copy {card.bandwidth / 1e12:.2f} TB/s"
    )
    head = "model         way                        side  req  ms/step  ÷ floor"
    lines.append(f"{head}  peak GiB, with a decode")
    measured = [cell for cell in found["steps"] if "step_ms" in cell]
    for c in measured:
        peaks = (c["peak_gib"], c["peak_with_decode_gib"])
        peak = " ".join(f"{gib:8.2f}" if gib else "       –" for gib in peaks)
        lines.append(
            f"{c['model']:13} {c['way']:26} {c['side']:4} {c['requests']:4} {c['step_ms']:8.1f} "
            f"{c['over_floor']:8.2f}  {peak}{'' if c['finite'] else '  NOT FINITE'}"
        )
    for model, ratios in found["ratios"].items():
        lines.append(f"{model}: " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()))
    lines.append(f"attention s: {found['attention_s']}")
    lines.append(f"VAE decode ms: {found['decode_ms']}; T5 ms: {found['t5_ms']}")
    worst = {m: min(kinds.values()) for m, kinds in found["sqnr_db"].items()}
    lines.append(
        "least SQNR of a linear, dB: " + ", ".join(f"{m} {v:.1f}" for m, v in worst.items())
    )
    left = [c for c in found["steps"] if "step_ms" not in c] + found["failed"]
    lines.append(f"left out: {len(left)}")
    lines += [f"  {c['model']} {c['way']}: {c['why']}" for c in found["failed"]]
    return "\n".join(lines)


def ratios(steps: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Step time of each way ÷ that of compiled FP8, for one request at the larger size."""
    found: dict[str, dict[str, float]] = {}
    for model in MODELS:
        ms = {
            c["way"]: c["step_ms"]
            for c in steps
            if c["model"] == model and c["requests"] == 1 and "step_ms" in c
            if c["side"] == max(other["side"] for other in steps)
        }
        fp8_ms = ms.get("fp8 compiled")
        if fp8_ms:
            found[model] = {f"{way} ÷ fp8 compiled": t / fp8_ms for way, t in ms.items()}
    return found


def guarded(found: dict[str, Any], name: str, measure: Callable[[], Any]) -> None:
    """Store the results of a part in `found[name]`, or its error, so that other parts go on."""
    try:
        found[name] = measure()
    except Exception as error:
        found[name] = f"not measured: {_in_words(error)}"


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {[*str(error).splitlines(), ''][0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit")
    parser.add_argument(
        "--way",
        action="append",
        choices=WAYS,
        help="measure only this way; can be given repeatedly",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU")
    arguments = parser.parse_args()
    bench, clock = Bench.here(arguments.tiny), Clock(arguments.minutes)
    card = rates(bench)
    found: dict[str, Any] = {
        "machine": bench.machine(),
        "rates": card,
        "published_h100": PUBLISHED_H100,
        "footprint_gib": {m: footprint(structure(m), "fp8", 1, 1024**2).torch_peak for m in MODELS},
        "attention_s": {model: attention_s(bench, model) for model in MODELS},
        "steps": [],
        "failed": [],
        "ratios": {},
    }
    guarded(found, "decode_ms", lambda: decode_ms(bench))
    for model, name, asked in rounds(bench, arguments.way or WAYS):
        if WAYS[name].recipe.startswith("fp8") and not fp8_here(bench):
            continue
        try:
            for cell in cells(bench, model, WAYS[name], card, asked, clock):
                found["steps"].append(cell)
                print(json.dumps(cell), flush=True)
        except Exception as error:  # any error, as in `guarded`
            found["failed"].append({"model": model, "way": name, "why": _in_words(error)})
        bench.free()
        found["ratios"] = ratios(found["steps"])
        save(arguments.out, "steps", found)
    guarded(found, "sqnr_db", lambda: {model: sqnr_db(bench, model) for model in MODELS})
    guarded(found, "t5_ms", lambda: t5_ms(bench))
    save(arguments.out, "steps", found)
    print(report(found))


if __name__ == "__main__":
    main()
