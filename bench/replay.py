"""Replay of a stream of images on one replica in virtual time, with measured costs.

Three ways to serve the stream can be compared: one image at a time, static batches, and batches
that change between steps. The last way uses the real batch former (`serve.engine.batching`). Only
the seconds of steps and decodes come from a table. One thing happens at a time: a decode delays the
next step, as on a CPU whose cores are all busy.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

from serve.engine.batching import BatchCandidate, StepTimes, next_batch

# Size in pixels, rows and steps of an image. Static batching puts images with equal keys together.
Key = tuple[int, int, int]


class RequestedImage(NamedTuple):
    """An image of `size_px` × `size_px` that is requested at `arrives_s`.

    `rows`: 2 with guidance, else 1. `steps`: those that run. `edit`: whether a picture is encoded
    first.
    """

    arrives_s: float
    size_px: int
    rows: int
    steps: int
    edit: bool = False

    @property
    def key(self) -> Key:
        return self.size_px, self.rows, self.steps


@dataclass(frozen=True)
class Costs:
    """Measured seconds of steps and of the VAE.

    `step_s`: by size in pixels and number of rows. `decode_s`, `encode_s`: by size. `bucket`:
    rounds a number of rows up to one that the engine runs.
    """

    step_s: Mapping[int, Mapping[int, float]]
    decode_s: Mapping[int, float]
    bucket: Callable[[int], int]
    encode_s: Mapping[int, float] = field(default_factory=dict)

    def step(self, size_px: int, rows: int) -> float:
        """Seconds of a step, interpolated between the measured numbers of rows."""
        measured = self.step_s[size_px]
        known = sorted(measured)
        i = bisect_left(known, rows)
        if known[i] == rows or i == 0:
            return measured[known[i]]
        low, high = known[i - 1], known[i]
        share = (rows - low) / (high - low)
        return measured[low] * (1 - share) + measured[high] * share

    def alone(self, image: RequestedImage) -> float:
        """Seconds that an image takes while the replica runs nothing else."""
        encode_s = self.encode_s[image.size_px] if image.edit else 0.0
        steps_s = image.steps * self.step(image.size_px, image.rows)
        return encode_s + steps_s + self.decode_s[image.size_px]


Finished = list[float]  # the time in s at which each image of a trace is done


def poisson(
    rng: random.Random, images: int, per_s: float, mix: Callable[[], tuple[Any, ...]]
) -> list[RequestedImage]:
    """A trace of images that arrive as a Poisson process.

    `mix`: returns an image's size, rows and steps, and optionally whether it is an edit.
    """
    now, trace = 0.0, []
    for _ in range(images):
        now += rng.expovariate(per_s)
        trace.append(RequestedImage(now, *mix()))
    return trace


def one_at_a_time(trace: Sequence[RequestedImage], costs: Costs) -> Finished:
    """Serve the images in order of arrival, each by itself."""
    now, finished = 0.0, []
    for image in trace:
        now = max(now, image.arrives_s) + costs.alone(image)
        finished.append(now)
    return finished


def static_batches(
    trace: Sequence[RequestedImage], costs: Costs, most: int, window_s: float = 0.05
) -> Finished:
    """Serve images with equal keys together, from their first step to their last.

    A batch has the key of the image that has waited longest. If fewer than `most` images with that
    key are there, the batch waits for more until that image has waited for `window_s`.
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


def between_steps(
    trace: Sequence[RequestedImage],
    costs: Costs,
    slots: int,
    max_rows: int,
    *,
    all_that_fit: bool = False,
) -> Finished:
    """Serve the images like the denoising loop, which forms a new batch before each step.

    Images wait for one of the `slots` in order of arrival. `all_that_fit`: whether each batch is as
    large as possible; otherwise the loop's own rule decides.
    """
    finished = [0.0] * len(trace)
    arriving = deque(range(len(trace)))
    running: dict[int, BatchCandidate] = {}
    now, times = 0.0, StepTimes()

    def fitting(batch: list[BatchCandidate], _: int) -> int:
        if all_that_fit:
            return len(batch)
        rows = list(accumulate(image.rows for image in batch))
        return times.fitting(batch[0].kind, [(r, costs.bucket(r)) for r in rows]) + 1

    while arriving or running:
        if not running:
            now = max(now, trace[arriving[0]].arrives_s)
        while arriving and len(running) < slots and trace[arriving[0]].arrives_s <= now:
            i = arriving.popleft()
            size, rows, steps = trace[i].key
            if trace[i].edit:
                now += costs.encode_s[size]
            running[i] = BatchCandidate(kind=size, rows=rows, steps_left=steps, arrival=i)
        batch = next_batch(running.values(), max_rows, fitting)
        rows = costs.bucket(sum(image.rows for image in batch))
        step_s = costs.step(trace[batch[0].arrival].size_px, rows)
        now += step_s
        times.observe(batch[0].kind, rows, step_s)
        for image in batch:
            image.steps_left -= 1
            if not image.steps_left:
                now += costs.decode_s[trace[image.arrival].size_px]
                finished[image.arrival] = now
                del running[image.arrival]
    return finished


def slowdowns(
    trace: Sequence[RequestedImage], finished: Sequence[float], costs: Costs
) -> list[float]:
    """Latency ÷ time alone of each image, sorted."""
    return sorted(
        (done - image.arrives_s) / costs.alone(image)
        for image, done in zip(trace, finished, strict=True)
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value at `share` (0 to 1) of sorted values."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
