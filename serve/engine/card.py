"""The card that a replica runs on: its memory, and the readings that show the card's health."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cluster import mps
from cluster.card_memory import WAIT_S, CardFull, claim
from cluster.telemetry import CardTelemetry, NoTelemetry

from ..errors import OctetError
from ..metric_catalogue import metric
from ..settings.models import CardResources

log = logging.getLogger("ray.serve")

READINGS = (  # names of the readings that become gauges
    *("utilisation_percent", "memory_used_bytes", "memory_total_bytes", "power_watts"),
    *("temperature_celsius", "sm_clock_mhz", "memory_clock_mhz", "ecc_errors"),
)


class ReplicaCard:
    """The card of a replica: claims the replica's part of its memory, and reports its metrics."""

    def __init__(
        self,
        settings: CardResources,
        cuda: Any = torch.cuda,
        telemetry: CardTelemetry | None = None,
        wait_s: float = WAIT_S,
        make_metric: Callable[[str], Any] = metric,
    ) -> None:
        """Claim the card memory that the settings promise to this replica.

        Blocks until the memory is free, for up to `wait_s` seconds. Raises `OctetError` if it is
        not free by then. `telemetry`: the source of the card's readings; by default NVML's.
        """
        try:
            self._claim = claim(cuda, settings.num_gpus, settings.memory_gib, wait_s)
        except CardFull as error:
            raise OctetError(str(error)) from None
        properties = cuda.get_device_properties(0)
        uuid = str(properties.uuid)
        self._tags = {"card": properties.name, "uuid": uuid}
        self._telemetry = telemetry or self._watch(uuid)
        self._gauges = {name: make_metric(f"octet_card_{name}") for name in READINGS}
        self._xids = make_metric("octet_card_xids")
        self._memory = make_metric("octet_replica_memory_bytes")

    @property
    def uuid(self) -> str:
        """The UUID by which CUDA names the card."""
        return str(self._tags["uuid"])

    @property
    def fault(self) -> str:
        """The fault of the card that the last `check` found, in words; empty without one."""
        return self._telemetry.broken if self._telemetry else ""

    def check(self) -> None:
        """Update the card's metrics. Raises `RuntimeError` if the card is broken. May block."""
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
            log.warning("no readings of card %s: %s", uuid, error)
            return None


def share_card(settings: CardResources, mps_folder: str | None) -> None:
    """Let this process share its card by NVIDIA's MPS, if the settings ask for it.

    Must be called before this process uses CUDA. May block. Raises `OctetError` if MPS does not
    start on this node.
    """
    if mps_folder and 0 < settings.num_gpus < 1:
        try:
            mps.join(Path(mps_folder).expanduser())
        except mps.MpsError as error:
            raise OctetError(f"mps_folder: {error}") from None


def device_for(settings: CardResources) -> str:
    """The device of a replica: `cuda` if its settings ask for a GPU and there is one, else `cpu`.

    The settings must be asked, because Ray lets an actor without GPUs see those of its machine.
    """
    return "cuda" if settings.num_gpus and torch.cuda.is_available() else "cpu"


def take_card(settings: CardResources) -> ReplicaCard | None:
    """Claim the card of this process; returns None if the process runs on the CPU.

    Blocks while the promised memory is not free. Raises `OctetError` if the wait takes too long.
    """
    return ReplicaCard(settings) if device_for(settings) == "cuda" else None


def check_device(device: str) -> None:
    """Raise CUDA's error if a kernel on this device has failed."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
