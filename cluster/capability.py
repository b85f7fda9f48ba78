"""The precisions that a device can run, decided from its compute capability.

FP8 tensor cores exist from compute capability 8.9 (Ada, Hopper, Blackwell) on. An A100 has 8.0 and
an RTX 3090 has 8.6: neither has FP8 tensor cores. bfloat16 arithmetic exists from 8.0 on; older
cards use float16. A CPU can run the FP8 layers slowly ("emulated"). Emulation is meant for demos
and tests, so it is off unless the settings allow it. CPUs for which torch has no fast bfloat16
(those with AVX2 only, such as most laptops') compute in float32 instead of 16 bit, because bfloat16
takes them several times as long.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from .cards import BF16_SINCE, FP8_SINCE

SixteenBit = Literal["bf16", "fp16", "fp32"]  # what a device runs where 16 bit is asked for
Fp8 = Literal["native", "emulated", "none"]


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU as its driver reports it, or a CPU, whose `compute_capability` is None.

    `cpu_bf16`: whether torch has fast bfloat16 for the machine's CPU.
    """

    name: str
    compute_capability: tuple[int, int] | None
    memory_gib: float
    cpu_bf16: bool = True


@dataclass(frozen=True, slots=True)
class Capability:
    """The precisions that a device can run; `reason` says in words why it has FP8 or not."""

    fp8: Fp8
    sixteen_bit: SixteenBit
    reason: str


def capability(device: Device, *, allow_emulated_fp8: bool = False) -> Capability:
    """Decide which precisions a device can run.

    `allow_emulated_fp8`: let a CPU run the FP8 layers in software.
    """
    found = device.compute_capability
    if found is None:
        sixteen_bit: SixteenBit = "bf16" if device.cpu_bf16 else "fp32"
        fp8: Fp8 = "emulated" if allow_emulated_fp8 else "none"
        allowed = "allowed" if allow_emulated_fp8 else "not allowed"
        return Capability(fp8, sixteen_bit, f"{device.name}: a CPU; FP8 emulation is {allowed}")
    sixteen_bit = "bf16" if found >= BF16_SINCE else "fp16"
    version, needed = f"{found[0]}.{found[1]}", f"{FP8_SINCE[0]}.{FP8_SINCE[1]}"
    if found >= FP8_SINCE:
        return Capability("native", sixteen_bit, f"{device.name}: capability {version} has FP8")
    reason = f"{device.name}: capability {version} has no FP8 tensor cores ({needed} needed)"
    return Capability("none", sixteen_bit, reason)


def probe(device: str = "cuda") -> Device:
    """Describe the device that this process runs on.

    This is the first visible GPU if `device` is `cuda` and there is a GPU, otherwise the CPU.
    """
    import torch  # imported here, so that `capability` works without torch

    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(
            properties.name,
            (properties.major, properties.minor),
            properties.total_memory / 2**30,
        )
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # oneDNN is the library that computes on CPUs.
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's
    bf16 = onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return Device("cpu", None, pages / 2**30, bf16)
