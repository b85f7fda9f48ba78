"""Tests of the memory of verified files: each file of a node is hashed once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serve.models.checkpoints import CheckpointError, digests, verify, write_manifest
from serve.models.verified import Digests, VerifiedFiles


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with a manifest."""
    found = tmp_path / "model"
    (found / "vae").mkdir(parents=True)
    (found / "vae" / "weights").write_bytes(b"weights")
    (found / "vae" / "config.json").write_text("{}")
    write_manifest(found, {})
    return found


@pytest.fixture
def hashed(folder: Path) -> tuple[Callable[[Iterable[str]], Digests], list[str]]:
    """A function that hashes files slowly, and the names of the files that it has hashed."""
    seen: list[str] = []

    def hash_slowly(names: Iterable[str]) -> Digests:
        names = list(names)
        seen.extend(names)
        time.sleep(0.02)
        return digests(folder, names)

    return hash_slowly, seen


NAMES = ["vae/config.json", "vae/weights"]


def test_thirty_replicas_that_start_together_hash_each_file_once(
    folder: Path, tmp_path: Path, hashed: tuple[Callable[[Iterable[str]], Digests], list[str]]
) -> None:
    work, seen = hashed
    start = threading.Barrier(30)

    def replica(_: int) -> Digests:
        start.wait()
        return VerifiedFiles(folder, tmp_path / "memory").digests(NAMES, work)

    with ThreadPoolExecutor(30) as pool:
        found = list(pool.map(replica, range(30)))
    assert sorted(seen) == NAMES
    assert all(each == digests(folder, NAMES) for each in found)


def test_only_changed_and_new_files_are_hashed_again(
    folder: Path, tmp_path: Path, hashed: tuple[Callable[[Iterable[str]], Digests], list[str]]
) -> None:
    work, seen = hashed
    memory = VerifiedFiles(folder, tmp_path / "memory")
    memory.digests(NAMES[:1], work)
    memory.digests(NAMES, work)
    assert seen == NAMES
    stat = (folder / "vae" / "weights").stat()
    (folder / "vae" / "weights").write_bytes(b"WEIGHTS")  # the same size
    os.utime(folder / "vae" / "weights", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert memory.digests(NAMES, work) == digests(folder, NAMES)
    other = folder / "vae" / "other"
    other.write_bytes(b"OTHERS!")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    other.rename(folder / "vae" / "weights")  # the same size and time, another inode
    assert memory.digests(NAMES, work) == digests(folder, NAMES)
    assert seen == [*NAMES, "vae/weights", "vae/weights"]


def test_a_verified_file_that_changes_is_found(folder: Path) -> None:
    verify(folder)
    (folder / "vae" / "weights").write_bytes(b"WEIGHTS")
    with pytest.raises(CheckpointError, match="SHA-256"):
        verify(folder)


@pytest.mark.parametrize("content", ["", "[]", '{"files": {"vae/weights": 3}}'])
def test_an_unreadable_memory_is_made_anew(
    folder: Path,
    tmp_path: Path,
    content: str,
    hashed: tuple[Callable[[Iterable[str]], Digests], list[str]],
) -> None:
    work, seen = hashed
    memory = tmp_path / "memory"
    VerifiedFiles(folder, memory).digests(NAMES, work)
    (file,) = memory.glob("*.json")
    file.write_text(content)
    for _ in range(2):
        VerifiedFiles(folder, memory).digests(NAMES, work)
    assert seen == 2 * NAMES


def test_without_a_place_for_the_memory_all_files_are_hashed(
    folder: Path, tmp_path: Path, hashed: tuple[Callable[[Iterable[str]], Digests], list[str]]
) -> None:
    work, seen = hashed
    (tmp_path / "file").touch()
    for _ in range(2):
        VerifiedFiles(folder, tmp_path / "file" / "memory").digests(NAMES, work)
    assert seen == 2 * NAMES
