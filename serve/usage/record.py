"""The usage record: what a tenant is charged for one image; and what it has used of its limits.

Pure: standard library only.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class UsageRecord(NamedTuple):
    """The charge to a tenant for one image of one call.

    `call` is the call's id, `image` the image's index in it. Apart from a reversal, both together
    are unique for ever. `work_s` is the charge, in seconds of a reference replica. The charge is 0
    for an image that came from the result cache ("hit") or that was generated for another call at
    the same time
    ("shared"). A "reversed" record takes back the charge of the image's earlier record, so its
    charge is negative. `key_id`: the id of the API key that asked for the image; "" without keys.
    `preset`: the preset by which the image was cheaper; "" without one.
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
    outcome: Literal["delivered", "cancelled", "hit", "shared", "reversed"] = "delivered"
    key_id: str = ""
    preset: str = ""

    def reversal(self) -> UsageRecord:
        """The record that takes this charge back."""
        return self._replace(outcome="reversed", work_s=-self.work_s)


class Used(NamedTuple):
    """The use of a tenant at one cluster: requests and work since the cluster's start.

    `open`: its requests that are open now.
    """

    requests: float
    work_s: float
    open: int
