"""The batch former's promises, for any mix of images."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.batching import (
    CALM_S,
    FORGOTTEN,
    GUEST_PATIENCE,
    KEPT,
    MOST_TIMES,
    PATIENCE,
    BatchCandidate,
    RowBudget,
    StepTimes,
    next_batch,
)

IMAGES = st.tuples(
    st.sampled_from("abc"),  # kind
    st.integers(1, 2),  # rows
    st.integers(1, 12),  # steps
    st.integers(0, 20),  # arrives at this step
    st.sampled_from("xxxyz"),  # owner
)


def running(kind: str, rows: int, steps_left: int, arrival: int, owner: str = "") -> BatchCandidate:
    """Kind "c" is pinned to batches of two rows."""
    pinned = 2 if kind == "c" else None
    return BatchCandidate(
        kind=kind, rows=rows, steps_left=steps_left, arrival=arrival, max_rows=pinned, owner=owner
    )


@given(st.lists(IMAGES, min_size=1, max_size=14), st.integers(2, 8), st.integers(0, 3))
def test_every_image_gets_its_steps_within_the_row_budget_and_a_bounded_wait(
    images: list[tuple[str, int, int, int, str]], max_rows: int, fewer: int
) -> None:
    """No image is passed over for more steps than the bound, until all are finished.

    `fewer`: how many images of each batch are left out because it would be too large.
    """
    arriving = sorted(images, key=lambda image: image[3])
    inside: list[BatchCandidate] = []
    given_steps: dict[int, int] = {}
    waited: dict[int, int] = {}
    most_inside, clock = 0, 0
    while arriving or inside:
        while arriving and (arriving[0][3] <= clock or not inside):
            kind, rows, steps, _, owner = arriving.pop(0)
            inside.append(running(kind, rows, steps, len(given_steps), owner))
            given_steps[inside[-1].arrival] = waited[inside[-1].arrival] = 0
        most_inside = max(most_inside, len(inside))
        batch = next_batch(inside, max_rows, lambda batch, _: max(1, len(batch) - fewer))
        assert batch
        assert len({id(image) for image in batch}) == len(batch)
        assert len({image.kind for image in batch}) == 1
        most = 2 if batch[0].kind == "c" else max_rows
        assert sum(image.rows for image in batch) <= most
        chosen = {image.arrival for image in batch}
        for image in inside:
            waited[image.arrival] = 0 if image.arrival in chosen else waited[image.arrival] + 1
            assert waited[image.arrival] <= GUEST_PATIENCE + most_inside - 1
        for image in batch:
            image.steps_left -= 1
            given_steps[image.arrival] += 1
        inside = [image for image in inside if image.steps_left]
        clock += 1
    asked_steps = [steps for _, _, steps, _, _ in sorted(images, key=lambda image: image[3])]
    assert [given_steps[i] for i in range(len(images))] == asked_steps


def test_all_of_a_kind_that_fit_go_together() -> None:
    images = [running("a", 2, 9, i) for i in range(3)]
    assert next_batch(images, 6) == images
    assert len(next_batch(images, 5)) == 2


def test_an_image_of_few_steps_is_not_stuck_behind_long_ones() -> None:
    long = [running("a", 2, 50, i) for i in range(4)]
    short = running("b", 2, 4, 9)
    for _ in range(4):
        assert next_batch([*long, short], 8) == [short]
        short.steps_left -= 1


def test_an_image_of_many_steps_is_not_stuck_behind_a_stream_of_short_ones() -> None:
    long = running("a", 2, 50, 0)
    turns = [next_batch([long, running("b", 2, 1, i)], 8)[0] is long for i in range(1, 51)]
    assert sum(turns) == 50 // (PATIENCE + 1)


def only_hosts(batch: list[BatchCandidate], hosts: int) -> int:
    assert 1 <= hosts <= len(batch)
    return hosts


def test_images_of_a_crowd_do_not_slow_down_the_only_one_of_another_owner() -> None:
    crowd = [running("a", 2, 5, i, "crowd") for i in range(3)]
    light = running("a", 2, 28, 9, "light")
    batches = [next_batch([*crowd, light], 8, only_hosts) for _ in range(2 * (GUEST_PATIENCE + 1))]
    assert batches[:GUEST_PATIENCE] == [[light]] * GUEST_PATIENCE
    assert batches[GUEST_PATIENCE] == [crowd[0], light, *crowd[1:]]  # the crowd is overdue
    assert batches[GUEST_PATIENCE + 1 :] == batches[: GUEST_PATIENCE + 1]


def test_the_only_image_of_an_owner_joins_the_batches_of_an_overdue_crowd() -> None:
    crowd = [running("a", 2, 5, i, "crowd") for i in range(4)]
    light = running("a", 2, 28, 9, "light")
    for _ in range(40):
        batch = next_batch([*crowd, light], 8, lambda batch, hosts: 1)
        assert light in batch
        assert len(batch) <= 2


def test_an_owner_of_half_of_the_images_is_no_crowd() -> None:
    images = [running("a", 2, 9, i, owner) for i, owner in enumerate("xxyz")]
    assert next_batch(images, 8, only_hosts) == images


def test_owners_with_equally_many_images_share_batches() -> None:
    images = [running("a", 2, 9, i, owner) for i, owner in enumerate("xxyy")]
    assert next_batch(images, 8, only_hosts) == images


def test_guests_join_if_they_hardly_slow_the_batch_down() -> None:
    def chosen(seconds: dict[int, float], hosts: int) -> int:
        times = StepTimes()
        for padded, s in seconds.items():
            for _ in range(3):
                times.observe("a", padded, s)
        return times.fitting("a", [(2, 2), (4, 4), (6, 8)], hosts)

    assert chosen({2: 1.0, 4: 1.05, 8: 1.08}, 1) == 2  # a large card is not full with two rows
    assert chosen({2: 1.0, 4: 1.05, 8: 1.5}, 1) == 1
    assert chosen({2: 1.0, 4: 1.5, 8: 2.0}, 1) == 0
    assert chosen({2: 1.0, 4: 1.5, 8: 2.0}, 2) == 1
    assert chosen({2: 1.0, 4: 1.5, 8: 2.0}, 3) == 2


def test_an_image_that_never_fits_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 rows in batches of 1"):
        next_batch([running("a", 2, 1, 0)], 1)


def test_the_first_image_bounds_the_batch() -> None:
    pinned = [
        BatchCandidate(kind="p", rows=1, steps_left=5, arrival=i, max_rows=2) for i in range(4)
    ]
    assert next_batch([*pinned, running("a", 2, 9, 9)], 8) == pinned[:2]


PADDED = {1: 1, 2: 2, 4: 4, 6: 8, 8: 8}


def fitting(seconds: dict[int, float], rows: int) -> int:
    """The rows of the batch that runs if images with guidance have so many rows together.

    `seconds`: the known times of steps by padded rows.
    """
    times = StepTimes()
    for padded, s in seconds.items():
        for slower in (10.0, 1.0, 1.1):  # the first step compiled its code
            times.observe("a", padded, slower * s)
    options = range(2, rows + 1, 2)
    return options[times.fitting("a", [(r, PADDED[r]) for r in options])]


def test_the_smallest_batch_that_is_almost_as_fast_as_any_runs() -> None:
    large_images = {2: 1.0, 4: 1.99, 8: 3.97}  # twice the rows take almost twice as long
    assert [fitting(large_images, rows) for rows in (2, 4, 6, 8)] == [2, 2, 2, 2]
    small_images = {2: 1.0, 4: 1.2, 8: 1.9}
    assert [fitting(small_images, rows) for rows in (2, 4, 6, 8)] == [2, 4, 4, 8]


def test_times_that_are_not_known_are_measured() -> None:
    assert fitting({}, 8) == 8
    assert fitting({8: 4.0}, 8) == 4
    assert fitting({8: 4.0, 4: 2.0}, 8) == 2


def test_times_are_known_after_some_steps_and_are_forgotten() -> None:
    times = StepTimes()
    for seconds in (9.0, 1.0, 1.2):
        assert times.seconds("a", 2) is None
        times.observe("a", 2, seconds)
    assert times.seconds("a", 2) == 1.0
    assert times.seconds("b", 2) is None
    for _ in range(KEPT):
        times.observe("a", 2, 3.0)
    assert times.seconds("a", 2) == 3.0  # the machine has become slower
    for _ in range(FORGOTTEN):
        times.observe("b", 2, 1.0)
    assert times.seconds("a", 2) is None
    for kind in range(MOST_TIMES):
        times.observe(kind, 2, 1.0)
    assert len(times._times) <= MOST_TIMES  # a client may ask for any number of sizes


def test_a_budget_shrinks_and_comes_back() -> None:
    budget = RowBudget(most=16, least=2)
    assert budget.shrink(16, now=0)
    assert budget.rows(CALM_S - 1) == 8
    assert budget.shrink(6, now=10)  # half of the rows that failed, not of the allowed ones
    assert budget.rows(10) == 3
    assert budget.rows(10 + CALM_S) == 6
    assert budget.rows(10 + 3 * CALM_S) == 16
    assert budget.shrink(4, now=500)
    assert not budget.shrink(2, now=501)
    assert budget.rows(501) == 2
