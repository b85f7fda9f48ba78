"""Ways to serve a stream of images on one replica, replayed in virtual time on measured costs.

Decisions are the real ones (`serve.engine.batching`), only the seconds of steps and decodes come
from a table. One thing happens at a time: a decode holds the next step up, as on a CPU whose cores
are all busy.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from serve.engine.batching import BatchCandidate, next_batch

Key = tuple[int, int, int]  # size, rows, steps: what static batching calls equal


class Asked(NamedTuple):
    """An image of `size_px` squared; `rows` is 2 with guidance."""

    arrives_s: float
    size_px: int
    rows: int
    steps: int

    @property
    def key(self) -> Key:
        return self.size_px, self.rows, self.steps


@dataclass(frozen=True)
class Costs:
    """Seconds of a step by size and measured row counts, and of a decode by size."""

    step_s: Mapping[int, Mapping[int, float]]
    decode_s: Mapping[int, float]
    bucket: Callable[[int], int]

    def step(self, size_px: int, rows: int) -> float:
        """Between measured row counts, interpolated."""
        measured = self.step_s[size_px]
        known = sorted(measured)
        i = bisect_left(known, rows)
        if known[i] == rows or i == 0:
            return measured[known[i]]
        low, high = known[i - 1], known[i]
        share = (rows - low) / (high - low)
        return measured[low] * (1 - share) + measured[high] * share

    def alone(self, asked: Asked) -> float:
        """An image's own time, with nobody else there."""
        return asked.steps * self.step(asked.size_px, asked.rows) + self.decode_s[asked.size_px]


Finished = list[float]  # when each image of a trace is done, seconds


def poisson(rng: random.Random, images: int, per_s: float, mix: Callable[[], Key]) -> list[Asked]:
    """A trace: arrivals by a Poisson process, each image drawn from `mix`."""
    now, trace = 0.0, []
    for _ in range(images):
        now += rng.expovariate(per_s)
        trace.append(Asked(now, *mix()))
    return trace


def one_at_a_time(trace: Sequence[Asked], costs: Costs) -> Finished:
    """First come, first served, each by itself."""
    now, finished = 0.0, []
    for asked in trace:
        now = max(now, asked.arrives_s) + costs.alone(asked)
        finished.append(now)
    return finished


def static_batches(
    trace: Sequence[Asked], costs: Costs, most: int, window_s: float = 0.05
) -> Finished:
    """Equal images together from first step to last; the oldest waiting one says which.

    Unless `most` of its kind are there, company is waited for until it is `window_s` old.
    """
    finished = [0.0] * len(trace)
    arriving, waiting = deque(range(len(trace))), deque[int]()
    now = 0.0

    def arrive(until: float) -> None:
        while arriving and trace[arriving[0]].arrives_s <= until:
            waiting.append(arriving.popleft())

    def equal() -> list[int]:
        return [i for i in waiting if trace[i].key == trace[waiting[0]].key][:most]

    while arriving or waiting:
        if not waiting:
            now = max(now, trace[arriving[0]].arrives_s)
        arrive(now)
        deadline = trace[waiting[0]].arrives_s + window_s
        while len(equal()) < most and now < deadline:
            now = min(deadline, trace[arriving[0]].arrives_s if arriving else deadline)
            arrive(now)
        batch = equal()
        size, rows, steps = trace[batch[0]].key
        now += steps * costs.step(size, rows * len(batch)) + costs.decode_s[size] * len(batch)
        for i in batch:
            finished[i] = now
            waiting.remove(i)
    return finished


def between_steps(trace: Sequence[Asked], costs: Costs, slots: int, max_rows: int) -> Finished:
    """As the denoising loop does, behind a first-come queue for its slots."""
    finished = [0.0] * len(trace)
    arriving = deque(range(len(trace)))
    inside: dict[int, BatchCandidate] = {}
    now = 0.0
    while arriving or inside:
        if not inside:
            now = max(now, trace[arriving[0]].arrives_s)
        while arriving and len(inside) < slots and trace[arriving[0]].arrives_s <= now:
            i = arriving.popleft()
            size, rows, steps = trace[i].key
            inside[i] = BatchCandidate(kind=size, rows=rows, steps_left=steps, arrival=i)
        batch = next_batch(inside.values(), max_rows)
        rows = costs.bucket(sum(image.rows for image in batch))
        now += costs.step(trace[batch[0].arrival].size_px, rows)
        for image in batch:
            image.steps_left -= 1
            if not image.steps_left:
                now += costs.decode_s[trace[image.arrival].size_px]
                finished[image.arrival] = now
                del inside[image.arrival]
    return finished


def slowdowns(trace: Sequence[Asked], finished: Finished, costs: Costs) -> list[float]:
    """Latency ÷ own time, sorted."""
    return sorted(
        (done - asked.arrives_s) / costs.alone(asked)
        for asked, done in zip(trace, finished, strict=True)
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
