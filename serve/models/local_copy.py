"""Copies of weights on a disk of the node, in front of a volume that all nodes share.

Every replica that starts reads all weights of its model. From a shared volume these are tens of
gigabytes over the network for each start. With a folder on the node's own disk, one replica of the
node copies the files there, and hashes them on the way, so that each byte is read from the volume
once. All later starts on the node read the copy.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..atomic_file import replace_file
from .verified import Digests, VerifiedFiles

CHUNK_BYTES = 16 * 2**20
KEPT_FREE = 0.15  # part of the disk: Kubernetes evicts pods from a node whose disk is 90 % full

log = logging.getLogger("ray.serve")


class WrongDigest(Exception):
    """A file is not the one that the manifest describes; `args[0]` is its name."""


def local_copy(folder: Path, manifest: str, stated: Digests, root: Path) -> Path:
    """Copy files of a checkpoint to this node's disk if they are not there; return their folder.

    `manifest`: the name of the checkpoint's manifest, which is copied too. `stated`: the digests of
    the files that are wanted. `root`: the folder on the node's disk. While one process copies, the
    others of the node wait. Returns `folder` itself, with a warning in the log, if the disk has no
    room for the copy or cannot be written. Raises `WrongDigest` if a file differs from its digest,
    and `OSError` if a file of `folder` cannot be read.
    """
    from filelock import FileLock

    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    target = root / f"{folder.name}-{name}"
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # such as a read-only disk
        log.warning("no copies of weights: %s; reading %s", error, folder)
        return folder
    with FileLock(f"{target}.lock"):
        for part in target.rglob("*.part"):  # of a process that was killed
            part.unlink()
        missing = [name for name in stated if not _is_copy(target / name, folder / name)]
        needed = sum((folder / name).stat().st_size for name in missing)
        disk = shutil.disk_usage(root)
        if needed > disk.free - KEPT_FREE * disk.total:
            log.warning(
                "%s has no room for %.1f GiB of weights: reading %s", root, needed / 2**30, folder
            )
            return folder
        copied = dict(zip(missing, _copied(folder, target, missing), strict=True))
        if wrong := [name for name, digest in copied.items() if digest != stated[name]]:
            for name in wrong:
                (target / name).unlink()
            raise WrongDigest(wrong[0])
        text = (folder / manifest).read_bytes()
        if not (target / manifest).exists() or (target / manifest).read_bytes() != text:
            replace_file(target / manifest, text, mode=0o644)
        VerifiedFiles(target).remember(copied)
    return target


def _is_copy(copy: Path, original: Path) -> bool:
    """Return whether a file has been copied since its original last changed."""
    try:
        there, found = copy.stat(), original.stat()
    except FileNotFoundError:
        return False
    return there.st_size == found.st_size and there.st_mtime_ns == found.st_mtime_ns


def _copied(folder: Path, target: Path, names: Iterable[str]) -> list[str]:
    """Copy files, several at a time; return their SHA-256 in hexadecimal, in order."""

    def copy(name: str) -> str:
        original, part = folder / name, target / f"{name}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with original.open("rb", buffering=0) as source, part.open("wb") as out:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
        found = original.stat()
        os.utime(part, ns=(found.st_atime_ns, found.st_mtime_ns))
        part.rename(target / name)
        return digest.hexdigest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(copy, names))
