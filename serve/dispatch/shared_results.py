"""Equal calls at different Ingresses: one generates the images, and the others wait for them.

A call may name its *result key*, under which its images will be in the result cache that all
Ingresses share. The first open call with a key is the key's *leader*. Calls of other Ingresses with
the same key *follow* it: they queue no images, and are told when the leader's Ingress has finished
with the key. Then they look into the result cache. Equal calls at the same Ingress never get here.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .protocol import AdmissionRequest, ResultFinished


@dataclass(slots=True)
class _Key:
    """The session of a key's leader, and what its followers are told at the end.

    `leader`: None right after a start of the Dispatcher, if the leader's Ingress has not reported.
    """

    leader: str | None = None
    followers: list[ResultFinished] = field(default_factory=list)


class SharedResults:
    """The result keys of all open calls."""

    def __init__(self) -> None:
        self._keys: dict[str, _Key] = {}

    def must_follow(self, session: str, request: AdmissionRequest) -> bool:
        """Return whether an equal call of another session is open already."""
        key = self._keys.get(request.result_key)
        return key is not None and key.leader != session

    def admitted(self, session: str, request: AdmissionRequest) -> None:
        """Note an admitted call, which leads or follows."""
        if not request.result_key:
            return
        key = self._keys.setdefault(request.result_key, _Key())
        if request.follows:
            key.followers.append(ResultFinished(session, request.call_id))
        else:
            key.leader = session

    def finish(self, session: str, result_key: str) -> list[ResultFinished]:
        """End a key if this session leads it; return what its followers are to be told."""
        key = self._keys.get(result_key)
        if key is None or key.leader != session:
            return []
        return self._keys.pop(result_key).followers

    def end_session(self, session: str) -> list[ResultFinished]:
        """End all keys that a session leads; return what their followers are to be told."""
        led = [result_key for result_key, key in self._keys.items() if key.leader == session]
        return [told for result_key in led for told in self.finish(session, result_key)]

    def end_leaderless(self) -> list[ResultFinished]:
        """End the keys whose leader is gone since the start; return what followers are told."""
        gone = [result_key for result_key, key in self._keys.items() if key.leader is None]
        return [told for result_key in gone for told in self._keys.pop(result_key).followers]
