"""Model folders on this node: fetched from the hub or made here, and checked before use.

A *checkpoint* is a folder in diffusers' layout, one sub-folder per component. `octet.json` in it
lists the SHA-256 of every file; it is written when the folder is pulled or quantised, and what it
says is verified each time a replica loads. A folder without it is taken as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..atomic_file import replace_file
from ..settings.models import Source

MANIFEST = "octet.json"
DEFAULT_MODELS_FOLDER = "~/.cache/octet/models"
# Repositories also hold the same weights as single files and in a second 16-bit format.
PULLED = ["model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]
NOT_PULLED = ["*.fp16*", "text_encoders/*"]

Files = dict[str, str]  # path in the folder → SHA-256 in hexadecimal


class CheckpointError(Exception):
    """A checkpoint cannot be had or used; the message says which and what to do."""


def node_folder(source: Source, models_folder: str | None) -> Path:
    """Where a source's files are on this node, or will be once they are pulled."""
    if source.revision is None:
        return Path(source.location)
    folder = Path(models_folder or DEFAULT_MODELS_FOLDER).expanduser()
    return folder / source.location.replace("/", "--") / source.revision


def on_this_node(source: Source, models_folder: str | None) -> bool:
    folder = node_folder(source, models_folder)
    return (folder / (MANIFEST if source.revision else "model_index.json")).is_file()


def open_checkpoint(source: Source, models_folder: str | None, components: Iterable[str]) -> Path:
    """The folder of a source, pulled if it is not there, with these components verified.

    Raises `CheckpointError`.
    """
    folder = pull(source, models_folder)
    verify(folder, components)
    return folder


def pull(source: Source, models_folder: str | None) -> Path:
    """Fetch a hub id's files at its revision into the node's folder, unless they are there.

    Processes that want the same files wait for each other; a broken download is taken up where it
    ended. Raises `CheckpointError`.
    """
    target = node_folder(source, models_folder)
    if on_this_node(source, models_folder):
        return target
    if source.revision is None:
        raise CheckpointError(f"{target}: no model here (no model_index.json)")
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not on_this_node(source, models_folder):
            part = target.with_name(f"{target.name}.part")
            _download(source, part)
            write_manifest(part, {"location": source.location, "revision": source.revision})
            part.rename(target)
    return target


def _download(source: Source, folder: Path) -> None:
    """Files of the hub in a folder, with the digests that the hub gives for its large ones."""
    from huggingface_hub import HfApi, errors, snapshot_download

    location, page = source.location, f"https://huggingface.co/{source.location}"
    try:
        info = HfApi().model_info(location, revision=source.revision, files_metadata=True)
        snapshot_download(
            location,
            revision=source.revision,
            local_dir=folder,
            allow_patterns=PULLED,
            ignore_patterns=NOT_PULLED,
        )
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{location} is gated: accept its licence at {page}, then log in with "
            "`hf auth login` or set HF_TOKEN on every node"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{location}: no such repository, or a private one: set HF_TOKEN if it is yours"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{location} has no revision {source.revision}") from None
    except Exception as error:  # also those of whatever HTTP library the hub client uses
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{location} cannot be fetched: {reason}") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub client's own notes
    stated = {s.rfilename: s.lfs.sha256 for s in info.siblings or [] if s.lfs}
    found = digests(folder, _files(folder))
    for name in found.keys() & stated.keys():
        if found[name] != stated[name]:
            (folder / name).unlink()
            raise CheckpointError(f"{location}: {name} is not what the hub says: pull again")


def write_manifest(folder: Path, made_from: dict[str, Any]) -> None:
    """Note the digests of a folder as it is now."""
    manifest = {"made_from": made_from, "files": digests(folder, _files(folder))}
    replace_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode(), mode=0o644)


def verify(folder: Path, components: Iterable[str] | None = None) -> None:
    """Raise `CheckpointError` if files of these components are not what the manifest says.

    All files if no components are named.
    """
    try:
        stated: Files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: not a manifest") from error
    wanted = ("",) if components is None else tuple(f"{c}/" for c in components)
    mine = {name: digest for name, digest in stated.items() if name.startswith(wanted)}
    there = [name for name in _files(folder) if name.startswith(wanted)]
    odd = mine.keys() ^ set(there)
    if odd:
        state = "missing" if min(odd) in mine else "not in the manifest"
        raise CheckpointError(f"{folder / min(odd)}: {state}")
    for name, digest in digests(folder, there).items():
        if digest != mine[name]:
            raise CheckpointError(
                f"{folder / name}: its SHA-256 is not the manifest's: delete the folder, and pull "
                "or quantise it again"
            )


def digests(folder: Path, names: Iterable[str]) -> Files:
    """SHA-256 of files, several at a time: hashing does not hold Python's lock."""
    names = list(names)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(lambda name: _sha256(folder / name), names), strict=True))


def size_bytes(folder: Path, component: str = "") -> int:
    """Of a component's files, or of all."""
    return sum(path.stat().st_size for path in (folder / component).rglob("*") if path.is_file())


def _files(folder: Path) -> list[str]:
    """Paths in the folder, but for the manifest itself."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in paths)
    return sorted(name for name in names if not name.startswith(MANIFEST))


def _sha256(file: Path) -> str:
    with contextlib.closing(file.open("rb")) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
