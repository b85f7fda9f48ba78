"""Rate limits, budgets and forecasts: examples, and any sequence of events."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.dispatch.forecast import (
    RATE_MEMORY_S,
    ArrivalRate,
    ForecastAccuracy,
    TenantDemand,
    wait_s,
)
from serve.dispatch.tenant_account import Gcra, TenantAccount
from serve.tenants.tenant import Tenant


def test_a_burst_then_the_rate() -> None:
    gcra = Gcra(rate=2.0, burst=3.0)
    for _ in range(3):
        assert gcra.wait_s(1, 0.0) == 0
        gcra.take(1, 0.0)
    assert gcra.wait_s(1, 0.0) == pytest.approx(0.5)
    assert gcra.wait_s(1, 0.5) == pytest.approx(0)
    assert gcra.remaining(0.5) == pytest.approx(1)
    assert gcra.reset_s(0.5) == pytest.approx(1)


def test_an_amount_above_the_burst_passes_when_the_whole_burst_is_left() -> None:
    gcra = Gcra(rate=1.0, burst=2.0)
    assert gcra.wait_s(10, 0.0) == 0
    gcra.take(10, 0.0)
    assert gcra.wait_s(1, 0.0) == pytest.approx(9)
    assert gcra.wait_s(10, 0.0) == pytest.approx(10)
    assert gcra.remaining(0.0) == 0


@given(
    rate=st.floats(0.1, 100),
    burst=st.floats(1, 50),
    events=st.lists(st.tuples(st.floats(0, 5), st.floats(0.1, 1)), max_size=60),
)
def test_never_more_than_rate_and_burst_and_the_wait_is_true(
    rate: float, burst: float, events: list[tuple[float, float]]
) -> None:
    gcra, now, taken = Gcra(rate, burst), 0.0, 0.0
    for pause_s, amount in events:
        now += pause_s
        if (late_s := gcra.wait_s(amount, now)) == 0:
            gcra.take(amount, now)
            taken += amount
        else:
            assert gcra.wait_s(amount, now + late_s * 0.99) > 0
            assert gcra.wait_s(amount, now + late_s) < 1e-6
        assert taken <= burst + rate * now + 1e-6


def test_rate_limits_include_the_rest_of_the_budget() -> None:
    account = TenantAccount(
        Tenant(requests_per_s=2, request_burst=4, work_per_s=1, monthly_work=100)
    )
    account.spent, account.reserved = 30.0, 20.0
    assert account.requests
    account.requests.take(1, 0.0)
    found = {s.of: (s.limit, s.remaining, s.reset_s) for s in account.rate_limits(0.0, 999.0)}
    assert found == {
        "requests": (4, 3, 0.5),
        "work": (10, 10, 0),
        "budget": (100, 50, 999),
    }
    assert TenantAccount(Tenant()).rate_limits(0.0, 0.0) == ()


def test_changed_limits_do_not_forget_what_was_used() -> None:
    account = TenantAccount(Tenant(requests_per_s=1, request_burst=2))
    assert account.requests
    for _ in range(2):
        account.requests.take(1, 0.0)
    account.change(Tenant(requests_per_s=1, request_burst=1), 0.0)
    assert account.requests
    assert account.requests.wait_s(1, 0.0) > 0
    account.change(Tenant(), 0.0)
    assert account.requests is None


def test_a_raised_rate_ends_a_wait_sooner() -> None:
    account = TenantAccount(Tenant(requests_per_s=0.1, request_burst=1, work_per_s=1, work_burst=1))
    assert account.requests
    assert account.work
    account.requests.take(1, 0.0)
    account.work.take(591, 0.0)
    assert account.requests.wait_s(1, 0.0) == pytest.approx(10)
    assert account.work.wait_s(1, 0.0) == pytest.approx(591)
    raised = Tenant(requests_per_s=100, request_burst=1, work_per_s=100, work_burst=1)
    account.change(raised, 0.0)
    assert account.requests.wait_s(1, 0.0) == pytest.approx(0.01)
    assert account.work.wait_s(1, 0.0) == pytest.approx(5.91)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"weight": 0}, "weight 0"),
        ({"weight": 1e-4}, "weight 0.0001 must be between"),
        ({"monthly_work": math.nan}, "monthly_work nan"),
        ({"monthly_work": math.inf}, "monthly_work inf"),
        ({"weight": math.inf}, "weight inf"),
        ({"requests_per_s": -1.0}, "requests_per_s -1"),
        ({"request_burst": 5.0}, "request_burst needs requests_per_s"),
        ({"requests_per_s": 1, "request_burst": 0.5}, "request_burst 0.5 must be at least 1"),
        ({"work_burst": 5.0}, "work_burst needs work_per_s"),
        ({"monthly_work": -1}, "monthly_work -1"),
    ],
)
def test_tenants_are_valid_by_construction(values: dict[str, float], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        Tenant(**values)  # type: ignore[arg-type]  # wrong values are the test


def test_a_tenant_may_be_given_nothing() -> None:
    assert Tenant(monthly_work=0, max_requests=0).monthly_work == 0


# -- forecasts ------------------------------------------------------------------------------------


def test_a_tenant_alone_waits_for_its_own_work() -> None:
    assert wait_s(10, 1, [], speed=2) == 5
    assert wait_s(10, 1, [], speed=0) == math.inf


def test_other_tenants_take_their_share_but_no_more_than_their_work() -> None:
    assert wait_s(10, 1, [TenantDemand(1, 4, 0)], speed=1) == pytest.approx(14, rel=0.01)
    assert wait_s(10, 1, [TenantDemand(1, 1000, 0)], speed=1) == 20
    assert wait_s(10, 2, [TenantDemand(1, 1000, 0)], speed=1) == 15


@pytest.mark.parametrize(("tenants", "load"), [(20, 0.9), (100, 0.8), (1000, 0.9), (1000, 0.99)])
def test_many_tenants_may_ask_for_almost_all_capacity(tenants: int, load: float) -> None:
    """A tenant waits for 3 s of work, and arriving work of the others takes part of the speed."""
    others = [TenantDemand(1, 0.0, load / tenants)] * tenants
    assert wait_s(3, 1, others, speed=1) == pytest.approx(3 / (1 - load), rel=0.05)


def test_a_tenant_that_keeps_asking_keeps_its_share() -> None:
    """Another tenant asks for half of the speed all the time."""
    assert wait_s(10, 1, [TenantDemand(1, 0, 0.5)], speed=1) == pytest.approx(20, rel=0.02)
    assert wait_s(10, 1, [TenantDemand(1, 0, 9)], speed=1) == pytest.approx(20)
    assert wait_s(10, 1, [TenantDemand(1, 0, 0.1)], speed=1) == pytest.approx(11.1, rel=0.02)


DEMANDS = st.lists(
    st.builds(TenantDemand, st.floats(0.1, 10), st.floats(0, 100), st.floats(0, 10)), max_size=8
)


@given(own_s=st.floats(0.1, 100), weight=st.floats(0.1, 10), others=DEMANDS)
def test_a_forecast_lies_between_the_time_alone_and_the_time_at_the_tenants_share(
    own_s: float, weight: float, others: list[TenantDemand]
) -> None:
    t = wait_s(own_s, weight, others, speed=1)
    share = weight / (weight + sum(other.weight for other in others))
    assert own_s <= t * 1.01
    assert t <= own_s / share * (1 + 1e-9)
    more = wait_s(own_s, weight, [*others, TenantDemand(1, 5, 1)], speed=1)
    assert more >= t * 0.98  # both are accurate to one hundredth


def test_rates_fade() -> None:
    rate = ArrivalRate()
    assert rate.per_s(5.0) == 0
    for i in range(1000):
        rate.add(0.5, i * 0.1)
    assert rate.per_s(100.0) == pytest.approx(5, rel=0.02)
    assert rate.per_s(100.0 + RATE_MEMORY_S) == pytest.approx(5 / math.e, rel=0.02)


def test_forecasts_learn_their_typical_error_and_the_one_that_is_seldom_exceeded() -> None:
    accuracy = ForecastAccuracy()
    assert (accuracy.expected(2), accuracy.at_most(2)) == (2, 2)
    for i in range(3000):
        accuracy.learn(10.0, 15.0 if i % 20 == 0 else 8.0)
    assert accuracy.expected(1.0) == pytest.approx(0.83, abs=0.1)
    assert accuracy.at_most(1.0) == pytest.approx(1.5, abs=0.25)
    for _ in range(50):
        accuracy.learn(0.0, 1e9)
    assert 2 < accuracy.expected(1.0) <= accuracy.at_most(1.0) <= 4
    accuracy.fade(1500.0)  # without admitted calls nothing is learnt, and errors are forgotten
    assert accuracy.at_most(1.0) < 1.05


def test_overheads_of_small_images_do_not_change_forecasts_of_large_ones() -> None:
    accuracy = ForecastAccuracy()
    for _ in range(100):
        accuracy.learn(0.05, 0.9)
    assert accuracy.at_most(10.0) == 10.0
