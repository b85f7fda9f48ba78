"""Tests of `serve.engine.card`: how a replica checks its card, with a fake card and driver."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.capability import probe
from cluster.telemetry import CardTelemetry
from serve.engine.card import READINGS, ReplicaCard, device_for, share_card, take_card
from serve.errors import OctetError
from serve.metric_catalogue import ALL
from serve.settings.models import CardResources

from ..unit.nvml import UUID, FakeNvml
from ..unit.test_card_memory import FakeCuda


class NamedCuda(FakeCuda):
    def get_device_properties(self, _: int) -> Any:
        return SimpleNamespace(name="NVIDIA H100 80GB HBM3", uuid=BARE)


class Metrics:
    """Stands in for Ray's gauges and counters.

    `values`: the last value of each metric, by its name and the values of its tags.
    """

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}

    def make(self, name: str) -> Any:
        def keep(value: float, tags: dict[str, str]) -> None:
            assert set(tags) == set(ALL[name].tags)
            self.values[name, *sorted(tags.values())] = value

        return SimpleNamespace(set=keep, inc=lambda tags: keep(1, tags))


BARE = UUID.removeprefix("GPU-")
PART = CardResources(num_gpus=0.25)
NAME = "NVIDIA H100 80GB HBM3"


def test_a_replica_reports_its_cards_readings_and_its_own_memory() -> None:
    nvml, cuda, metrics = FakeNvml(), NamedCuda(), Metrics()
    card = ReplicaCard(PART, cuda, CardTelemetry(BARE, nvml), make_metric=metrics.make)
    nvml.busy_percent = 64
    cuda.allocate(3)
    card.check()
    assert metrics.values["octet_card_utilisation_percent", BARE, NAME] == 64
    assert metrics.values["octet_replica_memory_bytes", BARE, NAME, "allocated"] == 3 * 2**30
    assert metrics.values["octet_replica_memory_bytes", BARE, NAME, "promised"] == 20 * 2**30
    readings = {name.removeprefix("octet_card_") for name, *_ in metrics.values}
    assert readings >= set(READINGS)


def test_a_broken_card_makes_its_replica_unhealthy() -> None:
    nvml, metrics = FakeNvml(), Metrics()
    card = ReplicaCard(PART, NamedCuda(), CardTelemetry(BARE, nvml), make_metric=metrics.make)
    nvml.xids.append(31)  # an error of a program, after which the card still works
    card.check()
    assert (card.uuid, card.fault) == (BARE, "")
    nvml.xids.append(79)
    with pytest.raises(RuntimeError, match="Xid 79"):
        card.check()
    assert card.fault == "the driver reports Xid 79"
    assert metrics.values["octet_card_xids", BARE, "79", NAME] == 1


def test_a_replica_runs_without_telemetry_and_refuses_a_full_card() -> None:
    # There is no telemetry, because this machine's driver does not know the fake card.
    ReplicaCard(PART, NamedCuda(), make_metric=Metrics().make).check()
    with pytest.raises(OctetError, match=r"promised 20\.0 GiB"):
        ReplicaCard(PART, NamedCuda(others_gib=70), wait_s=0)


def test_only_a_replica_that_takes_a_gpu_has_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica without `num_gpus` uses the CPU, although Ray lets it see the node's cards."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert take_card(PART) is None
    assert device_for(PART) == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert device_for(PART) == "cuda"
    assert device_for(CardResources()) == "cpu"
    assert take_card(CardResources()) is None
    assert probe(device_for(CardResources())).compute_capability is None


def test_only_replicas_that_share_a_card_use_mps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for num_gpus, folder in ((0.0, str(tmp_path)), (1.0, str(tmp_path)), (0.5, None)):
        share_card(CardResources(num_gpus=num_gpus), folder)
    with pytest.raises(OctetError, match="mps_folder: this node has no nvidia-cuda-mps-control"):
        share_card(PART, str(tmp_path))
