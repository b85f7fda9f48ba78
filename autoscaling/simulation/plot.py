"""Plots of simulations and of measurements: load, replicas and queue over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, cycle
from pathlib import Path

from .simulator import TimelinePoint

COLOURS = ("#1f6f8b", "#d1495b", "#edae49", "#66a182", "#8d6a9f")


def _smooth(values: Sequence[float]) -> list[float]:
    """Moving means; each reaches over a hundredth of the values to either side."""
    sums, reach = [0.0, *accumulate(values)], max(len(values) // 100, 1)
    ends = [(max(i - reach, 0), min(i + reach + 1, len(values))) for i in range(len(values))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in ends]


def plot_timelines(
    timelines: Mapping[str, Sequence[TimelinePoint]],
    title: str,
    out: Path,
    arriving: str = "arriving work,\nreplica seconds per second",
) -> None:
    """Plot several timelines over one time axis, into the image file `out`.

    The load is that of the first timeline; replicas and queue are plotted for each timeline, with
    its name as the label. `arriving`: the label of the load's axis. Raises `ImportError` if
    matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (load, replicas, queue) = pyplot.subplots(
        3, 1, figsize=(9, 7), sharex=True, layout="constrained"
    )
    first = next(iter(timelines.values()))
    unit, unit_s = ("h", 3600.0) if first[-1].at > 2 * 3600 else ("min", 60.0)
    times = [point.at / unit_s for point in first]
    load.fill_between(times, _smooth([point.arriving for point in first]), color="#c9d6df")
    load.set_ylabel(arriving)
    for (name, points), colour in zip(timelines.items(), cycle(COLOURS), strict=False):
        times = [point.at / unit_s for point in points]
        wanted = [point.wanted for point in points]
        replicas.plot(times, wanted, color=colour, linewidth=0.8, linestyle=":")
        replicas.plot(times, [point.ready for point in points], color=colour, label=name)
        queue.plot(times, [point.queued for point in points], color=colour)
    replicas.set_ylabel("replicas: ready,\ndotted: wanted")
    replicas.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    queue.set_ylabel("waiting requests")
    queue.set_xlabel(unit)
    figure.suptitle(title)
    for axes in (load, replicas, queue):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
