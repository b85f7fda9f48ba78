"""Which calls are admitted, and what those that are not hear."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.dispatch.admission import Admission
from serve.dispatch.grants import Grants
from serve.dispatch.protocol import AdmissionDecision, AdmissionRequest, Heartbeat
from serve.tenants.tenant import Tenant

from ..builders import queued_image, usage_record

P = ("p",)


class Desk:
    """Admission and grants as a Dispatcher joins them; one replica with `slots`."""

    def __init__(
        self, slots: int = 1, speed: float = 1.0, max_queued: int = 100, **tenants: Tenant
    ) -> None:
        self.grants = Grants(P, session_lease_s=1e9, replica_lease_s=1e9)
        self.admission = Admission(self.grants, max_queued=max_queued)
        others = ["t", "other", "flood", "light", "third", "late", "a", "b", "c"]
        others += [f"other{i}" for i in range(9)]
        self.admission.set_tenants({**dict.fromkeys(others, Tenant()), **tenants})
        self.admission.month_ends = 1000.0
        self.grants.open("s", 0)
        if slots:
            self.grants.report_replica(Heartbeat("p", "r", slots, speed=speed), 0)
        self.count = 0

    def ask(
        self,
        tenant: str = "t",
        work_s: float = 1.0,
        n: int = 1,
        timeout_s: float = math.inf,
        now: float = 0.0,
        request_id: str = "",
        **more: Any,
    ) -> AdmissionDecision:
        self.count += 1
        call = f"c{self.count}"
        images = tuple(queued_image(f"{call}/{i}", P, work_s, call_id=call) for i in range(n))
        request = AdmissionRequest(
            call, tenant, request_id or call, images, timeout_s, work_s * n, **more
        )
        decision = self.admission.open("s", request, now)
        if not decision.refusal:
            for image in images:
                self.grants.submit("s", image, tenant, 0.0)
            self.grants.grant()
        return decision

    def pay(self, call: str, work_s: float = 1.0, now: float = 0.0, tenant: str = "t") -> None:
        usage = usage_record(call, tenant=tenant, work_s=work_s)
        held = self.admission.hold("s", usage)
        self.admission.spend("s", usage, None, now)
        self.admission.free(tenant, held)


def test_request_rate_comes_first_and_says_when() -> None:
    desk = Desk(t=Tenant(requests_per_s=2, request_burst=1))
    assert desk.ask().refusal is None
    refused = desk.ask()
    assert (refused.refusal, refused.own_limit) == ("rate_limit_exceeded", True)
    assert refused.retry_after_s == pytest.approx(0.5)
    assert desk.ask(now=0.5).refusal is None
    (status,) = desk.ask(now=0.6).rate_limits
    assert (status.of, status.limit, status.remaining) == ("requests", 1, 0)


def test_a_request_that_is_refused_later_has_used_its_place_in_the_rate_but_no_work() -> None:
    desk = Desk(t=Tenant(requests_per_s=1, request_burst=2, monthly_work=5, work_per_s=1))
    assert desk.ask(work_s=6).refusal == "insufficient_quota"
    account = desk.admission.account("t")
    assert account.requests
    assert account.work
    assert account.requests.remaining(0.0) == pytest.approx(1)
    assert account.work.remaining(0.0) == pytest.approx(10)


def test_work_rate() -> None:
    desk = Desk(t=Tenant(work_per_s=1, work_burst=4))
    assert desk.ask(work_s=3).refusal is None
    refused = desk.ask(work_s=3)
    assert (refused.refusal, refused.retry_after_s) == ("rate_limit_exceeded", pytest.approx(2))
    assert desk.ask(work_s=3, now=2.0).refusal is None


def test_open_requests() -> None:
    desk = Desk(t=Tenant(max_requests=2), slots=4)
    assert [desk.ask().refusal for _ in range(3)] == [None, None, "rate_limit_exceeded"]
    desk.admission.end("s", "c1", 0.0)
    assert desk.ask().refusal is None
    assert desk.ask(tenant="other").refusal is None


def test_a_budget_is_promised_once() -> None:
    desk = Desk(t=Tenant(monthly_work=10), slots=300)
    decisions = [desk.ask(request_id=str(i)) for i in range(200)]
    assert [v.refusal for v in decisions].count(None) == 10
    assert decisions[-1].refusal == "insufficient_quota"
    assert decisions[-1].retry_after_s == 1000
    desk.pay("c1")
    desk.admission.end("s", "c1", 0.0)  # delivered: paid
    assert desk.ask().refusal == "insufficient_quota"
    desk.admission.end("s", "c2", 0.0)  # failed: not paid
    assert desk.ask().refusal is None
    desk.admission.begin_month({}, 2000.0)
    assert [desk.ask().refusal for _ in range(2)] == [None, "insufficient_quota"]  # 9 are open


def test_spent_before_a_restart_counts() -> None:
    desk = Desk(t=Tenant(monthly_work=10))
    desk.admission.begin_month({"t": 9.5}, 1000.0)
    assert desk.ask().refusal == "insufficient_quota"


def test_a_call_is_all_or_nothing() -> None:
    desk = Desk(t=Tenant(monthly_work=3))
    assert desk.ask(n=4).refusal == "insufficient_quota"
    assert desk.ask(n=3).refusal is None


def test_the_queue_as_a_whole_and_a_tenants_part_of_it() -> None:
    desk = Desk(slots=0, max_queued=10)
    flood = [desk.ask("flood") for _ in range(20)]
    assert [v.refusal for v in flood].count(None) == 8
    assert (flood[-1].refusal, flood[-1].own_limit) == ("queue_full", True)
    assert desk.ask("light").refusal is None
    assert desk.ask("light").refusal is None
    full = desk.ask("third")
    assert (full.refusal, full.own_limit) == ("queue_full", False)


def test_queued_work() -> None:
    desk = Desk(t=Tenant(max_queued_work=2))
    assert desk.ask(work_s=9).refusal is None  # runs
    assert desk.ask(work_s=9).refusal is None  # one may always wait
    refused = desk.ask(work_s=1)
    assert (refused.refusal, refused.own_limit) == ("queue_full", True)
    assert refused.retry_after_s == pytest.approx(8)


def test_a_deadline_behind_ones_own_backlog_is_429_and_behind_others_503() -> None:
    desk = Desk()
    for _ in range(9):
        desk.ask("t")
    own = desk.ask("t", timeout_s=5)
    assert (own.refusal, own.own_limit) == ("deadline_unreachable", True)
    assert own.retry_after_s == pytest.approx(5, abs=1)
    assert desk.ask("light", timeout_s=5).refusal is None  # it waits for its own alone
    for i in range(9):
        desk.ask(f"other{i}")
    others = desk.ask("late", timeout_s=5)
    assert (others.refusal, others.own_limit) == ("deadline_unreachable", False)


def test_what_more_replicas_could_have_answered_counts_as_arriving() -> None:
    desk = Desk()
    for i in range(9):
        desk.ask(f"other{i}")
    before, _ = desk.admission.arrived[P]
    assert desk.ask("late", timeout_s=5).refusal == "deadline_unreachable"
    assert desk.admission.arrived[P][0] == before + 1
    assert desk.ask("c", work_s=10, timeout_s=5).refusal == "deadline_unreachable"  # anywhere
    limited = Desk(t=Tenant(work_per_s=1, work_burst=1))
    assert [limited.ask().refusal for _ in range(2)] == [None, "rate_limit_exceeded"]
    assert desk.admission.arrived[P][0] == before + 1
    assert limited.admission.arrived[P][0] == 1


def test_what_takes_longer_by_itself_need_not_be_asked_again() -> None:
    refused = Desk().ask(work_s=10, timeout_s=5)
    assert (refused.refusal, refused.retry_after_s) == ("deadline_unreachable", None)


def test_without_a_replica_nothing_is_foretold() -> None:
    decision = Desk(slots=0).ask(timeout_s=0.1)
    assert (decision.refusal, decision.eta_s) == (None, None)


def test_eta_of_one_that_runs_at_once_and_of_one_that_waits() -> None:
    desk = Desk(slots=2, speed=2.0)
    assert desk.ask(work_s=4).eta_s == pytest.approx(2)
    assert desk.ask(work_s=4).eta_s == pytest.approx(4)  # two share the replica
    assert desk.ask(work_s=4).eta_s == pytest.approx(6)


def test_eta_is_of_the_pool_that_will_draw_it() -> None:
    """The preferred one, slower, while it has room."""
    grants = Grants(("slow", "fast"), session_lease_s=1e9, replica_lease_s=1e9)
    admission = Admission(grants, max_queued=100)
    grants.open("s", 0)
    grants.report_replica(Heartbeat("slow", "r", 1, speed=0.5), 0)
    grants.report_replica(Heartbeat("fast", "r", 4, speed=4.0), 0)

    def ask(call: str) -> float | None:
        image = queued_image(call, ("slow", "fast"), call_id=call)
        decision = admission.open("s", AdmissionRequest(call, "t", call, (image,), 60, 1.0), 0)
        grants.submit("s", image, "t", 0.0)
        grants.grant()
        return decision.eta_s

    assert [ask("a"), ask("b"), ask("c")] == [2.0, 0.25, 0.5]


def test_ids_belong_to_a_tenant() -> None:
    desk = Desk()
    assert desk.ask("a", request_id="x").refusal is None
    assert desk.ask("a", request_id="x").refusal == "request_id_in_use"
    assert desk.ask("b", request_id="x").refusal is None
    found = desk.admission.find("a", "x")
    assert found
    assert found.id == "c1"
    assert desk.admission.find("c", "x") is None
    desk.admission.end("s", "c1", 0.0)
    assert desk.ask("a", request_id="x").refusal is None


def test_what_was_accepted_before_is_taken_whatever_the_limits_say() -> None:
    desk = Desk(t=Tenant(requests_per_s=1, request_burst=1, monthly_work=1), max_queued=1)
    for _ in range(3):
        assert desk.ask(accepted=True).refusal is None
    assert desk.admission.account("t").reserved == 3
    desk.admission.end_session("s", 0.0)
    assert desk.admission.account("t").reserved == 0
    assert desk.admission.open_calls == 0


def test_draining() -> None:
    desk = Desk()
    desk.admission.draining = True
    assert desk.ask().refusal == "draining"
    assert desk.ask(accepted=True).refusal is None


class Budget(RuleBasedStateMachine):
    """However calls come, fail, are paid for and end: never more is promised than there is."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk(slots=1000, t=Tenant(monthly_work=20))
        self.open: dict[str, float] = {}
        self.spent = 0.0

    @rule(work_s=st.integers(1, 6))
    def ask(self, work_s: int) -> None:
        decision = self.desk.ask(work_s=float(work_s))
        fits = self.spent + sum(self.open.values()) + work_s <= 20
        assert (decision.refusal is None) == fits
        if fits:
            self.open[decision.call_id] = float(work_s)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), delivered=st.booleans())
    def end(self, data: st.DataObject, delivered: bool) -> None:
        call = data.draw(st.sampled_from(list(self.open)))
        work_s = self.open.pop(call)
        if delivered:
            self.desk.pay(call, work_s)
            self.spent += work_s
        self.desk.admission.end("s", call, 0.0)

    @rule()
    def restart(self) -> None:
        """What is open is declared anew to a Dispatcher that has read the usage."""
        open_, self.open = self.open, {}
        self.desk = Desk(slots=1000, t=Tenant(monthly_work=20))
        self.desk.admission.begin_month({"t": self.spent}, 1000.0)
        for work_s in open_.values():
            decision = self.desk.ask(work_s=work_s, accepted=True)
            self.open[decision.call_id] = work_s

    @invariant()
    def the_account_agrees(self) -> None:
        account = self.desk.admission.account("t")
        assert account.spent == pytest.approx(self.spent)
        assert account.reserved == pytest.approx(sum(self.open.values()))
        assert account.spent + account.reserved <= 20


TestBudget = Budget.TestCase
TestBudget.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
