"""Stopped images: their slots are given back before the work that they took is known.

When an image is stopped, its Ingress gives the slot back at once. The Generator reports the work
that the image took with its next heartbeat, which may come before or after that.

Time is an argument, in seconds on any steady clock.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from typing import NamedTuple

from ..usage.record import UsageRecord
from .protocol import RunningImage, StoppedImage

UNSETTLED_S = 30.0  # a Generator that has not reported a stopped image by then never will


class UnsettledImage(NamedTuple):
    """An image whose slot was given back, but whose work is not known yet.

    `cancelled`: the charge of the whole image if its client cancelled it; otherwise None.
    """

    since: float
    image: RunningImage
    cancelled: UsageRecord | None


class Settlement:
    """The stopped images, until both their Ingress and their Generator have reported them."""

    def __init__(self) -> None:
        # Both by session and image id.
        self._unsettled: dict[tuple[str, str], UnsettledImage] = {}
        self._reported: dict[tuple[str, str], tuple[float, StoppedImage]] = {}

    def given_back(
        self, session: str, image: RunningImage, cancelled: UsageRecord | None, now: float
    ) -> StoppedImage | None:
        """Note that an Ingress gave a slot back; return the Generator's report if it has come."""
        if report := self._reported.pop((session, image.image_id), None):
            return report[1]
        self._unsettled[session, image.image_id] = UnsettledImage(now, image, cancelled)
        return None

    def reported(self, report: StoppedImage, now: float, *, held: bool) -> UnsettledImage | None:
        """Note a Generator's report; return the image if its slot was given back before.

        `held`: whether a session still holds the image's slot. The report is then kept.
        """
        key = report.lease.session, report.lease.image_id
        unsettled = self._unsettled.pop(key, None)
        if unsettled is None and held:
            self._reported[key] = now, report
        return unsettled

    def give_up(self, now: float) -> list[UnsettledImage]:
        """Return the images that no Generator has reported for `UNSETTLED_S`; forget them."""
        late = [key for key, image in self._unsettled.items() if now - image.since > UNSETTLED_S]
        for key, (since, _) in list(self._reported.items()):
            if now - since > UNSETTLED_S:
                del self._reported[key]
        return [self._unsettled.pop(key) for key in late]
