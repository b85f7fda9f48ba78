"""What a card says of itself through NVML: load, memory, power, temperature, clocks, faults.

Not every card, driver and partition (MIG) answers everything: what is not supported is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pynvml

# Faults of a program, not of the card, as NVIDIA's device plugin for Kubernetes has them.
PROGRAMS_XIDS = frozenset({13, 31, 43, 45, 68, 109})
ABSENT = (
    pynvml.NVMLError_NotSupported,
    pynvml.NVMLError_FunctionNotFound,
    pynvml.NVMLError_NoPermission,
    pynvml.NVMLError_NoData,
    pynvml.NVMLError_VgpuEccNotSupported,
)
DEAD = pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_ResetRequired


class NoTelemetry(Exception):
    """NVML does not work here; the message says why."""


class CardTelemetry:
    """One card, or one partition of it, by CUDA's UUID; `nvml` behaves like pynvml.

    `broken` says in words what is wrong with the card, once something is.
    """

    def __init__(self, uuid: str, nvml: Any = pynvml) -> None:
        """Raises `NoTelemetry`."""
        self._nvml, self.broken = nvml, ""
        try:
            nvml.nvmlInit()
            self._part = self._card = self._handle(uuid)
        except pynvml.NVMLError as error:
            raise NoTelemetry(str(error)) from None
        if self._read(lambda: nvml.nvmlDeviceIsMigDeviceHandle(self._part)):
            whole = self._read(
                lambda: nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self._part)
            )
            self._card = whole or self._part
        self._ecc_before: float | None = self._ecc_errors()
        self._events = self._listen()

    def sample(self) -> dict[str, float]:
        """What it answers, by name with its unit; `broken` is up to date afterwards. Blocks."""
        values = {name: value for name, value in self._readings() if value is not None}
        errors = values.get("ecc_errors")
        if self._ecc_before is None or errors is None:
            self._ecc_before = errors
        elif errors > self._ecc_before:
            self.broken = "memory errors that could not be corrected"
        for xid in self._xids():
            values["xid"] = xid
            if xid not in PROGRAMS_XIDS:
                self.broken = f"the driver reports Xid {xid}"
        return values

    def _handle(self, uuid: str) -> Any:
        """CUDA does not say whether a UUID is a card's or a partition's."""
        for prefix in ("GPU-", "MIG-"):
            with suppress(pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument):
                return self._nvml.nvmlDeviceGetHandleByUUID(prefix + uuid)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def _readings(self) -> Iterator[tuple[str, float | None]]:
        nvml, card = self._nvml, self._card
        utilisation = self._read(lambda: nvml.nvmlDeviceGetUtilizationRates(card))
        yield "utilisation_percent", utilisation and utilisation.gpu
        memory = self._read(lambda: nvml.nvmlDeviceGetMemoryInfo(self._part))
        yield "memory_used_bytes", memory and memory.used
        yield "memory_total_bytes", memory and memory.total
        milliwatts = self._read(lambda: nvml.nvmlDeviceGetPowerUsage(card))
        yield "power_watts", None if milliwatts is None else milliwatts / 1000
        celsius = self._read(lambda: nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU))
        yield "temperature_celsius", celsius
        sm_mhz = self._read(lambda: nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM))
        yield "sm_clock_mhz", sm_mhz
        memory_mhz = self._read(lambda: nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_MEM))
        yield "memory_clock_mhz", memory_mhz
        yield "ecc_errors", self._ecc_errors()

    def _read(self, ask: Callable[[], Any]) -> Any:
        """None for what this card, driver or module does not have."""
        try:
            return ask()
        except (*ABSENT, AttributeError):
            return None
        except DEAD as error:
            self.broken = str(error)
            return None
        except pynvml.NVMLError:  # of this moment
            return None

    def _ecc_errors(self) -> int | None:
        nvml = self._nvml
        found: int | None = self._read(
            lambda: nvml.nvmlDeviceGetTotalEccErrors(
                self._card, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            )
        )
        return found

    def _listen(self) -> Any:
        """The set in which the driver's critical events arrive, or None."""
        nvml = self._nvml

        def listen() -> Any:
            supported = nvml.nvmlDeviceGetSupportedEventTypes(self._card)
            wanted = supported & nvml.nvmlEventTypeXidCriticalError
            events = nvml.nvmlEventSetCreate()
            nvml.nvmlDeviceRegisterEvents(self._card, wanted, events)
            return events

        return self._read(listen)

    def _xids(self) -> list[int]:
        """Those that have come since they were last asked for."""
        found: list[int] = []
        while self._events is not None:
            event = self._read(lambda: self._nvml.nvmlEventSetWait_v2(self._events, 0))
            if event is None:
                break
            found.append(event.eventData)
        return found


def driver_version(nvml: Any = pynvml) -> str:
    """Raises `NoTelemetry`."""
    try:
        nvml.nvmlInit()
        found = nvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError as error:
        raise NoTelemetry(str(error)) from None
    return found.decode() if isinstance(found, bytes) else str(found)
