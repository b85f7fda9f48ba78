"""What an Ingress refuses by itself: a tenant's unfinished and wrong requests, beyond its limits.

The Dispatcher decides on requests that are complete and valid. Bodies that never end and requests
that are never valid do not reach it, so each Ingress bounds them for each tenant. These bounds are
not exact: every Ingress has its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..dispatch.client.refusals import retry_after
from ..dispatch.tenant_account import Gcra
from ..errors import InvalidRequest, KeyInvalid, RateLimited
from ..tenants.keys import TenantAccess
from ..tenants.tenant import BURST_S

MOST_BYTES = 64 * 2**20  # of one tenant's unfinished bodies
RETRY_S = 1.0  # until a tenant with too many unfinished bodies may try again


@dataclass(slots=True)
class _Tenant:
    """The unfinished bodies of a tenant, and the rate of its wrong requests."""

    bodies: int = 0
    received: int = 0  # bytes
    wrong: Gcra | None = None


class TenantGate:
    """Counts the bodies that are being read, and the wrong requests, of each tenant."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tenants: dict[str, _Tenant] = {}

    @contextmanager
    def reading(self, name: str, access: TenantAccess) -> Iterator[Callable[[int], None]]:
        """Let a tenant send a body in the block, which raises an error if the request is wrong.

        Yields a function that is to be called with the size of each part of the body that has
        arrived. This method and that function raise `RateLimited` if the tenant has
        `max_requests` unfinished bodies, if these have more than `MOST_BYTES` together, or if it
        sends more wrong requests than its request rate allows.
        """
        tenant, received = self._tenants.setdefault(name, _Tenant()), 0
        if tenant.wrong and (wait_s := tenant.wrong.wait_s(1, self._clock())):
            raise _refusal("too many of your requests were not valid", wait_s)
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
        except InvalidRequest as error:
            if not isinstance(error, KeyInvalid):
                self._count_wrong(tenant, access.requests_per_s)
            raise
        finally:
            tenant.bodies -= 1
            tenant.received -= received

    def _count_wrong(self, tenant: _Tenant, rate: float | None) -> None:
        if rate is None:
            tenant.wrong = None
            return
        now, burst = self._clock(), max(rate * BURST_S, 1.0)
        tenant.wrong = tenant.wrong or Gcra(rate, burst)
        tenant.wrong.change(rate, burst, now)
        tenant.wrong.take(1, now)


def _refusal(message: str, wait_s: float) -> RateLimited:
    error = RateLimited(f"{message}; try again in {wait_s:.1f} s")
    error.headers = retry_after(wait_s)
    return error
