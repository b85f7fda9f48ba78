"""Checkpoints on this node: pulled from the hub or made here, and verified before use.

A *checkpoint* is a folder in diffusers' layout, with one sub-folder per component. Its manifest,
`octet.json`, lists the SHA-256 of every file. The manifest is written when the folder is pulled or
quantised. Each replica that loads a component verifies its files against the manifest. A folder
without a manifest is used as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..atomic_file import replace_file
from ..settings.models import Source
from .local_copy import WrongDigest, local_copy
from .verified import Digests, VerifiedFiles

log = logging.getLogger("ray.serve")

Timed = Callable[[str], contextlib.AbstractContextManager[None]]  # measures a phase by its name

MANIFEST = "octet.json"
DEFAULT_MODELS_FOLDER = "~/.cache/octet/models"
EXAMPLE_PROMPTS = "example_prompts.json"
# What is pulled. Repositories also hold the same weights as single files and in a second 16-bit
# format; these are left out.
PULLED = [
    "model_index.json",
    EXAMPLE_PROMPTS,
    "*/*.json",
    "*/*.txt",
    "*/*.model",
    "*/*.safetensors",
]
NOT_PULLED = ["*.fp16*", "text_encoders/*"]


class CheckpointError(Exception):
    """A checkpoint cannot be fetched or used; the message names it and says what to do."""


def read_json(file: Path) -> dict[str, Any]:
    """Read a component's configuration. Raises `CheckpointError` if it cannot be read."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    return found


def node_folder(source: Source, models_folder: str | None) -> Path:
    """The folder of a source's files on this node, whether or not they have been pulled."""
    if source.revision is None:
        return Path(source.location)
    folder = Path(models_folder or DEFAULT_MODELS_FOLDER).expanduser()
    return folder / source.location.replace("/", "--") / source.revision


def on_this_node(source: Source, models_folder: str | None) -> bool:
    """Return whether the files of a source are on this node."""
    folder = node_folder(source, models_folder)
    return (folder / (MANIFEST if source.revision else "model_index.json")).is_file()


def open_checkpoint(
    source: Source,
    models_folder: str | None,
    components: Iterable[str],
    local_folder: str | None = None,
    timed: Timed = lambda _: contextlib.nullcontext(),
) -> Path:
    """Return a folder with the verified `components` of a source, after pulling it if needed.

    `local_folder`: a folder on a disk of this node, to which the components are copied first if
    they have a manifest. `timed`: measures the phases `pull`, `copy` and `verify`. Raises
    `CheckpointError` if the source cannot be pulled or copied, or its files differ from the
    manifest.
    """
    components = tuple(components)
    with timed("pull"):
        folder = pull(source, models_folder)
    if local_folder and (folder / MANIFEST).is_file():
        root = Path(local_folder).expanduser()
        with timed("copy"):
            copy = _local(folder, components, root)
        with timed("verify"):
            try:
                verify(copy, components)
                return copy
            except CheckpointError as error:
                if copy == folder:
                    raise
                log.warning("%s: copying it again", error)
                shutil.rmtree(copy)
        with timed("copy"):
            folder = _local(folder, components, root)
    with timed("verify"):
        verify(folder, components)
    return folder


def _local(folder: Path, components: tuple[str, ...], root: Path) -> Path:
    """A copy of a checkpoint's components on this node's disk."""
    wanted = tuple(f"{component}/" for component in components)
    stated = {name: digest for name, digest in _stated(folder).items() if name.startswith(wanted)}
    stated |= {name: digest for name, digest in _stated(folder).items() if "/" not in name}
    try:
        return local_copy(folder, MANIFEST, stated, root)
    except WrongDigest as error:
        raise _wrong_digest(folder / str(error)) from None
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be copied to {root}: {error}") from None


def _wrong_digest(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file}: its SHA-256 is not the one in the manifest: delete the folder, and pull or "
        "quantise it again"
    )


def _stated(folder: Path) -> Digests:
    """The digests in a folder's manifest.

    Raises `FileNotFoundError` without a manifest, and `CheckpointError` if it is none.
    """
    try:
        found: Digests = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: not a manifest") from error
    return found


def pull(source: Source, models_folder: str | None) -> Path:
    """Return the folder of a source, after downloading its files from the hub if needed.

    Processes that pull the same source wait for each other. An interrupted download continues where
    it ended. Raises `CheckpointError` if the download fails, or if the source is a folder without a
    model.
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
            files = _download(source, part)
            made_from = {"location": source.location, "revision": source.revision}
            write_manifest(part, made_from, files)
            part.rename(target)
            VerifiedFiles(target).remember(files)
    return target


def download_file(source: Source, name: str, folder: Path) -> Path:
    """Download the file `name` of a hub repository into a folder; returns its path.

    Raises `CheckpointError` if the download fails, or if the repository has no such file.
    """
    from huggingface_hub import hf_hub_download

    info = _information(source)
    if name not in _names(info):
        raise CheckpointError(f"{source.location} has no file {name}. {_single_files(info)}")
    with _explained(source):
        hf_hub_download(source.location, name, revision=source.revision, local_dir=folder)
    _check(source, info, folder, digests(folder, [name]))
    return folder / name


def _download(source: Source, folder: Path) -> Digests:
    """Download a source into a folder, and check its large files against the hub's digests.

    Returns the digests of all files. Raises `CheckpointError` if the download fails or a digest
    differs.
    """
    from huggingface_hub import snapshot_download

    info = _information(source)
    with _explained(source):
        snapshot_download(
            source.location,
            revision=source.revision,
            local_dir=folder,
            allow_patterns=PULLED,
            ignore_patterns=NOT_PULLED,
        )
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # state of the hub client
    names = _files(folder)
    if not names:
        raise CheckpointError(
            f"{source.location} holds no model in diffusers' layout. {_single_files(info)}"
        )
    found = digests(folder, names)
    _check(source, info, folder, found)
    return found


def _information(source: Source) -> Any:
    """Ask the hub about a repository: returns its files, with their sizes and digests."""
    from huggingface_hub import HfApi

    with _explained(source):
        return HfApi().model_info(source.location, revision=source.revision, files_metadata=True)


def _names(info: Any) -> list[str]:
    return [sibling.rfilename for sibling in info.siblings or []]


def _single_files(info: Any) -> str:
    """A sentence that names the files of a repository that may be whole models."""
    names = [n for n in _names(info) if n.endswith(".safetensors") and "text_encoder" not in n]
    if not names:
        return "It has no safetensors file either."
    return "If one of these files is a whole model, pull it as HUB/ID@REVISION/FILE: " + ", ".join(
        names
    )


def _check(source: Source, info: Any, folder: Path, found: Digests) -> None:
    """Compare digests of files with those that the hub states; delete a file that differs."""
    stated = {s.rfilename: s.lfs.sha256 for s in info.siblings or [] if s.lfs}
    for name, digest in found.items():
        if digest != stated.get(name, digest):
            (folder / name).unlink()
            raise CheckpointError(
                f"{source.location}: the SHA-256 of {name} is not the one that the hub states: "
                "pull again"
            )


@contextlib.contextmanager
def _explained(source: Source) -> Iterator[None]:
    """Turn errors of the hub's client into `CheckpointError`s that say what to do."""
    from huggingface_hub import errors

    location, page = source.location, f"https://huggingface.co/{source.location}"
    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{location} is gated: accept its licence at {page}, then log in with "
            "`hf auth login` or set HF_TOKEN on every node"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{location}: the hub has no such repository, or it is private: set HF_TOKEN if it is "
            "yours"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{location} has no revision {source.revision}") from None
    except Exception as error:  # includes errors of the HTTP library that the hub client uses
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{location} cannot be fetched: {reason}") from error


def write_manifest(
    folder: Path, made_from: dict[str, Any], files: Digests | None = None
) -> Digests:
    """Write the manifest of a folder as it is now; returns the digests of its files.

    `made_from`: where its files come from. `files`: their digests, if they are known already.
    """
    files = files or digests(folder, _files(folder))
    manifest = {"made_from": made_from, "files": files}
    replace_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode(), mode=0o644)
    return files


def verify(folder: Path, components: Iterable[str] | None = None) -> None:
    """Raise `CheckpointError` if the files of these components differ from the manifest.

    Without `components`, all files are verified. A folder without a manifest passes. A file that
    this node has verified before is not read again unless it has changed.
    """
    try:
        stated = _stated(folder)
    except FileNotFoundError:
        return
    wanted = ("",) if components is None else tuple(f"{c}/" for c in components)
    expected = {name: digest for name, digest in stated.items() if name.startswith(wanted)}
    present = [name for name in _files(folder) if name.startswith(wanted)]
    differing = expected.keys() ^ set(present)
    if differing:
        state = "missing" if min(differing) in expected else "not in the manifest"
        raise CheckpointError(f"{folder / min(differing)}: {state}")
    found = VerifiedFiles(folder).digests(present, lambda names: digests(folder, names))
    for name, digest in found.items():
        if digest != expected[name]:
            raise _wrong_digest(folder / name)


def digests(folder: Path, names: Iterable[str]) -> Digests:
    """The SHA-256 of each file, by name.

    The files are hashed in threads, because hashing releases Python's global lock.
    """
    names = list(names)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(lambda name: _sha256(folder / name), names), strict=True))


def size_bytes(folder: Path, component: str = "") -> int:
    """Bytes of the files of one component, or of the whole folder if `component` is ""."""
    return sum(path.stat().st_size for path in (folder / component).rglob("*") if path.is_file())


def _files(folder: Path) -> list[str]:
    """The sorted paths of all files in a folder, but for the manifest itself."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in paths)
    return sorted(name for name in names if not name.startswith(MANIFEST))


def _sha256(file: Path) -> str:
    with contextlib.closing(file.open("rb")) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
