"""The choice of the replica that runs an image."""

import random
from collections import Counter

from serve.dispatch.grants import Grants
from serve.dispatch.protocol import Heartbeat, Lease, QueuedImage, Release, RunningImage
from serve.dispatch.replicas import PoolReplicas

P = "p"


class Pool:
    """A pool of replicas with two slots each, and images that it has been asked for."""

    def __init__(self, *names: str, cards: str = "") -> None:
        self.replicas = PoolReplicas(Counter(), Counter())
        self.images = 0
        for name, card in zip(names, cards or [""] * len(names), strict=True):
            self.replicas.hear(Heartbeat(P, name, 2, card=card), 0.0)

    def run(self, work_s: float = 1.0, size: str = "", now: float = 0.0) -> str:
        """Give an image to the replica that is chosen; return its name."""
        chosen = self.replicas.choose(QueuedImage((P,), work_s, size=size), now)
        assert chosen
        name = chosen.heartbeat.replica
        self.images += 1
        image = RunningImage(str(self.images), "c", "t", P, work_s, name, size)
        self.replicas.hold(name, ("s", image.image_id), image, now)
        return name

    def end(self, name: str, image: int, now: float) -> None:
        self.replicas.release(name, ("s", str(image)), now)


def test_an_image_gets_the_replica_that_is_done_first() -> None:
    pool = Pool("a", "b")
    assert [pool.run(10.0), pool.run(1.0)] == ["a", "b"]
    assert pool.run(1.0) == "b"  # both run one image, but b will be done sooner
    assert pool.run(1.0) == "a"  # b has no free slot
    assert pool.replicas.free == 0
    assert pool.replicas.choose(QueuedImage((P,)), 0.0) is None


def test_a_replica_is_gone_when_its_heartbeat_is_overdue_for_too_long() -> None:
    pool = Pool()
    pool.replicas.hear(Heartbeat(P, "often", 2), 0.0, next_s=1.0)
    pool.replicas.hear(Heartbeat(P, "rarely", 2), 0.0, next_s=30.0)
    pool.replicas.expire(5.9, lease_s=5.0)
    assert pool.replicas.living == 2
    pool.replicas.expire(6.1, lease_s=5.0)
    assert [replica.heartbeat.replica for replica in pool.replicas] == ["rarely"]
    pool.replicas.expire(35.1, lease_s=5.0)
    assert pool.replicas.living == 0


def test_a_replica_that_has_refused_an_image_is_used_again_without_a_heartbeat() -> None:
    pool = Pool("a")
    pool.replicas.avoid("a", 5.0, 0.0)
    for now, free in ((4.9, 0), (5.0, 2)):
        pool.replicas.refresh(lambda beat: (beat.slots, False), now)
        assert pool.replicas.free == free


def test_slots_that_may_not_be_used_come_back_without_a_heartbeat() -> None:
    pool = Pool("a", "b")
    pool.replicas.refresh(lambda beat: (1, True), 1.0)  # the card has had a fault
    assert (pool.replicas.free, pool.replicas.staying.slots) == (2, 2)
    pool.replicas.refresh(lambda beat: (beat.slots, False), 2.0)
    assert (pool.replicas.free, pool.replicas.staying.slots) == (4, 4)


def test_time_that_passes_makes_a_replica_emptier() -> None:
    pool = Pool("a", "b")
    assert pool.run(10.0, now=0.0) == "a"
    assert pool.run(7.0, now=5.0) == "b"
    assert pool.run(1.0, now=6.0) == "a"  # 4 s are left on a, 6 s on b


def test_the_work_that_a_replica_reports_counts_and_so_does_what_is_on_its_way() -> None:
    pool = Pool("a", "b")
    assert [pool.run(10.0), pool.run(10.0)] == ["a", "b"]
    running = [Lease("s", "1", P, "a")]
    pool.replicas.hear(Heartbeat(P, "a", 2, running_work_s=8.0), 1.0, running)
    pool.replicas.hear(Heartbeat(P, "b", 2, running_work_s=0.0), 1.0)  # image 2 is on its way
    assert pool.run(1.0, now=1.0) == "a"


def test_a_faster_replica_is_done_first() -> None:
    pool = Pool("a", "b")
    pool.replicas.hear(Heartbeat(P, "b", 2, speed=4.0), 0.0)
    assert [pool.run(8.0), pool.run(8.0)] == ["a", "b"]
    assert pool.run(1.0) == "b"


def test_of_equal_replicas_one_with_images_of_the_same_size_is_chosen() -> None:
    pool = Pool("a", "b")
    assert [pool.run(8.0, "1024x1024"), pool.run(8.0, "512x512")] == ["a", "b"]
    assert pool.run(8.0, "512x512") == "b"


def test_of_equal_replicas_one_on_the_emptiest_card_is_chosen() -> None:
    pool = Pool("a", "b", "c", cards="xxy")
    assert [pool.run(), pool.run()] == ["a", "c"]


def test_of_equal_replicas_one_that_has_generated_the_size_is_chosen() -> None:
    pool = Pool("a", "b", "c")
    assert [pool.run(1.0, "64x64"), pool.run(1.0, "96x96")] == ["a", "b"]
    pool.end("a", 1, 1.0)
    pool.end("b", 2, 1.0)
    assert pool.run(1.0, "96x96", now=2.0) == "b"


def test_an_image_that_runs_alone_avoids_cards_with_a_fault_and_busy_replicas() -> None:
    pool = Pool("a", "b", "c")
    pool.replicas.hear(Heartbeat(P, "a", 1), 0.0, one_at_a_time=True)
    assert pool.run() == "a"
    pool.end("a", 1, 1.0)
    assert pool.run(1.0, "64x64", now=1.0) == "b"
    chosen = pool.replicas.choose(QueuedImage((P,), alone=True), 1.0)
    assert chosen
    assert chosen.heartbeat.replica == "c"


def test_what_runs_without_a_session_takes_slots_from_its_second_report_on() -> None:
    pool = Pool("a")
    ghost = [Lease("gone", "1", P, "a")]
    pool.replicas.hear(Heartbeat(P, "a", 2), 1.0, ghost, ghost)
    assert pool.replicas.free == 2  # perhaps it has ended just now
    pool.replicas.hear(Heartbeat(P, "a", 2), 2.0, ghost, ghost)
    assert pool.replicas.free == 1
    pool.replicas.hear(Heartbeat(P, "a", 2), 3.0)
    assert pool.replicas.free == 2


def test_a_replica_that_refused_an_image_is_avoided_for_a_while() -> None:
    pool = Pool("a", "b")
    pool.replicas.avoid("a", 5.0, 0.0)
    assert [pool.run(), pool.run()] == ["b", "b"]
    assert pool.replicas.free == 0
    pool.replicas.hear(Heartbeat(P, "a", 2), 6.0)
    assert pool.run(now=6.0) == "a"


def test_any_number_of_replicas_is_kept_in_order() -> None:
    """The chosen replica always has the least work of those with a free slot."""
    chance = random.Random(1)
    names = [f"r{i}" for i in range(50)]
    pool, left, held = Pool(*names), dict.fromkeys(names, 0.0), Counter[str]()
    for _ in range(100):
        work_s = chance.uniform(1, 100)
        usable = [name for name in names if held[name] < 2]
        name = pool.run(work_s)
        assert left[name] <= min(left[other] for other in usable) + 0.1 * work_s
        left[name] += work_s
        held[name] += 1
    assert set(held.values()) == {2}


def test_a_thousand_kills_at_random_moments_leak_no_slot() -> None:
    """Replicas die and come, silently or noticed, while images come, end and are tried again."""
    chance = random.Random(2)
    book = Grants(session_lease_s=1e9, replica_lease_s=5.0)
    book.set_pools([P])
    book.open("s", 0.0)
    alive = [f"r{i}" for i in range(8)]
    running: dict[str, tuple[str, bool]] = {}  # by image: its replica, and whether it was lost
    now, images, kills, waiting = 0.0, 0, 0, 0

    def beat() -> None:
        for name in alive:
            there = [Lease("s", i, P, name) for i, (on, _) in running.items() if on == name]
            book.report_replica(Heartbeat(P, name, 3), now, there)

    def grant() -> None:
        nonlocal waiting
        for granted in book.grant(now):
            running[granted.image_id] = granted.replica, granted.replica not in alive
            waiting -= 1

    def submit() -> None:
        nonlocal images, waiting
        images += 1
        image = QueuedImage((P,), chance.uniform(0.1, 9), id=str(images), call_id=str(images))
        assert book.submit("s", image, "t", now) is None
        waiting += 1

    while kills < 1000:
        now += chance.expovariate(10.0)
        event = chance.random()
        if event < 0.4 and waiting < 20:
            submit()
        elif event < 0.7 and running:
            image = chance.choice(list(running))
            _, lost = running.pop(image)
            book.release("s", Release(image, None if lost else 1.0, lost=lost), now)
            if lost:
                submit()
        elif event < 0.8:
            victim = chance.randrange(len(alive))
            dead, alive[victim] = alive[victim], f"r{kills + 8}"
            running.update({i: (on, True) for i, (on, _) in running.items() if on == dead})
            kills += 1
        elif event < 0.9 and running:
            image = chance.choice(list(running))
            running.pop(image)
            book.release("s", Release(image, 0.0, refused=True), now)
            submit()
        beat()
        book.expire_replicas(now)
        grant()
        assert book.running_in(P) == len(running)
        assert book.queue_depth == waiting
    for image, (_, lost) in list(running.items()):
        book.release("s", Release(image, 1.0, lost=lost), now)
    running.clear()
    for _ in range(20):
        now += 1.0
        beat()
        book.expire_replicas(now)
        grant()
        for image in list(running):
            book.release("s", Release(image, 1.0), now)
        running.clear()
    assert book.queue_depth == 0
    assert book.free_slots(P) == 8 * 3
    assert book.living(P) == 8
    assert not book._pools[P]._held.keys() - set(alive)
