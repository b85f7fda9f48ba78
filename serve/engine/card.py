"""The card that a replica runs on: its part of the memory, and how the card is."""

from __future__ import annotations

import logging
from typing import Any

import torch

from cluster.card_memory import CardFull, claim
from cluster.telemetry import CardTelemetry, NoTelemetry

from ..errors import OctetError
from ..metric_catalogue import metric
from ..settings.models import CardResources

log = logging.getLogger("ray.serve")

READINGS = (
    *("utilisation_percent", "memory_used_bytes", "memory_total_bytes", "power_watts"),
    *("temperature_celsius", "sm_clock_mhz", "memory_clock_mhz", "ecc_errors"),
)


class ReplicaCard:
    """What this process may take of its card, and what the card reports."""

    def __init__(
        self,
        settings: CardResources,
        cuda: Any = torch.cuda,
        telemetry: CardTelemetry | None = None,
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
        self._gauges = {name: metric(f"octet_card_{name}") for name in READINGS}
        self._xids = metric("octet_card_xids")
        self._memory = metric("octet_replica_memory_bytes")

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


def device_for(settings: CardResources) -> str:
    """`cuda` for what takes a GPU, where there is one. Ray hides none from what takes none."""
    return "cuda" if settings.num_gpus and torch.cuda.is_available() else "cpu"


def take_card(settings: CardResources) -> ReplicaCard | None:
    """This process's card; None for what runs on a CPU. Raises `OctetError`; blocks."""
    return ReplicaCard(settings) if device_for(settings) == "cuda" else None
