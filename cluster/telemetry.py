"""Readings of a card through NVML: load, memory, power, temperature, clocks and faults.

Not every card, driver or partition (MIG) supports every reading. Readings that are not supported
are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pynvml

# Xid errors that a program causes, not the card: the list of NVIDIA's device plugin for Kubernetes.
PROGRAMS_XIDS = frozenset({13, 31, 43, 45, 68, 109})
# Errors of a reading that the card or driver does not support, or that needs more rights.
ABSENT = (
    pynvml.NVMLError_NotSupported,
    pynvml.NVMLError_FunctionNotFound,
    pynvml.NVMLError_NoPermission,
    pynvml.NVMLError_NoData,
    pynvml.NVMLError_VgpuEccNotSupported,
)
# Errors after which the card cannot be used.
DEAD = pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_ResetRequired


class NoTelemetry(Exception):
    """NVML does not work on this machine; the message says why."""


class CardTelemetry:
    """The readings of one card, or of one partition of a card.

    `uuid`: the UUID by which CUDA names the card or the partition. `broken` says in words what is
    wrong with the card, and is empty while nothing is wrong. `nvml` behaves like the module pynvml.
    """

    def __init__(self, uuid: str, nvml: Any = pynvml) -> None:
        """Find the card and subscribe to its faults.

        Raises `NoTelemetry` if NVML does not work or does not know the UUID.
        """
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
        """Take all readings, and bring `broken` up to date; return the readings by name.

        A name ends in its unit, such as `power_watts`. Blocks.
        """
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
        """Find NVML's handle of a UUID.

        CUDA does not say whether the UUID is that of a card or of a partition of one, so both are
        tried. Raises NVML's error if there is no such card and no such partition.
        """
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
        """Take one reading; None if it fails or is not supported.

        `ask`: the function that calls NVML. A card that is lost or needs a reset counts as broken.
        """
        try:
            return ask()
        except (*ABSENT, AttributeError):
            return None
        except DEAD as error:
            self.broken = str(error)
            return None
        except pynvml.NVMLError:  # a passing error: the next reading may work
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
        """Subscribe to the driver's critical events; None if that is not supported."""
        nvml = self._nvml

        def listen() -> Any:
            supported = nvml.nvmlDeviceGetSupportedEventTypes(self._card)
            wanted = supported & nvml.nvmlEventTypeXidCriticalError
            events = nvml.nvmlEventSetCreate()
            nvml.nvmlDeviceRegisterEvents(self._card, wanted, events)
            return events

        return self._read(listen)

    def _xids(self) -> list[int]:
        """The Xid errors that were reported since the last call."""
        found: list[int] = []
        while self._events is not None:
            event = self._read(lambda: self._nvml.nvmlEventSetWait_v2(self._events, 0))
            if event is None:
                break
            found.append(event.eventData)
        return found


def driver_version(nvml: Any = pynvml) -> str:
    """The version of NVIDIA's driver. Raises `NoTelemetry` if NVML does not work."""
    try:
        nvml.nvmlInit()
        found = nvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError as error:
        raise NoTelemetry(str(error)) from None
    return found.decode() if isinstance(found, bytes) else str(found)
