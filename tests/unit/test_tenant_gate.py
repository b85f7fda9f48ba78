"""Refusal of requests and bodies beyond a tenant's limits at one Ingress."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from serve.api.tenant_gate import MOST_BYTES, TenantGate
from serve.errors import InvalidRequest, RateLimited
from serve.tenants.keys import TenantAccess

FREE = TenantAccess(())


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


def test_every_request_counts_for_the_request_rate() -> None:
    now = [0.0]
    gate, slow = TenantGate(lambda: now[0]), TenantAccess((), requests_per_s=0.2, request_burst=2)
    with pytest.raises(InvalidRequest), gate.reading("t", slow):
        raise InvalidRequest("wrong")
    with gate.reading("t", slow):
        pass
    with pytest.raises(RateLimited) as refused, gate.reading("t", slow):
        pass
    assert refused.value.headers["retry-after-ms"] == "5021"
    assert refused.value.headers["x-ratelimit-limit-requests"] == "2"
    assert refused.value.headers["x-ratelimit-remaining-requests"] == "0"
    with gate.reading("other", slow):
        pass
    now[0] += 5.021
    with gate.reading("t", slow):
        pass


def test_a_raised_rate_counts_at_once() -> None:
    gate = TenantGate(lambda: 0.0)
    with gate.reading("t", TenantAccess((), requests_per_s=0.1)):
        pass
    with gate.reading("t", TenantAccess((), requests_per_s=0.1, request_burst=5)):
        pass
    for _ in range(99):
        with gate.reading("t", FREE):
            pass
