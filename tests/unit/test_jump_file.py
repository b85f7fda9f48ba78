"""What autoscaling has learnt of jumps survives a restart of the Dispatcher."""

import asyncio
from pathlib import Path

import pytest

from autoscaling.floor import JumpMemory
from autoscaling.load import PoolBounds, ScalingLimits
from serve.dispatch.admission import Admission
from serve.dispatch.grants import Grants
from serve.dispatch.jump_file import FILE, JumpFile
from serve.dispatch.scaling import Scaling

POOLS = ("m-fp8", "m-fp16")


def scaling() -> Scaling:
    grants = Grants(session_lease_s=10, replica_lease_s=5)
    made = Scaling(grants, Admission(grants, max_queued=9), 0.0)
    made.set_limits(ScalingLimits({pool: PoolBounds("m", 0, 9, 2) for pool in POOLS}))
    return made


def learnt() -> JumpMemory:
    memory = JumpMemory()
    for second in range(100):
        memory = memory.counted(5.0 * (second % 2), 0.0, 1.0, 0.0, 7200.0 + second)
    return memory


def test_a_new_dispatcher_knows_what_the_last_one_has_learnt(tmp_path: Path) -> None:
    first = scaling()
    first.remember({POOLS: learnt()})
    asyncio.run(JumpFile(first, None).write())  # without a folder nothing happens
    kept = JumpFile(first, tmp_path / "other")
    asyncio.run(kept.write())  # nor does a folder that is missing raise
    first.remember({POOLS: learnt()})
    file = JumpFile(first, tmp_path)
    first.remember({POOLS: learnt()})
    asyncio.run(file.write())

    second = scaling()
    JumpFile(second, tmp_path)
    assert second.jumps()[POOLS].floor(0.01, None, 0.0) == learnt().floor(0.01, None, 0.0) > 4.0
    # A decision uses it at once, and goes on learning from there.
    second.placeable = frozenset(POOLS)
    second.decide(0.0)
    assert second.replicas["m-fp8"] >= 5
    second.decide(1.0)
    assert second.jumps()[POOLS].always.all_s == pytest.approx(250.0, rel=0.01)


@pytest.mark.parametrize("text", ["", "[", "{}", "[1]", '[{"pools": ["p"]}]', '{"a": 1}'])
def test_a_damaged_file_is_a_new_beginning(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    made = scaling()
    JumpFile(made, tmp_path)
    assert made.jumps() == {}
