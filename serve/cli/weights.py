"""`octet models`, `pull`, `convert` and `quantize`: the weights of the models on this node."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from ..models.checkpoints import node_folder, on_this_node, size_bytes, verify
from ..models.checkpoints import pull as fetch
from ..models.structures import pull_structure
from ..settings.application import Settings
from ..settings.file import load_settings
from ..settings.models import Model, Source
from .exit_codes import UsageError
from .terminal import AsJson, ConfigFile, ConfigOption, console, existing, working

SINGLE_FILE = re.compile(r"([^@]+@[0-9a-f]{40})/(.+\.safetensors)")


def models(config: ConfigFile, as_json: AsJson = False) -> None:
    """List the models that CONFIG serves, and whether this node has their weights."""
    settings = load_settings(config)
    found: list[dict[str, Any]] = [
        {
            "model": model.id,
            "part": part,
            "location": source.location,
            "revision": source.revision,
            "bytes": size_bytes(node_folder(source, settings.models_folder))
            if on_this_node(source, settings.models_folder)
            else None,
        }
        for model in settings.models
        for part, source in _sources(settings, model).items()
    ]
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    table = Table("model", "part", Column("weights", overflow="fold"), "on this node")
    for row in found:
        missing = f"no: octet pull --config {config}" if row["revision"] else "no such model folder"
        size = missing if row["bytes"] is None else f"{row['bytes'] / 2**30:.2f} GiB"
        revision = f"@{row['revision'][:8]}" if row["revision"] else ""
        table.add_row(row["model"], row["part"], row["location"] + revision, size)
    Console().print(table)


def pull(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Model to download: HUB/ID@REVISION, one file of it as "
            "HUB/ID@REVISION/FILE.safetensors, or a model's id in --config. Default: all models of "
            "--config.",
        ),
    ] = None,
    config: ConfigOption = None,
    structures: Annotated[
        bool,
        typer.Option(
            "--structures",
            help="Download only the small files that describe the models of --config. A node "
            "without Generators needs no more.",
        ),
    ] = False,
) -> None:
    """Download weights from the hub into this node's models folder, so that replicas start fast.

    A single file is also converted to a folder; name that folder as `source` in the settings.
    """
    settings = load_settings(config) if config else None
    models_folder = settings.models_folder if settings else None
    if structures:
        if settings is None or model:
            raise UsageError("--structures: give --config and no MODEL")
        for served_model in settings.models:
            there = pull_structure(served_model.source, models_folder)
            console.print(f"{served_model.id}: {there}", highlight=False)
        return
    if model and (file := SINGLE_FILE.fullmatch(model)):
        from ..engine.single_file import pull_single_file

        _print_pulled(model, pull_single_file(source_of(file[1]), file[2], models_folder))
        return
    if settings and model is None:
        sources = {s for m in settings.models for s in _sources(settings, m).values()}
    elif settings and model in (served := {m.id: m for m in settings.models}):
        sources = set(_sources(settings, served[model]).values())
    elif model:
        sources = {source_of(model)}
    else:
        raise UsageError("no model is given: name MODEL, or a settings file with --config")
    for source in sorted(sources, key=lambda s: s.location):
        folder = fetch(source, models_folder)
        verify(folder)
        _print_pulled(source.location, folder)


def _print_pulled(what: str, folder: Path) -> None:
    gib = size_bytes(folder) / 2**30
    console.print(f"{what}: {gib:.2f} GiB in {folder}", highlight=False)


def convert(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A model as one safetensors file, such as sd3.5_large.safetensors.",
            callback=existing,
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to create, in diffusers' layout.")
    ],
) -> None:
    """Convert a single-file checkpoint, in 16 bit or in scaled FP8, to a folder that Octet loads.

    OUT holds the transformer, the VAE and the scheduler in bfloat16. Text encoders in FILE are left
    out: the setting `text_encoders` names their own source.
    """
    with working(f"converting {file}"):
        from ..engine.single_file import convert

        convert(file, out)
    _print_pulled(file.name, out)


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model to convert: a folder, or HUB/ID@REVISION.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to create for the FP8 checkpoint.")
    ],
    models_folder: Annotated[
        str | None, typer.Option(help="Folder where this node keeps downloaded weights.")
    ] = None,
    adaln_8_bit: Annotated[
        bool,
        typer.Option(
            "--adaln-8-bit",
            help="Store the AdaLN layers in 8 bit too, for pools whose settings have adaln_8_bit.",
        ),
    ] = False,
) -> None:
    """Write an FP8 checkpoint of MODEL to the folder OUT, and print sizes and load times.

    OUT is complete: it loads without MODEL.
    """
    folder = fetch(source_of(model), models_folder)
    with working(f"quantising {model}"):
        from ..engine.fp8_checkpoint import compare, quantize
        from ..engine.precision import RECIPES

        recipe = RECIPES["fp8-adaln8" if adaln_8_bit else "fp8"]
        began = time.perf_counter()
        quantize(folder, out, recipe)
        took_s = time.perf_counter() - began
        rows = compare(folder, out, recipe)
    table = Table("", "16-bit", "FP8", title=f"{out}: written in {took_s:.1f} s")
    for name, before, after in rows:
        table.add_row(name, before, after)
    Console().print(table)


def _sources(settings: Settings, model: Model) -> dict[str, Source]:
    """The source of the weights of each part of a model: its pools and its text encoders."""
    (encoder,) = [e for e in settings.text_encoders if e.id == model.text_encoder]
    pools = {f"pool {pool.precision}": pool.source or model.source for pool in model.pools}
    return {**pools, f"text encoder {encoder.id}": encoder.source}


def source_of(model: str) -> Source:
    """Parse a folder or HUB/ID@REVISION. Raises `SettingsError` if the text is neither."""
    location, _, revision = model.partition("@")
    if Path(model).is_dir():
        location, revision = str(Path(model).resolve()), ""
    try:
        return Source(location=location, revision=revision or None)
    except ValueError:
        if location.endswith((".yaml", ".yml")):
            raise UsageError(f"'{model}' is a settings file: octet pull --config {model}") from None
        raise UsageError(
            f"'{model}' is neither a folder nor HUB/ID@REVISION with the 40 hexadecimal digits of "
            "a commit (one file of it: HUB/ID@REVISION/FILE.safetensors)"
        ) from None
