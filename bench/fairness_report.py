"""Results of `bench.fairness` as tables."""

from __future__ import annotations

from typing import Any

from cluster.cards import CARDS
from cluster.cost import ImageShape, reference
from cluster.structure import structure


def floods(found: dict[str, Any]) -> list[str]:
    """The results of the parts with floods, as the lines of a Markdown table."""
    lines = [
        f"{found['machine']}, {found['slots']} slots, {found['seconds']:.0f} s",
        "",
        "| Ingresses | flood ÷ capacity | light requests, failed | p99 s, calm | flooded "
        "| `light_p99_ratio` | slots used | flood's requests, failed | `refused_p99_ms` |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for replicas, cells in found["flood"].items():
        lines += [
            f"| {replicas} | {times} | {cell['light_requests']}, {cell['light_failed']} "
            f"| {cell['light_p99_calm_s']:.2f} | {cell['light_p99_flooded_s']:.2f} "
            f"| {cell['light_p99_ratio']:.2f} | {cell['used']:.0%} "
            f"| {cell['flood_requests']}, {cell['flood_failed']} | {cell['refused_p99_ms']:.0f} |"
            for times, cell in cells.items()
        ]
    return lines


def table(found: dict[str, Any]) -> str:
    """The results as Markdown tables, as bench/README.md shows them."""
    lines = floods(found)
    fifo, over, demo = found["fifo"], found["overload"], found["demo"]
    lines.append(
        f"| plain Ray Serve, with as much of the flood as Octet generated | "
        f"| {fifo['light_requests']}, {fifo['light_failed']} | {fifo['light_p99_calm_s']:.2f} "
        f"| {fifo['light_p99_flooded_s']:.2f} | {fifo['light_p99_ratio']:.2f} | | | |"
    )
    probes = found["probes"]
    lines += [
        "",
        "| Ingresses | `jain` | `max_min_service_ratio` | `budget_admitted` |",
        "|---|---|---|---|",
        *(
            f"| {replicas} | {shares['jain']:.4f} | {shares['max_min_service_ratio']:.3f} "
            f"| {found['budget_admitted'][replicas]} |"
            for replicas, shares in found["shares"].items()
        ),
        "",
        "| `GET /ready` a second | light requests' p50 s | p99 s |",
        "|---|---|---|",
        f"| 0 | {probes['p50_calm_s']:.2f} | {probes['p99_calm_s']:.2f} |",
        f"| {probes['probes_per_s']:.0f} | {probes['p50_probed_s']:.2f} "
        f"| {probes['p99_probed_s']:.2f} |",
        "",
        "| three times the capacity, with deadlines | |",
        "|---|---|",
        f"| requests, accepted | {over['requests']}, {over['accepted']} |",
        f"| `deadline_met` | {over['deadline_met']:.4f} |",
        f"| `goodput_of_peak` (peak: {over['peak_per_s']:.1f} per second) "
        f"| {over['goodput_of_peak']:.3f} |",
        f"| `refusal_handler_p99_ms` | {over['refusal_handler_p99_ms']:.1f} |",
        "",
        "| open requests | `grants_per_s` | `dispatch_ms` p50 | p99 | CPU ms, Dispatcher "
        "| Ingress |",
        "|---|---|---|---|---|---|",
    ]
    for opened, cell in found["dispatcher"].items():
        lines.append(
            f"| {opened} | {cell['grants_per_s']:.0f} | {cell['dispatch_ms_p50']:.1f} "
            f"| {cell['dispatch_ms_p99']:.1f} | {cell['dispatcher_cpu_ms']:.3f} "
            f"| {cell['ingress_cpu_ms']:.3f} |"
        )
    most = max(cell["grants_per_s"] for cell in found["dispatcher"].values())
    turbo = ImageShape(width_px=1024, height_px=1024, text_tokens=333, rows=1, steps=4)
    work_s = reference(structure("sd3.5-large-turbo"), "fp8", CARDS["h100"]).work_s(turbo)
    lines += [
        "",
        f"{most:.0f} grants/s suffice for {most * work_s:.0f} H100 that generate SD3.5 Large Turbo "
        f"at 1024² in FP8, by arithmetic ({work_s:.2f} s per image).",
        "",
        "| the demo model, one image after the other | median s |",
        "|---|---|",
        f"| alone | {demo['light_calm_s']:.2f} |",
        f"| next to a tenant with 32 requests open | {demo['light_flooded_s']:.2f} |",
        f"| that tenant | {demo['flood_s']:.2f} |",
    ]
    return "\n".join(lines)
