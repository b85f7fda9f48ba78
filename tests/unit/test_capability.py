import pytest

from cluster.capability import Device, capability, probe


@pytest.mark.parametrize(
    ("name", "version", "fp8", "sixteen_bit"),
    [
        ("Tesla T4", (7, 5), "none", "fp16"),
        ("NVIDIA A100", (8, 0), "none", "bf16"),
        ("NVIDIA GeForce RTX 3090", (8, 6), "none", "bf16"),
        ("NVIDIA L40S", (8, 9), "native", "bf16"),
        ("NVIDIA H100", (9, 0), "native", "bf16"),
        ("NVIDIA B200", (10, 0), "native", "bf16"),
        ("NVIDIA GeForce RTX 5090", (12, 0), "native", "bf16"),
    ],
)
@pytest.mark.parametrize("emulate", [False, True])
def test_each_card_has_its_precisions(
    name: str, version: tuple[int, int], fp8: str, sixteen_bit: str, emulate: bool
) -> None:
    found = capability(Device(name, version, 24.0), allow_emulated_fp8=emulate)
    assert (found.fp8, found.sixteen_bit) == (fp8, sixteen_bit)
    assert name in found.reason


def test_a_cpu_emulates_only_when_allowed() -> None:
    cpu = Device("cpu", None, 16.0)
    assert capability(cpu).fp8 == "none"
    assert capability(cpu, allow_emulated_fp8=True).fp8 == "emulated"


@pytest.mark.parametrize(("bf16", "runs"), [(True, "bf16"), (False, "fp32")])
def test_a_cpu_without_bfloat16_computes_in_float32(bf16: bool, runs: str) -> None:
    for emulate in (False, True):
        cpu = Device("cpu", None, 16.0, cpu_bf16=bf16)
        assert capability(cpu, allow_emulated_fp8=emulate).sixteen_bit == runs


def test_this_machine_is_probed() -> None:
    assert probe().memory_gib > 1
