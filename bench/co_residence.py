"""Compare models that share cards with models that have a card each, by simulation: 15 seconds.

    python -m bench.co_residence [--hours 4]

SD3.5 Large, Large Turbo, Medium and the text encoders run on H100s: either each of them on a card
of its own, or all of them on every card. The seconds of an image are those of `octet plan`. The
images of a replica share its batches. Replicas that work on one card at the same time each get the
same part of its time, and lose some of it to each other: `kept` is what is left, 1 for nothing
lost. Measuring `kept` needs a card: `python -m bench.gpu.packing --together`.

Requests arrive at random. In the mix *even*, each model is asked for 60 % of what one card can do.
In *moving*, the models take turns: for ten minutes one of them is asked for 120 % and the others
for 30 %. Text encoders take memory and hardly any time.
"""

from __future__ import annotations

import argparse
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cluster.cards import CARDS
from cluster.cost import ImageShape
from cluster.footprint import TEXT_TOKENS, text_encoders_gib
from cluster.serving_options import (
    CardGroup,
    PlannedModel,
    PlanTerms,
    ServingOption,
    all_options,
    times,
)
from cluster.structure import TRANSFORMERS, USUAL_IMAGES, structure

from .replay import percentile

CARD = CARDS["h100"]
SIDE_PX, SLOTS = 1024, 4
EQUAL = (1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1)  # replicas of a model, and slots of each
LATE = 5.0  # an image is late if it takes this many times its time alone
TURN_S = 600.0
EVEN, MUCH, LITTLE = 0.6, 1.2, 0.3  # load of a model, as part of what one card can do


@dataclass(frozen=True)
class Model:
    """A model on this card, with the memory of a replica.

    `seconds`: `seconds[b - 1]` is an image's part of the time of a batch of b images.
    """

    name: str
    gib: float
    seconds: tuple[float, ...]

    @property
    def alone_s(self) -> float:
        return self.seconds[0]


@dataclass(eq=False)
class Image:
    """An image that arrives at `at`; `left`: the part of it that is still to be done, 1 to 0."""

    model: Model
    at: float
    left: float = 1.0


@dataclass(eq=False)
class Replica:
    """A model on one card, with the images in its slots."""

    model: Model
    card: int
    images: list[Image] = field(default_factory=list)


def planned(name: str) -> PlannedModel:
    """A model of `octet plan` with its usual image."""
    steps, rows = USUAL_IMAGES[name]
    shape = ImageShape(SIDE_PX, SIDE_PX, TEXT_TOKENS, rows, steps)
    return PlannedModel(name, structure(name), shape, shape.pixels)


def option_of(name: str, replicas: int, slots: int) -> ServingOption:
    """What `octet plan` computes for so many replicas and slots on a card."""
    everything = all_options(planned(name), CardGroup(CARD, 1), PlanTerms(latency_s=1e6))
    (found,) = [o for o in everything if (o.replicas, o.slots) == (replicas, slots)]
    return found


def model(name: str) -> Model:
    """A model with its memory and the seconds of its images, by the arithmetic of `octet plan`."""
    seconds = [sum(times(planned(name), "fp8", CARD, slots)) for slots in range(1, SLOTS + 1)]
    return Model(name, option_of(name, 1, SLOTS).gib, tuple(seconds))


def arrivals(models: Sequence[Model], mix: str, seconds: float, seed: int) -> Iterator[Image]:
    """The images of a mix in the order of their arrival, for so many seconds."""
    rng, at = random.Random(seed), 0.0
    while at < seconds:
        turn = int(at / TURN_S) % len(models)
        loads = [
            EVEN if mix == "even" else MUCH if i == turn else LITTLE for i in range(len(models))
        ]
        rates = [load / m.alone_s for load, m in zip(loads, models, strict=True)]
        at += rng.expovariate(sum(rates))
        yield Image(rng.choices(models, rates)[0], at)


def simulate(
    replicas: Sequence[Replica], images: Iterator[Image], kept: float
) -> dict[str, list[float]]:
    """The slowdowns of the images by model, sorted: latency ÷ the time of such an image alone.

    `kept`: the part of a card's time that is left when several of its replicas work.
    """
    waiting: dict[str, deque[Image]] = {r.model.name: deque() for r in replicas}
    slowdowns: dict[str, list[float]] = {name: [] for name in waiting}
    now, coming = 0.0, next(images, None)
    while coming or any(r.images for r in replicas):
        speeds = _speeds(replicas, kept)
        ends = [(i.left / speeds[r], r, i) for r in replicas for i in r.images]
        first = min(ends, key=lambda end: end[0], default=None)
        passed = first[0] if first else float("inf")
        if coming and coming.at - now < passed:
            passed, first = coming.at - now, None
        now += passed
        for replica, speed in speeds.items():
            for image in replica.images:
                image.left -= speed * passed
        if first:
            _, replica, image = first
            replica.images.remove(image)
            slowdowns[image.model.name].append((now - image.at) / image.model.alone_s)
            queue = waiting[image.model.name]
        elif coming:
            queue = waiting[coming.model.name]
            queue.append(coming)
            coming = next(images, None)
        _grant(replicas, queue)
    return {name: sorted(found) for name, found in slowdowns.items()}


def _speeds(replicas: Sequence[Replica], kept: float) -> dict[Replica, float]:
    """The part of an image that each working replica does for each of its images in a second."""
    working = [r for r in replicas if r.images]
    on_card: dict[int, int] = {}
    for r in working:
        on_card[r.card] = on_card.get(r.card, 0) + 1
    speeds = {}
    for r in working:
        neighbours = on_card[r.card]
        part = kept / neighbours if neighbours > 1 else 1.0
        images = len(r.images)
        speeds[r] = part / (images * r.model.seconds[images - 1])
    return speeds


def _grant(replicas: Sequence[Replica], queue: deque[Image]) -> None:
    """Give waiting images to the replicas of their model that have the fewest images."""
    while queue:
        free = [r for r in replicas if r.model is queue[0].model and len(r.images) < SLOTS]
        if not free:
            return
        min(free, key=lambda r: len(r.images)).images.append(queue.popleft())


def print_equal_replicas(models: Sequence[Model]) -> None:
    """Print what equal replicas of one model gain on a card over slots of one replica."""
    columns = "model", "s of an image alone", *(f"{r} × {s}" for r, s in EQUAL)
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for m in models:
        cells = []
        for replicas, slots in EQUAL:
            option = option_of(m.name, replicas, slots)
            cells.append(f"{option.images_s:.3f}/s, {replicas * option.gib:.0f} GiB")
        print(f"| {' | '.join((m.name, f'{m.alone_s:.2f}', *cells))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=4.0)
    arguments = parser.parse_args()
    models = [model(name) for name in TRANSFORMERS]
    print(f"{CARD.id}, {SIDE_PX}², {SLOTS} slots, estimated\n")
    print_equal_replicas(models)
    together = sum(m.gib for m in models) + text_encoders_gib()
    print(f"\nall models and the text encoders on one card: {together:.1f} GiB\n")
    columns = "mix", "arrangement", "kept", "late", *(f"p99 of {m.name}" for m in models)
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    apart = [Replica(m, card) for card, m in enumerate(models)]
    arrangements = [("a card each, 4 cards", apart, 1.0)]
    for cards, kept in ((4, 1.0), (4, 0.9), (3, 1.0), (3, 0.9)):
        everywhere = [Replica(m, card) for card in range(cards) for m in models]
        arrangements.append((f"all on each of {cards} cards", everywhere, kept))
    for mix in ("even", "moving"):
        for name, replicas, kept in arrangements:
            images = arrivals(models, mix, 3600 * arguments.hours, seed=1)
            slowdowns = simulate(replicas, images, kept)
            found = [slowdown for of_model in slowdowns.values() for slowdown in of_model]
            late = sum(slowdown > LATE for slowdown in found) / len(found)
            p99s = [f"{percentile(slowdowns[m.name], 0.99):.1f}" for m in models]
            row = mix, name, f"{kept:.1f}", f"{100 * late:.1f} %", *p99s
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
