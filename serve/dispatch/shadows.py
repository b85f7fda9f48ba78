"""Shadows: images that are generated a second time, in otherwise idle capacity, to compare them.

A shadow belongs to no tenant, waits in no queue and takes no slot. It runs only when its pool is
idle, and so is every other pool with a replica on the same cards (without cards: on the same
nodes). It is stopped as soon as an image arrives in one of these pools, or a replica of its own
pool is to be removed. At worst that image waits for one denoising step, or one decode.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from dataclasses import dataclass

from .grants import Grants
from .protocol import Lease, QueuedImage, ShadowGranted, ShadowStopped


@dataclass(slots=True)
class _Shadow:
    """A shadow of a session; `pool`, `replica`: where it runs, None while it waits."""

    session: str
    image: QueuedImage
    pool: str | None = None
    replica: str = ""


class Shadows:
    """The shadows of all sessions, in the order in which they were asked for."""

    def __init__(self, grants: Grants) -> None:
        self._grants = grants
        self._shadows: dict[tuple[str, str], _Shadow] = {}  # by session and image id

    def ask(self, session: str, image: QueuedImage) -> None:
        """Let a shadow wait until one of its pools is idle."""
        self._shadows[session, image.id] = _Shadow(session, image)

    def release(self, session: str, image_id: str) -> None:
        """Forget a shadow that is done or no longer wanted; does nothing for another image."""
        self._shadows.pop((session, image_id), None)

    def end_session(self, session: str) -> None:
        """Forget the shadows of a session."""
        self._shadows = {key: one for key, one in self._shadows.items() if key[0] != session}

    def holds(self, lease: Lease) -> bool:
        """Return whether a lease is that of a shadow which may run."""
        shadow = self._shadows.get((lease.session, lease.image_id))
        return shadow is not None and (shadow.pool, shadow.replica) == lease[2:4]

    def stop(self) -> list[ShadowStopped]:
        """Stop the shadows whose pool others need, or is losing a replica.

        Call this after every grant.
        """
        needed = [
            shadow
            for shadow in self._shadows.values()
            if shadow.pool and (self._needed(shadow.pool) or self._leaving(shadow.pool))
        ]
        for shadow in needed:
            self.release(shadow.session, shadow.image.id)
        return [ShadowStopped(shadow.session, shadow.image.id) for shadow in needed]

    def begin(self, now: float) -> list[ShadowGranted]:
        """Begin the shadows that can run, one in each pool."""
        found = []
        taken = {shadow.pool for shadow in self._shadows.values()}
        for shadow in self._shadows.values():
            idle = (pool for pool in shadow.image.pools if pool not in taken)
            if shadow.pool is None and (pool := next(filter(self._is_idle, idle), None)):
                shadow.pool, shadow.replica = pool, self._grants.idlest(pool, now)
                taken.add(pool)
                found.append(ShadowGranted(shadow.session, shadow.image.id, pool, shadow.replica))
        return found

    def _is_idle(self, pool: str) -> bool:
        there = self._grants.free_slots(pool) > 0 and not self._leaving(pool)
        return there and not self._needed(pool)

    def _leaving(self, pool: str) -> bool:
        """Return whether a replica of a pool is about to go; a shadow must not hold it up."""
        return self._grants.staying(pool).replicas < self._grants.living(pool)

    def _needed(self, pool: str) -> bool:
        """Return whether anything runs or waits beside a pool's replicas."""
        grants, places = self._grants, self._places(pool)
        return any(
            (grants.running_in(other) or grants.queue.waits_for(other))
            and (other == pool or places & self._places(other))
            for other in grants.pools
        )

    def _places(self, pool: str) -> set[tuple[str, str]]:
        """The nodes and cards of a pool's replicas."""
        return {(one.node, one.card) for one in self._grants.replicas(pool)}
