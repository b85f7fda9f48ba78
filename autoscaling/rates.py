"""Estimates of how much work arrives per second, from counters that only grow.

The estimate is the mean over a long window, unless a shorter window proves a higher rate. A window
with few requests proves little: if requests with the works w arrive independently of each other,
the work in a window has a standard deviation of √Σw². So a short window counts as its mean less
`DEVIATIONS` standard deviations. With many requests a jump is noticed within seconds; with few
requests noise is not taken for a jump.

Pure: standard library only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

SHORT_WINDOWS = (1 / 24, 1 / 8, 1 / 3)  # as fractions of the long window
DEVIATIONS = 1.5  # standard deviations by which a short window's mean is lowered


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


def _rate(samples: Samples, window_s: float) -> tuple[float, float]:
    """The mean rate over the window that ends with the last sample, and its variance.

    Nothing arrived before the first sample.
    """
    last = samples[-1]
    before = bisect_right(samples, last.at - window_s, key=lambda sample: sample.at) - 1
    base = samples[max(before, 0)]
    span_s = max(last.at - base.at, window_s)  # longer if samples were missing
    return (last.work_s - base.work_s) / span_s, (last.squares - base.squares) / span_s**2
