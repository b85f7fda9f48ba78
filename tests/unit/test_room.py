"""How many replicas of several pools fit on the nodes together."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import PRECISION_LABEL, Node, NodeRequirement
from cluster.room import Room


def card(name: str, gpus: float = 1, precision: str = "fp8", cpus: float = 8) -> Node:
    return Node(name, {PRECISION_LABEL: precision}, cpus, gpus)


def need(gpus: float, precision: str = "fp8", cpus: float = 1, **more: bool) -> NodeRequirement:
    return NodeRequirement(precision, cpus, gpus, **more)  # type: ignore[arg-type]


def test_all_get_what_they_want_if_there_is_room() -> None:
    room = Room([card("a"), card("b")], {"x": need(0.5), "y": need(1)})
    assert room.together({"x": 2, "y": 1}) == {"x": 2, "y": 1}


def test_what_is_missing_is_missing_in_proportion() -> None:
    room = Room([card("a", 6)], {"x": need(1), "y": need(1)})
    assert room.together({"x": 8, "y": 4}) == {"x": 4, "y": 2}
    assert room.together({"x": 100, "y": 1}) == {"x": 5, "y": 1}, "nobody is left without any"


def test_an_earlier_stage_comes_before_what_a_later_one_wants() -> None:
    room = Room([card("a", 4)], {"x": need(1), "y": need(1)})
    assert room.together({"y": 3}, {"x": 9, "y": 3}) == {"x": 1, "y": 3}
    assert room.together({"x": 3, "y": 1}, {"x": 1, "y": 9}) == {"x": 3, "y": 1}


def test_of_equal_ones_the_first_is_served_first() -> None:
    room = Room([card("a")], {"x": need(1), "y": need(1)})
    assert room.together({"y": 1, "x": 1}) == {"y": 1, "x": 0}


def test_a_pool_that_fits_nowhere_leaves_the_room_to_others() -> None:
    room = Room([card("a", 2)], {"large": need(3), "fp16": need(1, "fp16"), "x": need(1)})
    assert room.together({"large": 1, "fp16": 0, "x": 2}) == {"large": 0, "fp16": 0, "x": 2}
    strict = Room([card("a", 2)], {"fp16": need(1, "fp16", allow_fp8_nodes=False), "x": need(1)})
    assert strict.together({"fp16": 1, "x": 2}) == {"fp16": 0, "x": 2}


def test_sixteen_bit_replicas_leave_cards_with_fp8_to_those_that_need_them() -> None:
    nodes = [card("new"), card("old", precision="fp16")]
    room = Room(nodes, {"fp16": need(1, "fp16"), "fp8": need(1)})
    assert room.together({"fp16": 1, "fp8": 1}) == {"fp16": 1, "fp8": 1}


def test_what_needs_no_card_leaves_nodes_with_cards_to_those_that_do() -> None:
    nodes = [card("a", cpus=1), card("front", gpus=0, cpus=1)]
    room = Room(nodes, {"cpu": need(0, "fp16"), "x": need(1)})
    assert room.together({"cpu": 1}, {"x": 1}) == {"cpu": 1, "x": 1}


def test_a_replica_is_never_split_over_two_cards() -> None:
    assert Room([card("a", 2)], {"x": need(0.7)}).together({"x": 9}) == {"x": 2}


def test_parts_fill_a_card_before_they_open_another() -> None:
    room = Room([card("a", 2)], {"small": need(0.25), "whole": need(1)})
    assert room.together({"small": 4, "whole": 1}) == {"small": 4, "whole": 1}


def test_cpus_run_out_too() -> None:
    room = Room([card("a", 4, cpus=3)], {"x": need(1), "front": need(0, "fp16")})
    assert room.together({"front": 1}, {"x": 4}) == {"front": 1, "x": 2}


def test_deployments_without_known_needs_are_not_judged() -> None:
    assert Room([card("a")], {"x": need(1)}).together({"x": 1, "new": 3}) == {"x": 1}


parts = st.sampled_from([0.2, 0.25, 1 / 3, 0.5, 0.7, 1.0])


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.lists(st.tuples(parts, st.integers(0, 5)), min_size=1, max_size=3),
)
def test_nothing_more_would_fit_and_nothing_is_too_much(
    gpus: list[int], asked: list[tuple[float, int]]
) -> None:
    nodes = [card(str(i), n, cpus=100) for i, n in enumerate(gpus)]
    room = Room(nodes, {str(i): need(part) for i, (part, _) in enumerate(asked)})
    wanted = {str(i): n for i, (_, n) in enumerate(asked)}
    found = room.together(wanted)
    assert all(found[pool] <= n for pool, n in wanted.items())
    used = sum(found[str(i)] * part for i, (part, _) in enumerate(asked))
    assert used <= sum(gpus) + 1e-3
    for i, (part, n) in enumerate(asked):
        if found[str(i)] < n:  # then every card is fuller than one more of these would need
            assert used > sum(gpus) * (1 - part) - 1e-3
