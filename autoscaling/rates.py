"""Estimates of how much work arrives per second, from counters that only grow.

The estimate is the mean over a long window, unless a shorter window proves a higher rate. A window
with few requests proves little: if requests with the works w arrive independently of each other,
the work in a window has a standard deviation of √Σw². So a short window counts as its mean less
`DEVIATIONS` standard deviations. With many requests a jump is noticed within seconds; with few
requests noise is not taken for a jump.

A replica that is ordered now is ready only after the time of a start. By then the rate may have
risen, by the habits of the users or by chance. `Rises` learns how much it usually rises above the
expected rate.

Pure: standard library only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

SHORT_WINDOWS = (1 / 24, 1 / 8, 1 / 3)  # as fractions of the long window
DEVIATIONS = 1.5  # standard deviations by which a short window's mean is lowered

RISES_S = 3600.0  # seconds for which rises are remembered
RISES_EVERY_S = 10.0  # seconds between two measurements of a rise
COVERED = 0.95  # the fraction of time in which the rate rises by no more than the usual rise


class Sample(NamedTuple):
    """The counters at one time: the work that has arrived, and the sum of its squares."""

    at: float
    work_s: float
    squares: float


Samples = tuple[Sample, ...]


def with_sample(samples: Samples, new: Sample, mean_s: float) -> Samples:
    """Add a sample, and drop those that the long window of `mean_s` seconds no longer needs.

    If the counter or the time is less than before, only the new sample is kept: the counting
    process was restarted, or the clock was set back.
    """
    if samples and (new.at < samples[-1].at or new.work_s < samples[-1].work_s):
        return (new,)
    first = bisect_right(samples, new.at - mean_s, key=lambda sample: sample.at) - 1
    return (*samples[max(first, 0) :], new)


def rates(demands: Sequence[Samples], mean_s: float) -> list[float]:
    """The work per second of each of several demands that share replicas.

    Their sum is the highest rate that any window proves.
    """
    means = [_rate(samples, mean_s)[0] for samples in demands]
    most = sum(means)
    for part in SHORT_WINDOWS:
        found = [_rate(samples, part * mean_s) for samples in demands]
        total = sum(mean for mean, _ in found)
        proven = total - DEVIATIONS * sum(variance for _, variance in found) ** 0.5
        if proven > most:
            most, means = proven, [mean * proven / total for mean, _ in found]
    return means


def recent_rate(demands: Sequence[Samples], mean_s: float) -> float:
    """The work per second of all demands together within the longest of the short windows."""
    return sum(_rate(samples, SHORT_WINDOWS[-1] * mean_s)[0] for samples in demands)


def _rate(samples: Samples, window_s: float) -> tuple[float, float]:
    """The mean rate over the window that ends with the last sample, and its variance.

    Nothing arrived before the first sample.
    """
    last = samples[-1]
    before = bisect_right(samples, last.at - window_s, key=lambda sample: sample.at) - 1
    base = samples[max(before, 0)]
    span_s = max(last.at - base.at, window_s)  # longer if samples were missing
    return (last.work_s - base.work_s) / span_s, (last.squares - base.squares) / span_s**2


class Rises(NamedTuple):
    """The rises of the rate above the expected one during a replica's start.

    `expected`: pairs of a time and the rate that was expected then, for the last `start_s` seconds.
    `rises`: pairs of a time and the rise above the rate that was expected `start_s` seconds
    earlier. `usual`: the rise that was not exceeded in the fraction `COVERED` of the last hour, in
    work per second.
    """

    expected: tuple[tuple[float, float], ...] = ()
    rises: tuple[tuple[float, float], ...] = ()
    usual: float = 0.0


def updated_rises(
    known: Rises, expected: float, arriving: float, start_s: float, now: float
) -> Rises:
    """Add the rate that is expected now, and the rise above the rate expected a start ago.

    `arriving`: the work per second that arrives now. `start_s`: seconds of a start. Within
    `RISES_EVERY_S` of the last measurement nothing changes.
    """
    if known.expected and 0 <= now - known.expected[-1][0] < RISES_EVERY_S:
        return known
    before = [pair for pair in known.expected if now - start_s - RISES_EVERY_S <= pair[0] < now]
    rises = [pair for pair in known.rises if now - RISES_S <= pair[0] < now]
    if ready := [rate for at, rate in before if now - at >= start_s]:
        rises.append((now, arriving - ready[-1]))
    ranked = sorted((rise for _, rise in rises), reverse=True)
    # Times without a measurement count as times without a rise.
    exceeded = int((1 - COVERED) * RISES_S / RISES_EVERY_S)
    usual = max(ranked[exceeded], 0.0) if exceeded < len(ranked) else 0.0
    return Rises((*before, (now, expected)), tuple(rises), usual)
