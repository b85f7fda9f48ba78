"""Plot Octet's Grafana dashboards without Grafana, from the same queries to a real Prometheus.

python -m bench.dashboards http://127.0.0.1:9090 [--minutes 5]    # build/dashboards/*.png
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl
from matplotlib import pyplot as plt

from k8s.dashboards import DASHBOARDS, PER_ROW, Panel

OUT = Path("build/dashboards")
POINTS = 120
WINDOW = "1m"


def series(prometheus: str, query: str, minutes: float) -> list[dict[str, Any]]:
    """The time series that a query returns for the last `minutes`."""
    now = time.time()
    answer = httpx.get(
        f"{prometheus}/api/v1/query_range",
        params={
            "query": query.replace("$__rate_interval", WINDOW),
            "start": now - 60 * minutes,
            "end": now,
            "step": 60 * minutes / POINTS,
        },
        timeout=30,
    )
    answer.raise_for_status()
    found: list[dict[str, Any]] = answer.json()["data"]["result"]
    return found


def named(legend: str, tags: dict[str, str]) -> str:
    """A legend with its `{{tag}}` places filled in."""
    for tag, value in tags.items():
        legend = legend.replace(f"{{{{{tag}}}}}", value)
    return legend


def show(panel: Panel, axes: Any, prometheus: str, minutes: float) -> None:
    """Plot a panel onto `axes`."""
    now = time.time()
    for query, legend in panel.queries:
        for line in series(prometheus, query, minutes):
            times = [(float(at) - now) / 60 for at, _ in line["values"]]
            values = [float(value) for _, value in line["values"]]
            axes.plot(times, values, label=named(legend, line["metric"]))
    axes.set_title(f"{panel.title} ({panel.unit})", fontsize=9)
    axes.set_xlim(-minutes, 0)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=7)
    if axes.lines:
        axes.legend(fontsize=6)
    else:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prometheus")
    parser.add_argument("--minutes", type=float, default=5)
    given = parser.parse_args()
    mpl.use("agg")
    OUT.mkdir(parents=True, exist_ok=True)
    for uid, (title, panels) in DASHBOARDS.items():
        rows = -(-len(panels) // PER_ROW)
        figure, axes = plt.subplots(rows, PER_ROW, figsize=(15, 2.6 * rows), squeeze=False)
        for panel, place in zip(panels, axes.flat, strict=False):
            show(panel, place, given.prometheus.rstrip("/"), given.minutes)
        for place in axes.flat[len(panels) :]:
            place.set_axis_off()
        figure.suptitle(title)
        figure.tight_layout()
        figure.savefig(OUT / f"{uid}.png", dpi=80)
        plt.close(figure)
        print(OUT / f"{uid}.png")


if __name__ == "__main__":
    main()
