"""The usage record: what a tenant is charged for one image.

Pure: standard library only.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class UsageRecord(NamedTuple):
    """One image of one call; `call` and `image` together are unique for ever.

    `call` is the call's id, `image` the image's index in it. `work_s` is what the tenant is
    charged, in seconds of a reference replica: nothing for an image that came from the result cache
    ("hit") or was generated for another call at the same time ("shared").
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
