"""What an Ingress refuses by itself: unfinished and wrong requests beyond a tenant's limits."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from serve.api.tenant_gate import MOST_BYTES, TenantGate
from serve.errors import BodyTimeout, InvalidRequest, KeyInvalid, RateLimited
from serve.tenants.keys import TenantAccess

FREE = TenantAccess(())


def fail(gate: TenantGate, access: TenantAccess, error: Exception) -> None:
    with pytest.raises(type(error)), gate.reading("t", access):
        raise error


def test_a_tenant_has_as_many_unfinished_bodies_as_it_may_have_requests() -> None:
    gate, two = TenantGate(), TenantAccess((), max_requests=2)
    with gate.reading("t", two), gate.reading("t", two):
        with pytest.raises(RateLimited) as refused, gate.reading("t", two):
            pass
        assert refused.value.headers["retry-after"] == "2"
        with gate.reading("other", two):
            pass
    with gate.reading("t", two):
        pass


def test_unfinished_bodies_have_a_largest_size_together() -> None:
    gate = TenantGate()
    with gate.reading("t", FREE) as received:
        received(MOST_BYTES)
        with pytest.raises(RateLimited), gate.reading("t", FREE) as more:
            more(1)
        with gate.reading("other", FREE) as more:
            more(MOST_BYTES)
    with gate.reading("t", FREE) as received:
        received(MOST_BYTES)


def test_any_number_of_small_bodies_may_come_at_once() -> None:
    gate = TenantGate()
    with ExitStack() as bodies:
        for _ in range(1000):
            bodies.enter_context(gate.reading("t", FREE))(1000)


def test_wrong_requests_are_limited_by_the_request_rate() -> None:
    now = [0.0]
    gate, slow = TenantGate(lambda: now[0]), TenantAccess((), requests_per_s=0.2)
    for _ in range(2):  # the burst: what the rate allows in ten seconds
        fail(gate, slow, InvalidRequest("wrong"))
    with pytest.raises(RateLimited) as refused, gate.reading("t", slow):
        pass
    assert refused.value.headers["retry-after"] == "6"
    now[0] += 5.01
    with gate.reading("t", slow):  # a right request counts at the Dispatcher
        pass
    fail(gate, slow, BodyTimeout("late"))
    with pytest.raises(RateLimited), gate.reading("t", slow):
        pass


def test_a_revoked_key_and_a_tenant_without_a_rate_count_nothing() -> None:
    gate, slow = TenantGate(), TenantAccess((), requests_per_s=0.2)
    for _ in range(99):
        fail(gate, slow, KeyInvalid("revoked"))
        fail(gate, FREE, InvalidRequest("wrong"))
    with gate.reading("t", slow):
        pass
