"""Tests of when a Generator reports to the Dispatcher."""

from serve.dispatch.protocol import Heartbeat, Lease, StoppedImage
from serve.engine.reporting import Reporting

BEAT = Heartbeat("p", "r", 4)


def told() -> Reporting:
    """A Generator that has just reported at the time 100, and is to do so again in 30 s."""
    reporting = Reporting()
    assert reporting.is_due(BEAT, [], 100.0)  # it has never reported
    reporting.told(BEAT, 30.0, 100.0)
    return reporting


def test_the_next_heartbeat_is_sent_when_the_dispatcher_wants_it() -> None:
    reporting = told()
    assert not reporting.is_due(BEAT, [], 114.9)
    assert reporting.is_due(BEAT, [], 130.0)


def test_generators_that_begin_together_do_not_report_together() -> None:
    together = [told() for _ in range(300)]
    due = [sum(one.is_due(BEAT, [], at) for one in together) for at in (115.0, 120.0, 125.0, 130.0)]
    assert due[0] == 0
    assert 50 < due[1] < 150 < due[2] < 250
    assert due[3] == 300


def test_what_the_dispatcher_knows_or_predicts_is_no_news() -> None:
    assert not told().is_due(BEAT._replace(running_work_s=9.0, speed=1.05), [], 101.0)


def test_other_slots_another_speed_a_fault_and_a_stopped_image_are_reported_at_once() -> None:
    assert told().is_due(BEAT._replace(slots=1), [], 101.0)
    assert told().is_due(BEAT._replace(speed=0.8), [], 101.0)
    assert told().is_due(BEAT._replace(fault="Xid 79"), [], 101.0)
    stopped = StoppedImage(Lease("s", "i", "p", "r"), 3, 1.5)
    assert told().is_due(BEAT, [stopped], 101.0)


def test_a_new_dispatcher_is_told_at_once() -> None:
    reporting = told()
    before = reporting.forgotten_times
    reporting.forgotten()
    assert reporting.is_due(BEAT, [], 101.0)
    assert reporting.forgotten_times > before  # an answer that comes now is the old one's
