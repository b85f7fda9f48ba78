"""Tests of the simulation of models that share cards."""

from __future__ import annotations

import pytest

from bench.co_residence import Image, Model, Replica, arrivals, simulate

SHORT, LONG = Model("short", 1.0, (1.0, 0.9)), Model("long", 1.0, (10.0, 10.0))


def latencies(replicas: list[Replica], images: list[Image], kept: float = 1.0) -> list[float]:
    """The seconds from arrival to end of all images, sorted."""
    slowdowns = simulate(replicas, iter(images), kept)
    alone_s = {replica.model.name: replica.model.alone_s for replica in replicas}
    return sorted(s * alone_s[name] for name, found in slowdowns.items() for s in found)


def test_the_images_of_a_batch_share_its_time() -> None:
    batch = [Image(SHORT, 0.0), Image(SHORT, 0.0)]
    assert latencies([Replica(SHORT, 0)], batch) == pytest.approx([1.8, 1.8])


def test_an_image_waits_for_a_slot() -> None:
    images = [Image(LONG, 0.0) for _ in range(4)] + [Image(LONG, 1.0)]
    four = Model("long", 1.0, (10.0,) * 4)
    for image in images:
        image.model = four
    # Four share the replica for 40 s, and the fifth runs alone after that.
    assert latencies([Replica(four, 0)], images) == pytest.approx([40, 40, 40, 40, 49])


@pytest.mark.parametrize(("kept", "short_s"), [(1.0, 2.0), (0.8, 2.5)])
def test_replicas_of_a_card_share_it_and_lose_some_of_it(kept: float, short_s: float) -> None:
    replicas = [Replica(SHORT, 0), Replica(LONG, 0)]
    found = latencies(replicas, [Image(SHORT, 0.0), Image(LONG, 0.0)], kept)
    assert found == pytest.approx([short_s, short_s + 10 - short_s * kept / 2])


def test_an_image_goes_to_the_replica_with_the_fewest() -> None:
    replicas = [Replica(SHORT, 0), Replica(SHORT, 1)]
    assert latencies(replicas, [Image(SHORT, 0.0) for _ in range(2)]) == pytest.approx([1, 1])


def test_a_mix_asks_for_as_much_work_as_it_says() -> None:
    for mix in ("even", "moving"):
        images = [*arrivals([SHORT, LONG, LONG], mix, 18_000, seed=3)]
        work_s = sum(image.model.alone_s for image in images)
        assert work_s / 18_000 == pytest.approx(1.8, rel=0.1)
