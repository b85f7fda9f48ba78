"""Which precisions a device can run, decided from plain facts.

FP8 tensor cores exist from compute capability 8.9 (Ada, Hopper, Blackwell) on. A100 is 8.0 and
RTX 3090 is 8.6: neither has them. bfloat16 arithmetic exists from 8.0; older cards use float16.
A CPU can run the FP8 layers slowly ("emulated"), which is for demos and tests and therefore off
unless the settings allow it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from .cards import BF16_SINCE, FP8_SINCE

SixteenBit = Literal["bf16", "fp16"]
Fp8 = Literal["native", "emulated", "none"]


@dataclass(frozen=True, slots=True)
class Device:
    """A device as the driver reports it; `compute_capability` is None for a CPU."""

    name: str
    compute_capability: tuple[int, int] | None
    memory_gib: float


@dataclass(frozen=True, slots=True)
class Capability:
    """What a device can run. `reason` says in words why FP8 is there or not."""

    fp8: Fp8
    sixteen_bit: SixteenBit
    reason: str


def capability(device: Device, *, allow_emulated_fp8: bool = False) -> Capability:
    """The precisions of a device."""
    found = device.compute_capability
    if found is None:
        if allow_emulated_fp8:
            return Capability("emulated", "bf16", f"{device.name}: a CPU; emulation is allowed")
        return Capability("none", "bf16", f"{device.name}: a CPU; emulation is not allowed")
    sixteen_bit: SixteenBit = "bf16" if found >= BF16_SINCE else "fp16"
    version, needed = f"{found[0]}.{found[1]}", f"{FP8_SINCE[0]}.{FP8_SINCE[1]}"
    if found >= FP8_SINCE:
        return Capability("native", sixteen_bit, f"{device.name}: capability {version} has FP8")
    reason = f"{device.name}: capability {version} has no FP8 tensor cores ({needed} needed)"
    return Capability("none", sixteen_bit, reason)


def probe(device: str = "cuda") -> Device:
    """This process's first visible GPU if there is one and `device` is `cuda`; else the CPU."""
    import torch  # here alone, so that the decision above needs nothing

    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(
            properties.name,
            (properties.major, properties.minor),
            properties.total_memory / 2**30,
        )
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device("cpu", None, pages / 2**30)
