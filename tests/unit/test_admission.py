"""Admission of calls, and the reason and the time to retry that a refused call gets."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.dispatch.admission import Admission
from serve.dispatch.grants import Grants
from serve.dispatch.protocol import AdmissionDecision, AdmissionRequest, Heartbeat, Pools, Release
from serve.tenants.tenant import Tenant

from ..builders import queued_image, usage_record

P = ("p",)


class AdmissionHarness:
    """Admission and grants joined like in a Dispatcher; each pool has one replica."""

    def __init__(
        self,
        slots: int = 1,
        speed: float = 1.0,
        max_queued: int = 100,
        pools: Pools = P,
        **tenants: Tenant,
    ) -> None:
        self.grants = Grants(session_lease_s=1e9, replica_lease_s=1e9)
        self.grants.set_pools(pools)
        self.admission = Admission(self.grants, max_queued=max_queued)
        others = ["t", "other", "flood", "light", "third", "late", "a", "b", "c"]
        others += [f"other{i}" for i in range(9)]
        self.admission.set_tenants({**dict.fromkeys(others, Tenant()), **tenants}, 0.0)
        self.admission.month_ends = 1000.0
        self.grants.open("s", 0)
        for pool in pools if slots else ():
            self.grants.report_replica(Heartbeat(pool, "r", slots, speed=speed), 0)
        self.count = 0

    def open_call(
        self,
        tenant: str = "t",
        work_s: float = 1.0,
        n: int = 1,
        timeout_s: float = math.inf,
        now: float = 0.0,
        request_id: str = "",
        pools: Pools = P,
        **more: Any,
    ) -> AdmissionDecision:
        self.count += 1
        call = f"c{self.count}"
        images = tuple(queued_image(f"{call}/{i}", pools, work_s, call_id=call) for i in range(n))
        request = AdmissionRequest(
            call, tenant, request_id or call, images, timeout_s, work_s * n, **more
        )
        decision = self.admission.open("s", request, now)
        if not decision.refusal:
            of_job = request.lane == "job"
            for image in images:
                self.grants.submit("s", image, request.flow, 0.0, of_job=of_job)
            self.grants.grant(0.0)
        return decision

    def charge(self, call: str, work_s: float = 1.0, now: float = 0.0, tenant: str = "t") -> None:
        usage = usage_record(call, tenant=tenant, work_s=work_s)
        held = self.admission.hold("s", usage)
        self.admission.spend("s", usage, None, now)
        self.admission.free(tenant, held)


def test_a_refusal_by_the_request_rate_says_when_to_retry() -> None:
    harness = AdmissionHarness(t=Tenant(requests_per_s=2, request_burst=1))
    assert harness.open_call().refusal is None
    refused = harness.open_call()
    assert (refused.refusal, refused.own_limit) == ("rate_limit_exceeded", True)
    assert refused.retry_after_s == pytest.approx(0.5)
    assert harness.open_call(now=0.5).refusal is None
    (status,) = harness.open_call(now=0.6).rate_limits
    assert (status.of, status.limit, status.remaining) == ("requests", 1, 0)


def test_a_call_refused_by_the_budget_uses_request_rate_but_no_work_rate() -> None:
    harness = AdmissionHarness(
        t=Tenant(requests_per_s=1, request_burst=2, monthly_work=5, work_per_s=1)
    )
    assert harness.open_call(work_s=6).refusal == "insufficient_quota"
    account = harness.admission.account("t")
    assert account.requests
    assert account.work
    assert account.requests.remaining(0.0) == pytest.approx(1)
    assert account.work.remaining(0.0) == pytest.approx(10)


def test_the_work_rate_refuses_until_enough_time_has_passed() -> None:
    harness = AdmissionHarness(t=Tenant(work_per_s=1, work_burst=4))
    assert harness.open_call(work_s=3).refusal is None
    refused = harness.open_call(work_s=3)
    assert refused.refusal == "rate_limit_exceeded"
    assert refused.retry_after_s == pytest.approx(2)
    assert harness.open_call(work_s=3, now=2.0).refusal is None


def test_a_tenant_has_at_most_its_number_of_open_requests() -> None:
    harness = AdmissionHarness(t=Tenant(max_requests=2), slots=4)
    assert [harness.open_call().refusal for _ in range(3)] == [None, None, "rate_limit_exceeded"]
    harness.admission.end("s", "c1", 0.0)
    assert harness.open_call().refusal is None
    assert harness.open_call(tenant="other").refusal is None


def test_a_monthly_budget_is_reserved_only_once() -> None:
    harness = AdmissionHarness(t=Tenant(monthly_work=10), slots=300)
    decisions = [harness.open_call(request_id=str(i)) for i in range(200)]
    assert [v.refusal for v in decisions].count(None) == 10
    assert decisions[-1].refusal == "insufficient_quota"
    assert decisions[-1].retry_after_s == 1000
    harness.charge("c1")
    harness.admission.end("s", "c1", 0.0)  # delivered and charged
    assert harness.open_call().refusal == "insufficient_quota"
    harness.admission.end("s", "c2", 0.0)  # failed and not charged
    assert harness.open_call().refusal is None
    harness.admission.begin_month({}, 2000.0)
    # 9 are open.
    assert [harness.open_call().refusal for _ in range(2)] == [
        None,
        "insufficient_quota",
    ]


def test_work_spent_before_a_restart_counts_against_the_budget() -> None:
    harness = AdmissionHarness(t=Tenant(monthly_work=10))
    harness.admission.begin_month({"t": 9.5}, 1000.0)
    assert harness.open_call().refusal == "insufficient_quota"


def test_a_call_is_admitted_with_all_its_images_or_not_at_all() -> None:
    harness = AdmissionHarness(t=Tenant(monthly_work=3))
    assert harness.open_call(n=4).refusal == "insufficient_quota"
    assert harness.open_call(n=3).refusal is None


def test_one_tenant_cannot_fill_the_whole_queue() -> None:
    harness = AdmissionHarness(slots=0, max_queued=10)
    flood = [harness.open_call("flood") for _ in range(20)]
    assert [v.refusal for v in flood].count(None) == 8
    assert (flood[-1].refusal, flood[-1].own_limit) == ("queue_full", True)
    assert harness.open_call("light").refusal is None
    assert harness.open_call("light").refusal is None
    full = harness.open_call("light")
    assert (full.refusal, full.own_limit) == ("queue_full", False)
    assert harness.open_call("third", work_s=8).refusal == "queue_full"  # as much as the flood
    assert harness.open_call("third", work_s=7).refusal is None  # the flood's images are evicted


def test_three_hundred_floods_lock_no_newcomer_out() -> None:
    harness, floods = AdmissionHarness(slots=0, max_queued=1000), [f"flood{i}" for i in range(300)]
    harness.admission.set_tenants(dict.fromkeys(["newcomer", *floods], Tenant()), 0.0)
    for _ in range(10):
        for name in floods:
            harness.open_call(name)
    assert harness.open_call("flood0").refusal == "queue_full"
    decision = harness.open_call("newcomer")
    assert decision.refusal is None


def test_a_tenant_has_at_most_its_amount_of_queued_work() -> None:
    harness = AdmissionHarness(t=Tenant(max_queued_work=2))
    assert harness.open_call(work_s=9).refusal is None  # runs
    assert harness.open_call(work_s=9).refusal is None  # one image may always wait
    refused = harness.open_call(work_s=1)
    assert (refused.refusal, refused.own_limit) == ("queue_full", True)
    assert refused.retry_after_s == pytest.approx(8)


def test_an_unreachable_deadline_says_whether_the_tenants_own_backlog_is_the_reason() -> None:
    harness = AdmissionHarness()
    for _ in range(9):
        harness.open_call("t")
    own = harness.open_call("t", timeout_s=5)
    assert (own.refusal, own.own_limit) == ("deadline_unreachable", True)
    assert own.retry_after_s == pytest.approx(5, abs=1)
    # A tenant without queued images waits for its own only.
    assert harness.open_call("light", timeout_s=5).refusal is None
    for i in range(9):
        harness.open_call(f"other{i}")
    others = harness.open_call("late", timeout_s=5)
    assert (others.refusal, others.own_limit) == ("deadline_unreachable", False)


def test_calls_that_more_replicas_could_have_served_count_as_arriving_work() -> None:
    harness = AdmissionHarness()
    for i in range(9):
        harness.open_call(f"other{i}")
    before, *_ = harness.admission.arrived[P]
    assert harness.open_call("late", timeout_s=5).refusal == "deadline_unreachable"
    assert harness.admission.arrived[P][0] == before + 1
    # Too long on any replica.
    assert harness.open_call("c", work_s=10, timeout_s=5).refusal == "timeout_too_short"
    limited = AdmissionHarness(t=Tenant(work_per_s=1, work_burst=1))
    assert [limited.open_call().refusal for _ in range(2)] == [None, "rate_limit_exceeded"]
    assert harness.admission.arrived[P][0] == before + 1
    assert limited.admission.arrived[P][0] == 1


def test_a_call_that_cannot_meet_its_deadline_even_alone_hears_what_it_takes() -> None:
    refused = AdmissionHarness().open_call(work_s=10, timeout_s=5)
    assert (refused.refusal, refused.retry_after_s) == ("timeout_too_short", None)
    assert refused.eta_s == 10


def test_time_that_has_passed_before_admission_counts_for_the_deadline() -> None:
    """A call that only comes too late is not told that its timeout_s is too short."""
    harness = AdmissionHarness()
    assert harness.open_call(work_s=3, timeout_s=5, waited_s=1.0).refusal is None
    late = AdmissionHarness().open_call(work_s=3, timeout_s=5, waited_s=3.0)
    assert late.refusal == "deadline_unreachable"


def test_slow_images_in_one_pool_refuse_nobody_in_another() -> None:
    harness = AdmissionHarness(pools=("p", "sick"))
    for i in range(25):
        call = f"c{harness.count + 1}"
        assert harness.open_call("flood", pools=("sick",), now=100.0 * i).refusal is None
        harness.charge(call, now=100.0 * i + 10, tenant="flood")
        harness.admission.end("s", call, 100.0 * i + 10)
        harness.grants.release("s", Release(f"{call}/0", 1.0), 100.0 * i + 10)
    for pool, refusal in ("p", None), ("sick", "deadline_unreachable"):
        assert harness.open_call("a", pools=(pool,), now=2500.0).refusal is None  # runs
        assert harness.open_call("b", pools=(pool,), timeout_s=3, now=2500.0).refusal == refusal


def test_without_a_replica_no_wait_is_predicted() -> None:
    decision = AdmissionHarness(slots=0).open_call(timeout_s=0.1)
    assert (decision.refusal, decision.eta_s) == (None, None)


def test_the_eta_includes_the_wait_for_a_slot() -> None:
    harness = AdmissionHarness(slots=2, speed=2.0)
    assert harness.open_call(work_s=4).eta_s == pytest.approx(2)
    assert harness.open_call(work_s=4).eta_s == pytest.approx(4)  # two share the replica
    assert harness.open_call(work_s=4).eta_s == pytest.approx(6)


def test_the_eta_is_that_of_the_pool_that_will_generate_the_image() -> None:
    """The slower pool is preferred and gets the image while it has a free slot."""
    grants = Grants(session_lease_s=1e9, replica_lease_s=1e9)
    grants.set_pools(("slow", "fast"))
    admission = Admission(grants, max_queued=100)
    grants.open("s", 0)
    grants.report_replica(Heartbeat("slow", "r", 1, speed=0.5), 0)
    grants.report_replica(Heartbeat("fast", "r", 4, speed=4.0), 0)

    def open_call(call: str) -> float | None:
        image = queued_image(call, ("slow", "fast"), call_id=call)
        decision = admission.open("s", AdmissionRequest(call, "t", call, (image,), 60, 1.0), 0)
        grants.submit("s", image, "t", 0.0)
        grants.grant(0.0)
        return decision.eta_s

    assert [open_call("a"), open_call("b"), open_call("c")] == [2.0, 0.25, 0.5]


def test_request_ids_are_unique_within_a_tenant_only() -> None:
    harness = AdmissionHarness()
    assert harness.open_call("a", request_id="x").refusal is None
    assert harness.open_call("a", request_id="x").refusal == "request_id_in_use"
    assert harness.open_call("b", request_id="x").refusal is None
    found = harness.admission.find("a", "x")
    assert found
    assert found.id == "c1"
    assert harness.admission.find("c", "x") is None
    harness.admission.end("s", "c1", 0.0)
    assert harness.open_call("a", request_id="x").refusal is None


def test_a_call_accepted_before_a_restart_is_admitted_beyond_all_limits() -> None:
    harness = AdmissionHarness(
        t=Tenant(requests_per_s=1, request_burst=1, monthly_work=1), max_queued=1
    )
    for _ in range(3):
        assert harness.open_call(accepted=True).refusal is None
    assert harness.admission.account("t").reserved == 3
    harness.admission.end_session("s", 0.0)
    assert harness.admission.account("t").reserved == 0
    assert harness.admission.open_calls == 0


def test_a_draining_dispatcher_refuses_new_calls_only() -> None:
    harness = AdmissionHarness()
    harness.admission.draining = True
    assert harness.open_call().refusal == "draining"
    assert harness.open_call(accepted=True).refusal is None


class BudgetMachine(RuleBasedStateMachine):
    """Any order of calls, failures, charges and ends: spent and reserved work fit the budget."""

    def __init__(self) -> None:
        super().__init__()
        self.harness = AdmissionHarness(slots=1000, t=Tenant(monthly_work=20))
        self.open: dict[str, float] = {}
        self.spent = 0.0

    @rule(work_s=st.integers(1, 6))
    def open_call(self, work_s: int) -> None:
        decision = self.harness.open_call(work_s=float(work_s))
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
            self.harness.charge(call, work_s)
            self.spent += work_s
        self.harness.admission.end("s", call, 0.0)

    @rule()
    def restart(self) -> None:
        """Declare open calls again to a new Dispatcher that has read the recorded usage."""
        open_, self.open = self.open, {}
        self.harness = AdmissionHarness(slots=1000, t=Tenant(monthly_work=20))
        self.harness.admission.begin_month({"t": self.spent}, 1000.0)
        for work_s in open_.values():
            decision = self.harness.open_call(work_s=work_s, accepted=True)
            self.open[decision.call_id] = work_s

    @invariant()
    def the_account_agrees(self) -> None:
        account = self.harness.admission.account("t")
        assert account.spent == pytest.approx(self.spent)
        assert account.reserved == pytest.approx(sum(self.open.values()))
        assert account.spent + account.reserved <= 20


TestBudgetMachine = BudgetMachine.TestCase
TestBudgetMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# -- jobs -----------------------------------------------------------------------------------------


def test_jobs_take_nothing_of_the_limits_of_requests() -> None:
    limits = Tenant(max_requests=1, max_queued_work=2, requests_per_s=0.001, request_burst=1)
    harness = AdmissionHarness(t=limits)
    for lane in ("job", "batch", "job", "job"):
        assert harness.open_call(work_s=9, lane=lane).refusal is None
    assert harness.open_call(work_s=9).refusal is None
    assert harness.open_call().refusal == "rate_limit_exceeded"


def test_a_job_does_not_count_in_the_forecast_of_a_request_which_comes_before_it() -> None:
    harness = AdmissionHarness(t=Tenant())
    for _ in range(5):
        assert harness.open_call(work_s=10, lane="job").refusal is None
    assert harness.open_call(work_s=1, timeout_s=15).refusal is None
    assert harness.open_call(work_s=1, timeout_s=1.5).refusal == "deadline_unreachable"


def test_a_budget_is_kept_for_accepted_jobs() -> None:
    harness = AdmissionHarness(t=Tenant(monthly_work=10), slots=9)
    admission, account = harness.admission, harness.admission.account("t")
    assert harness.open_call(work_s=6, n=0, lane="acceptance").refusal is None
    account.accepting += 6  # `open_call` counts the work of images only
    assert harness.open_call(work_s=5).refusal == "insufficient_quota"
    admission.end("s", "c1", 0.0)
    assert harness.open_call(work_s=5).refusal == "insufficient_quota"  # not read yet
    admission.hold_for_jobs({"t": 6.0})
    account.accepting = 0.0
    assert harness.open_call(work_s=5).refusal == "insufficient_quota"
    assert harness.open_call(work_s=4).refusal is None
    assert harness.open_call(work_s=6, lane="job").refusal is None  # it was kept for this
    admission.hold_for_jobs({})
    assert harness.open_call(work_s=1, lane="job").refusal == "insufficient_quota"


def test_an_acceptance_is_held_until_its_job_was_read() -> None:
    harness = AdmissionHarness(t=Tenant(monthly_work=10))
    request = AdmissionRequest("c", "t", "r", (), 60.0, 6.0, lane="acceptance")
    assert harness.admission.open("s", request, 0.0).refusal is None
    harness.admission.end("s", "c", 0.0)
    account = harness.admission.account("t")
    assert (account.reserved, account.accepting) == (0.0, 6.0)
    ended = harness.admission.accepted()
    assert harness.admission.accepted() == []
    harness.admission.forget_accepted(ended)
    assert account.accepting == 0.0


def test_a_batch_queues_with_a_part_of_its_tenants_weight() -> None:
    harness = AdmissionHarness(t=Tenant(weight=3.0))
    harness.admission.batch_weight = 0.1
    weight = harness.grants.queue.weight
    weights = [weight(flow) for flow in ("t", "t/batch", "other/batch")]
    assert weights == pytest.approx([3.0, 0.3, 0.1])
