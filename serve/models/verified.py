"""The files of this node's checkpoints that have been hashed already, so that each is read once.

A replica verifies the files that it loads. Without a memory, each of 30 replicas would read all
weights of its model a second time, perhaps over a network. So a node keeps the digest of each file,
for as long as the file's size, time of change and inode stay the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ..atomic_file import replace_file

State = tuple[int, int, int]  # size, time of the last change in ns, inode
Digests = dict[str, str]  # path in the folder → SHA-256 in hexadecimal


class VerifiedFiles:
    """The digests of the files of one folder, as this node knows them.

    Processes of a node share them through a file. While one of them hashes, the others wait, and
    then find the digests.
    """

    def __init__(self, folder: Path, memory: Path | None = None) -> None:
        """`memory`: the folder with this node's digests; by default one in the user's cache."""
        self._folder = folder.absolute()
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        root = memory or cache / "octet" / "verified"
        self._file = root / f"{hashlib.sha256(str(self._folder).encode()).hexdigest()[:32]}.json"

    def digests(self, names: Iterable[str], hashed: Callable[[Iterable[str]], Digests]) -> Digests:
        """The digest of each file; `hashed` is called with those that are new or have changed.

        If the node's digests cannot be kept, all files are hashed.
        """
        return self._locked(list(names), hashed)

    def remember(self, digests: Digests) -> None:
        """Keep the digests of files that this process has just hashed or written.

        What was known of these files before is forgotten, even if they look the same.
        """

        def stated(names: Iterable[str]) -> Digests:
            return {name: digests[name] for name in names}

        self._locked(list(digests), stated, anew=True)

    def _locked(
        self, names: list[str], hashed: Callable[[Iterable[str]], Digests], *, anew: bool = False
    ) -> Digests:
        from filelock import FileLock

        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self._file}.lock"):
                return self._digests(names, hashed, anew=anew)
        except OSError:  # such as a disk without room
            return hashed(names)

    def _digests(
        self, names: list[str], hashed: Callable[[Iterable[str]], Digests], *, anew: bool
    ) -> Digests:
        known = {n: found for n, found in self._read().items() if not (anew and n in names)}
        states = {name: self._state(name) for name in names}
        found = {n: known[n][1] for n in names if n in known and known[n][0] == states[n]}
        if new := [name for name in names if name not in found]:
            found |= hashed(new)
            # A file that has changed meanwhile is hashed again the next time.
            kept = {n: (states[n], found[n]) for n in new if self._state(n) == states[n]}
            kept = {**known, **kept}
            text = json.dumps({"folder": str(self._folder), "files": kept})
            replace_file(self._file, text.encode(), mode=0o600)
        return found

    def _state(self, name: str) -> State:
        stat = (self._folder / name).stat()
        return stat.st_size, stat.st_mtime_ns, stat.st_ino

    def _read(self) -> Mapping[str, tuple[State, str]]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            files = json.loads(self._file.read_text(encoding="utf-8"))["files"]
            return {n: ((size, at, inode), d) for n, ((size, at, inode), d) in files.items()}
        return {}
