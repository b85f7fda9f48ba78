"""Results of `bench.engine` as a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PLOT = Path(__file__).with_name("engine.png")
KEYS = (
    "throughput_vs_one_at_a_time",
    "model_batching_gain",
    "throughput_vs_static_batching",
    "p99_slowdown_vs_static_batching_mixed_80",
    "loop_overhead_fraction",
)


def plot(found: dict[str, Any]) -> None:
    """Plot throughput and tail latency into bench/engine.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    per_s = found["throughput"]["images_per_s"]
    left.barh(list(per_s)[::-1], list(per_s.values())[::-1], color="#4f46e5")
    left.set_title(f"{found['throughput']['images']} equal images at once: images/s")
    loads = found["replay"]
    for way in next(iter(loads.values())):
        tails = [cell[way]["slowdown_p99"] for cell in loads.values()]
        right.plot([f"{100 * float(load):.0f} %" for load in loads], tails, "o-", label=way)
    right.set_yscale("log")
    right.set_title("mixed images: p99 of latency ÷ time alone")
    right.set_xlabel("load, as a share of what one image at a time can serve")
    right.legend()
    figure.savefig(PLOT, dpi=110)


def table(found: dict[str, Any]) -> str:
    """The results as Markdown tables, as bench/README.md shows them."""
    t, cell, rss = found["throughput"], found["real_cell"], found["memory"]
    alone = found["work_alone"]
    lines = [f"{found['machine']}, demo model in {found['recipe']}", ""]
    lines += [f"| {t['images']} equal images, {t['steps']} steps | images/s |", "|---|---|"]
    lines += [f"| {way} | {value:.2f} |" for way, value in t["images_per_s"].items()]
    lines += [
        "",
        "| load | | p50 slowdown | p99 slowdown | mean latency s |",
        "|---|---|---|---|---|",
    ]
    for load, ways in found["replay"].items():
        lines += [
            f"| {100 * float(load):.0f} % | {way} | {s['slowdown_p50']:.2f} "
            f"| {s['slowdown_p99']:.1f} | {s['latency_mean_s']:.2f} |"
            for way, s in ways.items()
        ]
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| `{key}` | {found[key]:.3f} |" for key in KEYS]
    lines += [
        f"| real ÷ replayed mean latency, {cell['images']} images "
        f"| {cell['real_over_replayed']:.3f} |",
        f"| steps in that stream ÷ steps measured before | {cell['steps_over_measured']:.3f} |",
        f"| error of predicted work, images alone, p50 / p90 | {alone['error_p50']:.3f} / "
        f"{alone['error_p90']:.3f} |",
        f"| the same in that stream, refitted online | {cell['error_p50']:.3f} / "
        f"{cell['error_p90']:.3f} |",
        f"| {t['images']} decodes, one by one / in one call, s | {t['decode_one_by_one_s']:.3f} / "
        f"{t['decode_together_s']:.3f} |",
        f"| MiB resident after 100 and {rss['images']} images | {rss['rss_after_100_mib']:.0f} / "
        f"{rss['rss_after_all_mib']:.0f} |",
    ]
    lines += [f"| coefficient `{k}`, s | {v:.3g} |" for k, v in found["coefficients"].items()]
    return "\n".join(lines)
