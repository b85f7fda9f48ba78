"""How much work arrives in a second, from counters that only grow.

A window that holds few requests says little: the work in it has a standard deviation of √Σw², for
requests that come independently of each other. So a short window raises the estimate only by what
it proves, its mean less `DOUBT` standard deviations; otherwise the long one's mean stands. A jump
is seen within seconds where there are many requests, and noise is not taken for one where there are
few.

What starts now is ready only after a start's time. `Rises` learns by how much more than expected
arrives by then: the habit of its users, and the chance that is in it.

Pure: standard library only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

SHORT = (1 / 24, 1 / 8, 1 / 3)  # windows, as parts of the long one
DOUBT = 1.5

RISES_S = 3600.0  # how far back rises are remembered
RISES_EVERY_S = 10.0
COVERED = 0.95  # of the time


class Sample(NamedTuple):
    """Counters at a time: the work that has arrived, and the sum of its squares."""

    at: float
    work_s: float
    squares: float


Samples = tuple[Sample, ...]


def with_sample(samples: Samples, new: Sample, mean_s: float) -> Samples:
    """With one more, and without those that the long window, `mean_s`, no longer needs.

    If a counter has become less it is a new process's, and if time has the clock was set back:
    what was known begins anew.
    """
    if samples and (new.at < samples[-1].at or new.work_s < samples[-1].work_s):
        return (new,)
    first = bisect_right(samples, new.at - mean_s, key=lambda sample: sample.at) - 1
    return (*samples[max(first, 0) :], new)


def rates(demands: Sequence[Samples], mean_s: float) -> list[float]:
    """Of demands that share replicas, work a second; their sum is the highest that is proven."""
    means = [_rate(samples, mean_s)[0] for samples in demands]
    most = sum(means)
    for part in SHORT:
        found = [_rate(samples, part * mean_s) for samples in demands]
        total = sum(mean for mean, _ in found)
        proven = total - DOUBT * sum(variance for _, variance in found) ** 0.5
        if proven > most:
            most, means = proven, [mean * proven / total for mean, _ in found]
    return means


def recent_rate(demands: Sequence[Samples], mean_s: float) -> float:
    """Work a second within the longest of the short windows."""
    return sum(_rate(samples, SHORT[-1] * mean_s)[0] for samples in demands)


def _rate(samples: Samples, window_s: float) -> tuple[float, float]:
    """Mean and variance over a window; before the first sample nothing arrived."""
    last = samples[-1]
    before = bisect_right(samples, last.at - window_s, key=lambda sample: sample.at) - 1
    base = samples[max(before, 0)]
    span_s = max(last.at - base.at, window_s)  # longer if samples were missing
    return (last.work_s - base.work_s) / span_s, (last.squares - base.squares) / span_s**2


class Rises(NamedTuple):
    """`expected` rates, by time, until a start is over; then the `rises` above them.

    `usual`: a rise that was not exceeded for `COVERED` of the last hour, in work a second.
    """

    expected: tuple[tuple[float, float], ...] = ()
    rises: tuple[tuple[float, float], ...] = ()
    usual: float = 0.0


def updated_rises(
    known: Rises, expected: float, arriving: float, start_s: float, now: float
) -> Rises:
    """With what is expected now, and what became of what was expected one start ago."""
    if known.expected and 0 <= now - known.expected[-1][0] < RISES_EVERY_S:
        return known
    before = [pair for pair in known.expected if now - start_s - RISES_EVERY_S <= pair[0] < now]
    rises = [pair for pair in known.rises if now - RISES_S <= pair[0] < now]
    if ready := [rate for at, rate in before if now - at >= start_s]:
        rises.append((now, arriving - ready[-1]))
    ranked = sorted((rise for _, rise in rises), reverse=True)
    exceeded = int((1 - COVERED) * RISES_S / RISES_EVERY_S)  # what was not seen did not rise
    usual = max(ranked[exceeded], 0.0) if exceeded < len(ranked) else 0.0
    return Rises((*before, (now, expected)), tuple(rises), usual)
