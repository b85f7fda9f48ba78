"""The memory that a replica claims on a card that other processes use too."""

from __future__ import annotations

import pytest

from cluster.card_memory import WAIT_S, CardFull, claim
from cluster.footprint import CONTEXT_GIB, GIB


class FakeCuda:
    """A process's view of a card that has other users; allocations beyond its cap fail."""

    def __init__(self, total_gib: float = 80.0, others_gib: float = 0.0) -> None:
        self.total, self.others = round(total_gib * GIB), round(others_gib * GIB)
        self.allocated = self.peak = 0
        self.cap = self.total

    def mem_get_info(self) -> tuple[int, int]:
        context = round(CONTEXT_GIB * GIB)
        return self.total - self.others - self.allocated - context, self.total

    def set_per_process_memory_fraction(self, fraction: float) -> None:
        assert 0 <= fraction <= 1  # torch refuses anything else
        self.cap = int(fraction * self.total)

    def allocate(self, gib: float) -> None:
        wanted = round(gib * GIB)
        if self.allocated + wanted > min(self.cap, self.mem_get_info()[0]):
            raise MemoryError
        self.allocated += wanted
        self.peak = max(self.peak, self.allocated)

    def memory_allocated(self) -> int:
        return self.allocated

    def memory_reserved(self) -> int:
        return self.allocated

    def max_memory_allocated(self) -> int:
        return self.peak


def test_a_replica_takes_its_promised_memory_and_no_more() -> None:
    cuda = FakeCuda(others_gib=40)
    mine = claim(cuda, num_gpus=0.25)
    assert mine.promised_gib == 20
    allowed_gib = 20 - CONTEXT_GIB
    cuda.allocate(allowed_gib - 0.1)
    with pytest.raises(MemoryError):
        cuda.allocate(0.2)
    assert mine.taken_bytes["allocated"] == round((allowed_gib - 0.1) * GIB)
    assert mine.taken_bytes["promised"] == 20 * GIB


def test_the_settings_may_promise_less_than_the_fraction_of_the_card() -> None:
    cuda = FakeCuda()
    assert claim(cuda, num_gpus=0.5, memory_gib=10).promised_gib == 10
    with pytest.raises(MemoryError):
        cuda.allocate(10)


def test_a_card_filled_by_other_processes_is_refused_with_the_reason() -> None:
    waits: list[float] = []
    with pytest.raises(CardFull) as error:
        claim(FakeCuda(others_gib=65), num_gpus=0.25, sleep=waits.append)
    assert "promised 20.0 GiB of the card, and 15.0 of 80.0 GiB are free" in str(error.value)
    assert sum(waits) == WAIT_S


def test_a_claim_waits_for_the_memory_of_a_dead_predecessor() -> None:
    cuda = FakeCuda(others_gib=65)

    def later(_: float) -> None:
        cuda.others -= 2 * GIB

    claim(cuda, num_gpus=0.25, sleep=later)
    assert 58 * GIB <= cuda.others <= 60 * GIB


def test_a_whole_card_or_several_can_be_claimed() -> None:
    for num_gpus in (1.0, 2.0):
        cuda = FakeCuda()
        assert claim(cuda, num_gpus).promised_gib == 80
        assert cuda.cap == pytest.approx((80 - CONTEXT_GIB) * GIB, rel=0.001)


def test_less_memory_than_a_cuda_context_is_refused() -> None:
    with pytest.raises(CardFull, match="context alone"):
        claim(FakeCuda(), num_gpus=0.005)
