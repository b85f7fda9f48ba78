"""A fake NVML driver without a card: faults on demand, with the real errors and structures."""

from __future__ import annotations

from collections import deque
from typing import Any

import pynvml
from pynvml import NVMLError

UUID = "GPU-5f3c0a52-0000-4000-8000-000000000001"
MIG_UUID = "MIG-5f3c0a52-0000-4000-8000-000000000002"


class FakeNvml:
    """A card whose readings tests change; constants and errors come from the real module.

    `unsupported`: functions that the card does not offer. A MIG partition offers its memory only,
    like a real one.
    """

    ON_PARTITIONS = "nvmlDeviceGetMemoryInfo", "nvmlDeviceIsMigDeviceHandle"

    def __init__(self, *, installed: bool = True, unsupported: tuple[str, ...] = ()) -> None:
        self.installed, self.unsupported = installed, unsupported
        self.busy_percent, self.milliwatts, self.celsius = 0, 70_000, 35
        self.used, self.total = 0, 80 * 2**30
        self.uncorrected = 0
        self.lost = False
        self.xids: deque[int] = deque()
        self._ready = False
        self._registered = 0

    def __getattr__(self, name: str) -> Any:
        """Constants and error classes."""
        return getattr(pynvml, name)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "unsupported"):
            return self._refuse
        return object.__getattribute__(self, name)

    def _refuse(self, *_: Any) -> Any:
        raise NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def _check(self, handle: str | None = None, function: str = "") -> None:
        if not self._ready:
            raise NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        if self.lost:
            raise NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        if handle == MIG_UUID and function not in self.ON_PARTITIONS:
            raise NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names
        if not self.installed:
            raise NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
        self._ready = True

    def nvmlSystemGetDriverVersion(self) -> bytes:  # noqa: N802
        self._check()
        return b"580.159.04"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self._check()
        if uuid not in (UUID, MIG_UUID):
            raise NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def nvmlDeviceIsMigDeviceHandle(self, handle: str) -> int:  # noqa: N802
        self._check()
        return int(handle == MIG_UUID)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:  # noqa: N802
        self._check()
        assert handle == MIG_UUID
        return UUID

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        self._check(handle)
        rates = pynvml.c_nvmlUtilization_t()
        rates.gpu = self.busy_percent
        return rates

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        self._check(handle, "nvmlDeviceGetMemoryInfo")
        memory = pynvml.c_nvmlMemory_t()
        memory.total = self.total // (7 if handle == MIG_UUID else 1)
        memory.used = self.used
        return memory

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        self._check(handle)
        return self.milliwatts

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:  # noqa: N802
        self._check(handle)
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return self.celsius

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:  # noqa: N802
        self._check(handle)
        return {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 2619}[clock]

    def nvmlDeviceGetTotalEccErrors(self, handle: str, kind: int, counter: int) -> int:  # noqa: N802
        self._check(handle)
        assert kind == pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
        assert counter == pynvml.NVML_VOLATILE_ECC
        return self.uncorrected

    def nvmlDeviceGetSupportedEventTypes(self, handle: str) -> int:  # noqa: N802
        self._check(handle)
        return int(pynvml.nvmlEventTypeXidCriticalError | pynvml.nvmlEventTypeClock)

    def nvmlEventSetCreate(self) -> object:  # noqa: N802
        self._check()
        return object()

    def nvmlDeviceRegisterEvents(self, handle: str, types: int, events: object) -> None:  # noqa: N802
        self._check(handle)
        self._registered = types

    def nvmlEventSetWait_v2(self, events: object, timeout_ms: int) -> Any:  # noqa: N802
        self._check()
        if not self.xids or not self._registered & pynvml.nvmlEventTypeXidCriticalError:
            raise NVMLError(pynvml.NVML_ERROR_TIMEOUT)
        event = pynvml.c_nvmlEventData_t()
        event.eventType, event.eventData = self._registered, self.xids.popleft()
        return event
