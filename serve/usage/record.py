"""What a tenant is charged for one image."""

from __future__ import annotations

from typing import Literal, NamedTuple


class UsageRecord(NamedTuple):
    """What a tenant is charged for one image; `call` and `image` together are unique for ever.

    Nothing for one that was drawn before ("hit"), or for another call at the same time ("shared").
    """

    call: str
    image: int
    tenant: str
    request_id: str
    model: str
    precision: str
    size: str
    steps: int
    work_s: float
    outcome: Literal["delivered", "cancelled", "hit", "shared"] = "delivered"
