"""Refusal of requests beyond a tenant's limits at one Ingress, before their bodies are read.

The Dispatcher decides on requests that are complete and valid, and its decisions hold for all
Ingresses together. Bodies that never end, requests that are never valid, and requests that the
result cache could answer cost an Ingress something before. So each Ingress also bounds a tenant's
requests by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..dispatch.client.refusals import rate_limit_headers, retry_after
from ..dispatch.protocol import RateLimitStatus
from ..dispatch.tenant_account import Gcra
from ..errors import RateLimited
from ..tenants.keys import TenantAccess

MOST_BYTES = 64 * 2**20  # of one tenant's unfinished bodies
RETRY_S = 1.0  # until a tenant with too many unfinished bodies may try again
ON_THE_WAY_S = 0.02  # the Dispatcher counts a request later than this file does


@dataclass(slots=True)
class _Tenant:
    """The unfinished bodies of a tenant, and the rate of its requests."""

    bodies: int = 0
    received: int = 0  # bytes
    requests: Gcra | None = None


class TenantGate:
    """Counts the requests of each tenant at one Ingress, and the bodies that are being read."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tenants: dict[str, _Tenant] = {}

    @contextmanager
    def reading(self, name: str, access: TenantAccess) -> Iterator[Callable[[int], None]]:
        """Count a request of a tenant, and let the tenant send its body in the block.

        Yields a function that is to be called with the size of each part of the body that has
        arrived. This method and that function raise `RateLimited` if the tenant's request rate is
        used up, if the tenant has `max_requests` unfinished bodies, or if these have more than
        `MOST_BYTES` together.
        """
        tenant, received = self._tenants.setdefault(name, _Tenant()), 0
        self._count_request(tenant, access)
        if access.max_requests is not None and tenant.bodies >= max(access.max_requests, 1):
            raise _refusal("you are sending more requests at a time than you may", RETRY_S)

        def receive(size: int) -> None:
            nonlocal received
            received += size
            tenant.received += size
            if tenant.received > MOST_BYTES:
                raise _refusal("you are sending too much at a time", RETRY_S)

        tenant.bodies += 1
        try:
            yield receive
        finally:
            tenant.bodies -= 1
            tenant.received -= received

    def _count_request(self, tenant: _Tenant, access: TenantAccess) -> None:
        if access.requests_per_s is None:
            tenant.requests = None
            return
        now, limits = self._clock(), (access.requests_per_s, access.request_burst)
        requests = tenant.requests = tenant.requests or Gcra(*limits)
        requests.change(*limits, now)
        if wait_s := requests.wait_s(1, now):
            error = _refusal("you have reached your rate limit", wait_s + ON_THE_WAY_S)
            left = RateLimitStatus("requests", requests.burst, 0.0, requests.reset_s(now))
            error.headers |= rate_limit_headers((left,))
            raise error
        requests.take(1, now)


def _refusal(message: str, wait_s: float) -> RateLimited:
    error = RateLimited(f"{message}; try again in {wait_s:.1f} s")
    error.headers = retry_after(wait_s)
    return error
