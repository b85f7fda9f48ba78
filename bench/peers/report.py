"""Results of `bench.peers` as keys, tables and a plot."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from serve.quality.metrics import Pixels, psnr_db

OCTET = "Octet"
Results = Mapping[str, Mapping[str, Any]]  # by contestant


def likeness_db(reference: str, tested: str) -> float:
    """The peak signal-to-noise ratio in dB of two image files in base64."""

    def pixels(file: str) -> Pixels:
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(file))).convert("RGB"))

    return psnr_db(pixels(reference), pixels(tested))


def beside_best_peer(found: Results) -> dict[str, float]:
    """Octet's numbers ÷ those of the best peer in each, and what failed at its kills."""

    def versus(pick: Callable[[Mapping[str, Any]], float], best: Callable[..., float]) -> float:
        peers = [pick(cell) for name, cell in found.items() if name != OCTET]
        return pick(found[OCTET]) / best(peers) if peers and best(peers) else float("nan")

    return {
        "goodput_vs_best_peer_80": versus(lambda cell: cell["mixed"]["0.8"]["goodput"], max),
        "p99_vs_best_peer_80": versus(lambda cell: cell["mixed"]["0.8"]["p99_s"], min),
        "flood_p99_vs_best_peer": versus(lambda cell: cell["flooded"]["p99_s"], min),
        "mixed_throughput_vs_best_peer": versus(lambda cell: cell["mixed_per_s"], max),
        "equal_throughput_vs_best_peer": versus(lambda cell: cell["equal_per_s"], max),
        "failed_at_kill": found[OCTET]["killed"]["failed"],
    }


def table(found: Mapping[str, Any]) -> str:
    """The results as Markdown tables, as bench/README.md shows them."""
    cells: Results = found["contestants"]
    loads = list(cells[OCTET]["mixed"])
    lines = [
        f"{found['machine']}, {found['dtype']}, 100 % = {found['octet_mixed_per_s']:.2f} "
        f"mixed images/s{', QUICK' if found['quick'] else ''}",
        "",
        "| | load | requests, failed | within 3 × | 5 × | 10 × their own time | p50 s | p99 s "
        "| p99 slowdown |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for load in loads:
        for name, cell in cells.items():
            at = cell["mixed"][load]
            lines.append(
                f"| {name} | {float(load):.0%} | {at['requests']}, {at['failed']} "
                f"| {' | '.join(f'{part:.0%}' for part in at['goodput_each'].values())} "
                f"| {at['p50_s']:.2f} | {at['p99_s']:.2f} "
                f"| {at['p99_slowdown']:.1f} |"
            )
    lines += [
        "",
        "| | mixed images/s | equal ones | light tenant's p99 s, alone | beside a flood "
        "| in time beside it | images for clients that hung up | failed of those open at kills "
        "| MiB | start s | lines | machine's speed |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, cell in cells.items():
        flood, kill = cell["flooded"], cell["killed"]
        calm_s, wasted = cell.get("calm", {}).get("p99_s", math.nan), cell.get("wasted", math.nan)
        lines.append(
            f"| {name} {cell['version']} | {cell['mixed_per_s']:.2f} | {cell['equal_per_s']:.2f} "
            f"| {calm_s:.2f} "
            f"| {flood['p99_s']:.2f} | {flood['goodput']:.0%} | {wasted:.1f} "
            f"| {kill['failed']} of {kill['open']} | {cell['memory_mib']:.0f} "
            f"| {cell['start_s']:.1f} | {cell['lines']} | {cell['speed']:.0f} |"
        )
    keys = [key for key, value in found.items() if "vs_best" in key or key == "failed_at_kill"]
    lines += ["", "| | |", "|---|---|", *(f"| `{key}` | {found[key]:.3g} |" for key in keys)]
    return "\n".join(lines).replace(" nan ", " – ")  # QUICK=1 leaves parts out


def plot(found: Mapping[str, Any], file: Path) -> None:
    """Draw requests in time by load, and the light tenant's tail beside a flood."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    cells: Results = found["contestants"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, cell in cells.items():
        at = {100 * float(load): 100 * row["goodput"] for load, row in cell["mixed"].items()}
        width = 2.5 if name == OCTET else 1.2
        left.plot(list(at), list(at.values()), marker="o", linewidth=width, label=name)
    left.set_xlabel("load, % of Octet's largest throughput")
    left.set_ylabel("requests in time, %")
    left.set_ylim(0, 103)
    left.legend(fontsize=8)
    names = list(cells)[::-1]
    for offset, key, label in ((0.2, "calm", "alone"), (-0.2, "flooded", "beside a flood")):
        tails = [cells[name].get(key, {}).get("p99_s", 0.0) for name in names]
        right.barh([i + offset for i in range(len(names))], tails, height=0.38, label=label)
    right.set_yticks(range(len(names)), names)
    right.set_xlabel("a light tenant's p99, s")
    right.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
