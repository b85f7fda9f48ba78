"""A replica's own view of its card, with a card and a driver that can go wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.capability import probe
from cluster.telemetry import CardTelemetry
from serve.engine.card import READINGS, ReplicaCard, device_for, take_card
from serve.errors import OctetError
from serve.metric_catalogue import ALL
from serve.settings.models import CardResources

from ..unit.nvml import UUID, FakeNvml
from ..unit.test_card_memory import FakeCuda


class NamedCuda(FakeCuda):
    def get_device_properties(self, _: int) -> Any:
        return SimpleNamespace(name="NVIDIA H100 80GB HBM3", uuid=BARE)


class Heard:
    """Stands in for Ray's gauge or counter of one name."""

    values: dict[tuple[str, ...], float]

    def __init__(self, name: str) -> None:
        self.name, self.tag_keys = name, ALL[name].tags

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys)
        Heard.values[self.name, *sorted(tags.values())] = value

    def inc(self, tags: dict[str, str]) -> None:
        self.set(1, tags)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], float]:
    Heard.values = {}
    monkeypatch.setattr("serve.engine.card.metric", Heard)
    return Heard.values


BARE = UUID.removeprefix("GPU-")
PART = CardResources(num_gpus=0.25)
NAME = "NVIDIA H100 80GB HBM3"


def test_it_reports_the_card_and_its_own_part(heard: dict[tuple[str, ...], float]) -> None:
    nvml, cuda = FakeNvml(), NamedCuda()
    card = ReplicaCard(PART, cuda, CardTelemetry(BARE, nvml))
    nvml.busy_percent = 64
    cuda.allocate(3)
    card.check()
    assert heard["octet_card_utilisation_percent", BARE, NAME] == 64
    assert heard["octet_replica_memory_bytes", BARE, NAME, "allocated"] == 3 * 2**30
    assert heard["octet_replica_memory_bytes", BARE, NAME, "promised"] == 20 * 2**30
    readings = {name.removeprefix("octet_card_") for name, *_ in heard}
    assert readings >= set(READINGS)


def test_a_broken_card_makes_its_replica_unhealthy(heard: dict[tuple[str, ...], float]) -> None:
    nvml = FakeNvml()
    card = ReplicaCard(PART, NamedCuda(), CardTelemetry(BARE, nvml))
    nvml.xids.append(31)  # of a program
    card.check()
    nvml.xids.append(79)
    with pytest.raises(RuntimeError, match="Xid 79"):
        card.check()
    assert heard["octet_card_xids", BARE, "79", NAME] == 1


@pytest.mark.usefixtures("heard")
def test_it_runs_without_telemetry_and_starts_only_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ReplicaCard(
        PART, NamedCuda()
    ).check()  # this machine's driver, if there is one, has no such card
    monkeypatch.setattr("cluster.card_memory.WAIT_S", 0.0)
    with pytest.raises(OctetError, match=r"promised 20\.0 GiB"):
        ReplicaCard(PART, NamedCuda(others_gib=70))


def test_only_what_takes_a_gpu_has_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray hides no card from a replica that takes none."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert take_card(PART) is None
    assert device_for(PART) == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert device_for(PART) == "cuda"
    assert device_for(CardResources()) == "cpu"
    assert take_card(CardResources()) is None
    assert probe(device_for(CardResources())).compute_capability is None
