"""Workloads for simulations: requests over time, generated from a seed or read from a trace.

Requests of independent users form a Poisson process. Where its rate changes, requests are sampled
at the highest rate and then thinned out (Lewis & Shedler 1979). The shapes of the requests are
sampled from a mix of shapes with weights.

Pure: standard library only.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S


class RequestShape(NamedTuple):
    """The size of an image in pixels, its steps and its guidance scale."""

    width: int
    height: int
    steps: int
    guidance: float


class Arrival(NamedTuple):
    """A request for one image; `at`: seconds since the start of the workload."""

    at: float
    tenant: str
    shape: RequestShape


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload of `seconds` seconds.

    `arrivals`: a function that returns the requests for a seed, in order of time.
    """

    name: str
    seconds: float
    arrivals: Callable[[int], Iterable[Arrival]]


Mix = Sequence[tuple[RequestShape, float]]  # shapes with weights

# Sizes and steps of a usual mix: the model's own size, a smaller one, and one with more steps.
USUAL: Mix = (
    (RequestShape(1024, 1024, 28, 4.5), 0.5),
    (RequestShape(768, 768, 28, 4.5), 0.3),
    (RequestShape(1024, 1024, 40, 4.5), 0.2),
)
# Most requests are small, and few requests make up most of the work: their costs differ by a factor
# of up to 60.
HEAVY_TAILED: Mix = (
    (RequestShape(512, 512, 4, 1.0), 0.6),
    (RequestShape(512, 512, 28, 4.5), 0.2),
    (RequestShape(1024, 1024, 28, 4.5), 0.15),
    (RequestShape(1024, 1024, 50, 4.5), 0.05),
)
TENANTS = 20
TAIL, LONGEST = 1.5, 200  # Pareto exponent and greatest length of the bursts of `heavy_tailed`
MEAN_BURST = sum(n**-TAIL for n in range(1, LONGEST + 1))  # the sum of P(length ≥ n)


def poisson(per_s: float, seconds: float, mix: Mix = USUAL) -> Workload:
    """Requests at a constant mean rate."""
    return Workload(
        "poisson", seconds, lambda seed: _thinned(seed, lambda _: per_s, per_s, seconds, mix)
    )


def diurnal(peak_per_s: float, seconds: float, trough: float = 0.2, mix: Mix = USUAL) -> Workload:
    """One day, shortened or stretched to `seconds`; the rate follows a sine.

    The rate rises from `trough` times the peak rate at night to the peak rate at noon, and falls
    again.
    """

    def rate(at: float) -> float:
        return peak_per_s * (trough + (1 - trough) * 0.5 * (1 - math.cos(math.tau * at / seconds)))

    return Workload("diurnal", seconds, lambda seed: _thinned(seed, rate, peak_per_s, seconds, mix))


def spikes(per_s: float, seconds: float, times: float = 10.0, mix: Mix = USUAL) -> Workload:
    """A constant rate with spikes: about once an hour the rate is `times` as high.

    A spike lasts 3 to 6 minutes. `per_s`: the rate between the spikes.
    """

    def arrivals(seed: int) -> Iterator[Arrival]:
        chance, when, begins = random.Random(seed + 1), [], 0.0
        while (begins := begins + chance.uniform(0.5, 1.5) * HOUR_S) < seconds:
            when.append((begins, begins + chance.uniform(180, 360)))

        def rate(at: float) -> float:
            return per_s * (times if any(a <= at < b for a, b in when) else 1.0)

        return _thinned(seed, rate, per_s * times, seconds, mix)

    return Workload("spikes", seconds, arrivals)


def on_off(per_s: float, seconds: float, tenants: int = 8, mix: Mix = USUAL) -> Workload:
    """Tenants that send requests for 10 minutes and pause for 30 minutes, on average.

    Each tenant sends and pauses independently of the others. `per_s`: the mean rate of all
    together.
    """

    def arrivals(seed: int) -> Iterator[Arrival]:
        chance = random.Random(seed)
        shapes, weights = zip(*mix, strict=True)
        each, found = per_s * 4 / tenants, []
        for tenant in range(tenants):
            at, on = 0.0, chance.random() < 0.25
            while at < seconds:
                until = at + chance.expovariate(1 / (600 if on else 1800))
                while on and (at := at + chance.expovariate(each)) < min(until, seconds):
                    found.append(Arrival(at, f"t{tenant}", *chance.choices(shapes, weights)))
                at, on = until, not on
        return iter(sorted(found))

    return Workload("on-off", seconds, arrivals)


def heavy_tailed(per_s: float, seconds: float) -> Workload:
    """Bursts of requests: all requests of a burst come at once and from one tenant.

    The number of requests of a burst is Pareto-distributed. Their sizes and steps are chosen from
    `HEAVY_TAILED`, so that few requests make up most of the work. `per_s`: the mean number of
    requests per second.
    """

    def arrivals(seed: int) -> Iterator[Arrival]:
        chance = random.Random(seed)
        shapes, weights = zip(*HEAVY_TAILED, strict=True)
        at = 0.0
        while (at := at + chance.expovariate(per_s / MEAN_BURST)) < seconds:
            tenant = f"t{chance.randrange(TENANTS)}"
            for _ in range(min(int(chance.paretovariate(TAIL)), LONGEST)):
                yield Arrival(at, tenant, *chance.choices(shapes, weights))

    return Workload("heavy-tailed", seconds, arrivals)


def daily_crowd(per_s: float, seconds: float, times: float = 12.0, mix: Mix = USUAL) -> Workload:
    """A constant rate, and from nine to half past nine of every day one `times` as high.

    `per_s`: the rate outside this time.
    """

    def rate(at: float) -> float:
        return per_s * (times if 9 <= at % DAY_S / HOUR_S < 9.5 else 1.0)

    return Workload(
        "daily-crowd", seconds, lambda seed: _thinned(seed, rate, per_s * times, seconds, mix)
    )


class _Client(NamedTuple):
    """A client's share of all requests, and how bursty it is.

    `variation`: the coefficient of variation of the time between two requests. `drift`: the
    standard deviation of the logarithm of its rate ÷ its rate ten minutes before. `on`: the
    fraction of the time in which it sends anything.
    """

    share: float
    variation: float
    drift: float
    on: float


# The eight largest clients of a model that takes images, on a day of a public cloud: the statistics
# of `data/multimodal/mm-image` in github.com/alibaba/ServeGen (Apache 2.0; Xiang et al., ServeGen,
# NSDI 2026), whose 35 clients send 9.5 requests a second. These eight send three quarters of them.
CLOUD_CLIENTS = (
    _Client(0.135, 0.96, 0.13, 1.0),
    _Client(0.129, 1.10, 0.09, 1.0),
    _Client(0.123, 4.67, 0.39, 1.0),
    _Client(0.105, 4.14, 0.65, 0.92),
    _Client(0.068, 0.97, 0.15, 1.0),
    _Client(0.067, 0.97, 0.15, 1.0),
    _Client(0.061, 0.82, 0.07, 0.22),
    _Client(0.054, 0.77, 0.29, 0.56),
)
STEP_S = 600.0  # the interval of these statistics
MEMORY = 0.7  # how much of a client's deviation from its mean rate is left after `STEP_S`
PAUSE_STEPS = 6  # mean length of a client's pause, in intervals


def cloud_clients(per_s: float, seconds: float, mix: Mix = USUAL) -> Workload:
    """Requests with the burst statistics of `CLOUD_CLIENTS`; `per_s`: the mean rate of all."""
    scale = per_s / sum(client.share for client in CLOUD_CLIENTS)

    def arrivals(seed: int) -> Iterator[Arrival]:
        chance = random.Random(seed)
        shapes, weights = zip(*mix, strict=True)
        found: list[Arrival] = []
        for number, client in enumerate(CLOUD_CLIENTS):
            found += [
                Arrival(at, f"t{number}", *chance.choices(shapes, weights))
                for at in _client_times(client, scale * client.share, seconds, chance)
            ]
        return iter(sorted(found))

    return Workload("cloud-clients", seconds, arrivals)


def _client_times(
    client: _Client, per_s: float, seconds: float, chance: random.Random
) -> Iterator[float]:
    """The times of a client's requests: between two of them, a Gamma-distributed time."""
    shape = 1 / client.variation**2
    spread = client.drift * math.sqrt((1 + MEMORY) / 2)
    variance = spread**2 / (1 - MEMORY**2)
    deviation, on, at = chance.gauss(0, math.sqrt(variance)), chance.random() < client.on, 0.0
    for step in range(math.ceil(seconds / STEP_S)):
        until = min((step + 1) * STEP_S, seconds)
        rate = per_s / client.on * math.exp(deviation - variance / 2)
        at = max(at, step * STEP_S)
        while on and (at := at + chance.gammavariate(shape, 1 / (rate * shape))) < until:
            yield at
        deviation = MEMORY * deviation + chance.gauss(0, spread)
        pauses = (1 - client.on) / client.on / PAUSE_STEPS  # how often a client that is on pauses
        on = chance.random() >= pauses if on else chance.random() < 1 / PAUSE_STEPS


def sparse(per_s: float, seconds: float, mix: Mix = USUAL) -> Workload:
    """Requests for about 20 minutes, then none for about 40 minutes, and so on.

    `per_s`: the mean rate while requests come.
    """

    def arrivals(seed: int) -> Iterator[Arrival]:
        chance = random.Random(seed)
        shapes, weights = zip(*mix, strict=True)
        at = 0.0
        while at < seconds:
            until = at + chance.uniform(900, 1500)
            while (at := at + chance.expovariate(per_s)) < min(until, seconds):
                tenant = f"t{chance.randrange(TENANTS)}"
                yield Arrival(at, tenant, *chance.choices(shapes, weights))
            at = until + chance.uniform(1800, 3000)

    return Workload("sparse", seconds, arrivals)


def trace(file: Path) -> Workload:
    """Read a workload from a CSV file.

    Its columns are time (s), tenant, width and height (px), steps and guidance. Times are shifted
    so that the first request comes at 0. Raises `OSError`, and `ValueError` that names the faulty
    line.
    """
    found: list[Arrival] = []
    with file.open(newline="", encoding="utf-8") as lines:
        rows = csv.DictReader(lines)
        for row in rows:
            try:
                shape = RequestShape(
                    int(row["width"]), int(row["height"]), int(row["steps"]), float(row["guidance"])
                )
                arrival = Arrival(float(row["time"]), row["tenant"], shape)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{file}: line {rows.line_num}: {_fault(error)}") from None
            numbers = arrival.at, shape.guidance
            if not all(map(math.isfinite, numbers)) or min(shape[:3]) <= 0 or not arrival.tenant:
                raise ValueError(
                    f"{file}: line {rows.line_num}: no request: {row}: it needs a tenant, a finite "
                    "time and guidance, and a width, a height and steps above 0"
                )
            found.append(arrival)
    if not found:
        raise ValueError(f"{file}: no requests")
    found.sort(key=lambda arrival: arrival.at)
    first = found[0].at
    found = [arrival._replace(at=arrival.at - first) for arrival in found]
    return Workload(file.stem, found[-1].at + 60, lambda _: found)


def _fault(error: Exception) -> str:
    return f"no column {error}" if isinstance(error, KeyError) else str(error)


def _thinned(
    seed: int, rate: Callable[[float], float], most: float, seconds: float, mix: Mix
) -> Iterator[Arrival]:
    """Requests whose rate changes over time.

    `rate`: returns the requests per second at a time. `most`: the highest rate that it returns.
    """
    chance = random.Random(seed)
    shapes, weights = zip(*mix, strict=True)
    at = 0.0
    while (at := at + chance.expovariate(most)) < seconds:
        if chance.random() * most < rate(at):
            tenant = f"t{chance.randrange(TENANTS)}"
            yield Arrival(at, tenant, *chance.choices(shapes, weights))
