"""The card that a replica runs on: its part of the memory, and how the card is."""

from __future__ import annotations

import logging
from typing import Any

import torch
from ray.serve import metrics

from cluster.card_memory import CardFull, claim
from cluster.telemetry import CardTelemetry, NoTelemetry

from ..errors import OctetError
from ..model_settings import OnCard

log = logging.getLogger("ray.serve")

READINGS = {
    "utilisation_percent": "Share of time in which a kernel ran.",
    "memory_used_bytes": "Memory that all processes take.",
    "memory_total_bytes": "Memory of the card or partition.",
    "power_watts": "Power drawn.",
    "temperature_celsius": "Temperature of the GPU.",
    "sm_clock_mhz": "Clock of the multiprocessors.",
    "memory_clock_mhz": "Clock of the memory.",
    "ecc_errors": "Memory errors that could not be corrected, since the driver was loaded.",
}


class CardInUse:
    """What this process may take of its card, and what the card reports."""

    def __init__(
        self, settings: OnCard, cuda: Any = torch.cuda, telemetry: CardTelemetry | None = None
    ) -> None:
        """Raises `OctetError` if what was promised is not free. Blocks."""
        try:
            self._claim = claim(cuda, settings.num_gpus, settings.memory_gib)
        except CardFull as error:
            raise OctetError(str(error)) from None
        properties = cuda.get_device_properties(0)
        uuid = str(properties.uuid)
        self._tags = {"card": properties.name, "uuid": uuid}
        self._telemetry = telemetry or self._watch(uuid)
        keys = tuple(self._tags)
        self._gauges = {
            name: metrics.Gauge(f"octet_card_{name}", text, tag_keys=keys)
            for name, text in READINGS.items()
        }
        self._xids = metrics.Counter(
            "octet_card_xids", "Faults that the driver reported.", tag_keys=(*keys, "xid")
        )
        self._memory = metrics.Gauge(
            "octet_replica_memory_bytes",
            "Memory of this replica: promised, allocated, reserved, peak.",
            tag_keys=(*keys, "kind"),
        )

    def check(self) -> None:
        """Report, and raise `RuntimeError` if the card is broken. Blocks."""
        for kind, taken in self._claim.taken_bytes.items():
            self._memory.set(taken, {**self._tags, "kind": kind})
        if self._telemetry is None:
            return
        sample = self._telemetry.sample()
        if xid := sample.pop("xid", None):
            self._xids.inc(tags={**self._tags, "xid": str(int(xid))})
        for name, value in sample.items():
            self._gauges[name].set(value, self._tags)
        if self._telemetry.broken:
            raise RuntimeError(f"{self._tags['uuid']}: {self._telemetry.broken}")

    def _watch(self, uuid: str) -> CardTelemetry | None:
        try:
            return CardTelemetry(uuid)
        except NoTelemetry as error:
            log.warning("no telemetry of %s: %s", uuid, error)
            return None


def device_for(settings: OnCard) -> str:
    """`cuda` for what takes a GPU, where there is one. Ray hides none from what takes none."""
    return "cuda" if settings.num_gpus and torch.cuda.is_available() else "cpu"


def take_card(settings: OnCard) -> CardInUse | None:
    """This process's card; None for what runs on a CPU. Raises `OctetError`; blocks."""
    return CardInUse(settings) if device_for(settings) == "cuda" else None
