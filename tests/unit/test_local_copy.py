"""Tests of copies of weights on the node's own disk."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve.models.checkpoints import CheckpointError, open_checkpoint, write_manifest
from serve.settings.models import Source

PARTS = "transformer", "vae"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A checkpoint of three components with a manifest."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "shared" / "model"
    for part in (*PARTS, "text_encoder"):
        (folder / part).mkdir(parents=True)
        (folder / part / "weights").write_bytes(part.encode() * 1000)
    (folder / "model_index.json").write_text("{}")
    write_manifest(folder, {})
    return Source(location=str(folder))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file of the shared folder was opened."""
    opened: Counter[str] = Counter()
    original = Path.open

    def opening(self: Path, *arguments: Any, **more: Any) -> Any:
        if "shared" in self.parts and self.name == "weights":
            opened[self.parent.name] += 1
        return original(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", opening)
    return opened


def test_thirty_starts_read_each_byte_of_the_volume_once(
    source: Source, read: Counter[str], tmp_path: Path
) -> None:
    local = str(tmp_path / "disk")

    def start(_: int) -> Path:
        return open_checkpoint(source, None, PARTS, local)

    with ThreadPoolExecutor(30) as starts:
        (folder,) = set(starts.map(start, range(30)))
    assert folder.is_relative_to(local)
    assert read == {"transformer": 1, "vae": 1}
    assert (folder / "vae" / "weights").read_bytes() == b"vae" * 1000
    assert (folder / "model_index.json").is_file()
    assert not (folder / "text_encoder").exists()
    assert not list(folder.rglob("*.part"))


def test_a_changed_file_is_copied_again(source: Source, tmp_path: Path) -> None:
    local = str(tmp_path / "disk")
    folder = open_checkpoint(source, None, PARTS, local)
    original = Path(source.location)
    (original / "vae" / "weights").write_bytes(b"new")
    write_manifest(original, {})
    assert open_checkpoint(source, None, PARTS, local) == folder
    assert (folder / "vae" / "weights").read_bytes() == b"new"


def test_a_damaged_file_is_named_and_not_kept(source: Source, tmp_path: Path) -> None:
    damaged = Path(source.location) / "vae" / "weights"
    damaged.write_bytes(b"damaged")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"{damaged}: its SHA-256 is not the one"):
            open_checkpoint(source, None, PARTS, str(tmp_path / "disk"))


def test_a_full_disk_is_left_alone(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    usage = SimpleNamespace(total=100_000, free=16_000)  # less than 15 % would stay free
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    folder = open_checkpoint(source, None, PARTS, str(tmp_path / "disk"))
    assert str(folder) == source.location
    assert "has no room for" in caplog.text


def test_a_folder_without_a_manifest_is_used_as_it_is(source: Source, tmp_path: Path) -> None:
    folder = Path(source.location)
    (folder / "octet.json").unlink()
    assert open_checkpoint(source, None, PARTS, str(tmp_path / "disk")) == folder


def test_a_copy_that_was_interrupted_is_made_again(source: Source, tmp_path: Path) -> None:
    local = str(tmp_path / "disk")
    folder = open_checkpoint(source, None, PARTS, local)
    (folder / "vae" / "weights").rename(folder / "vae" / "weights.part")
    os.truncate(folder / "vae" / "weights.part", 5)
    assert open_checkpoint(source, None, PARTS, local) == folder
    assert (folder / "vae" / "weights").read_bytes() == b"vae" * 1000
    shutil.rmtree(folder)
    assert open_checkpoint(source, None, PARTS, local) == folder


def test_a_damaged_copy_is_made_again(source: Source, tmp_path: Path) -> None:
    local = str(tmp_path / "disk")
    folder = open_checkpoint(source, None, PARTS, local)
    weights = folder / "vae" / "weights"
    state = weights.stat()
    weights.write_bytes(b"VAE" * 1000)
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))  # as after a power cut
    shutil.rmtree(tmp_path / "cache")
    assert open_checkpoint(source, None, PARTS, local) == folder
    assert weights.read_bytes() == b"vae" * 1000


def test_a_disk_that_cannot_be_written_is_left_alone(source: Source, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = open_checkpoint(source, None, PARTS, str(tmp_path / "file" / "disk"))
    assert str(folder) == source.location
