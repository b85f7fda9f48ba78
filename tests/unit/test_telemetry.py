"""Telemetry of a card, with a fake driver that has faults and with this machine's driver."""

import pynvml
import pytest

from cluster.telemetry import CardTelemetry, NoTelemetry, driver_version

from .nvml import MIG_UUID, UUID, FakeNvml

BARE = UUID.removeprefix("GPU-")  # the UUID in CUDA's form


def test_a_sample_has_the_readings_of_a_card() -> None:
    nvml = FakeNvml()
    card = CardTelemetry(BARE, nvml)
    nvml.busy_percent, nvml.used, nvml.milliwatts = 87, 3 * 2**30, 412_500
    sample = card.sample()
    assert sample["utilisation_percent"] == 87
    assert sample["memory_used_bytes"] == 3 * 2**30
    assert sample["power_watts"] == 412.5
    assert sample["sm_clock_mhz"] == 1980
    assert sample["ecc_errors"] == 0
    assert "xid" not in sample
    assert not card.broken
    nvml.busy_percent = 3
    assert card.sample()["utilisation_percent"] == 3


def test_readings_that_a_card_does_not_offer_are_left_out() -> None:
    """A consumer card: no ECC, no power reading, no events."""
    nvml = FakeNvml(
        unsupported=(
            "nvmlDeviceGetTotalEccErrors",
            "nvmlDeviceGetPowerUsage",
            "nvmlDeviceGetSupportedEventTypes",
            "nvmlDeviceIsMigDeviceHandle",
        )
    )
    nvml.xids.append(79)
    card = CardTelemetry(BARE, nvml)
    sample = card.sample()
    assert not sample.keys() & {"ecc_errors", "power_watts", "xid"}
    assert sample["temperature_celsius"] == 35
    assert not card.broken


def test_a_partition_reports_its_memory_and_its_cards_rest() -> None:
    nvml = FakeNvml()
    sample = CardTelemetry(MIG_UUID.removeprefix("MIG-"), nvml).sample()
    assert sample["memory_total_bytes"] == nvml.total // 7
    assert sample["temperature_celsius"] == 35


@pytest.mark.parametrize(("xid", "broken"), [(79, True), (48, True), (31, False), (13, False)])
def test_faults_of_a_card_break_it_and_faults_of_programs_do_not(xid: int, broken: bool) -> None:
    nvml = FakeNvml()
    card = CardTelemetry(BARE, nvml)
    nvml.xids.append(xid)
    assert card.sample()["xid"] == xid
    assert bool(card.broken) is broken
    assert "xid" not in card.sample()
    assert bool(card.broken) is broken  # the card stays broken


def test_memory_errors_count_from_the_start() -> None:
    nvml = FakeNvml()
    nvml.uncorrected = 2  # from before the card was reset or its rows were remapped
    card = CardTelemetry(BARE, nvml)
    card.sample()
    assert not card.broken
    nvml.uncorrected = 3
    card.sample()
    assert "memory errors" in card.broken


def test_a_count_that_could_not_be_read_at_first_is_no_error() -> None:
    nvml = FakeNvml(unsupported=("nvmlDeviceGetTotalEccErrors",))
    nvml.uncorrected = 2
    card = CardTelemetry(BARE, nvml)
    nvml.unsupported = ()
    card.sample()
    assert not card.broken
    nvml.uncorrected = 3
    card.sample()
    assert card.broken


def test_a_lost_card_is_broken() -> None:
    nvml = FakeNvml()
    card = CardTelemetry(BARE, nvml)
    nvml.lost = True
    assert card.sample() == {}
    assert "lost" in card.broken.lower()


def test_a_failed_reading_does_not_make_a_card_broken() -> None:
    class FailingPower(FakeNvml):
        def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802 - NVML's name
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)

    card = CardTelemetry(BARE, FailingPower())
    assert "power_watts" not in card.sample()
    assert not card.broken


def test_a_missing_driver_or_card_is_an_error_with_the_reason() -> None:
    with pytest.raises(NoTelemetry, match="Not Found"):
        CardTelemetry(BARE, FakeNvml(installed=False))
    with pytest.raises(NoTelemetry, match="Not Found"):
        CardTelemetry("of-another-machine", FakeNvml())
    assert driver_version(FakeNvml()) == "580.159.04"


def test_the_driver_of_this_machine() -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        with pytest.raises(NoTelemetry, match=str(error)):
            CardTelemetry(BARE)
    else:
        uuid = pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(0))
        assert CardTelemetry(uuid.removeprefix("GPU-")).sample()["memory_total_bytes"] > 2**30
