"""The `octet` command: its command line, and the commands about models and settings."""

from __future__ import annotations

import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ..errors import SettingsError
from ..models.checkpoints import node_folder, on_this_node, size_bytes, verify
from ..models.checkpoints import pull as fetch
from ..models.structures import pull_structure
from ..settings.application import Settings
from ..settings.file import changed_values, load_settings
from ..settings.models import Model, Source
from ..tenants.files import read_keys, read_tenants
from . import bench, compile_pools, doctor, k8s, node, plan, serve, simulate, tenant, top, usage
from .terminal import ConfigFile, ConfigOption, Debug, console, readable_errors

SINGLE_FILE = re.compile(r"([^@]+@[0-9a-f]{40})/(.+\.safetensors)")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"octet {version('octet-serve')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Stable Diffusion 3.5 in FP8 for many tenants on Ray Serve."""


app.command("serve")(serve.serve)
app.command("demo")(serve.demo)
app.command("plan")(plan.plan)
app.command("bench")(bench.bench)
app.command("compile")(compile_pools.compile_pools)
app.command("doctor")(doctor.doctor)
app.command("simulate")(simulate.simulate)
app.add_typer(tenant.app, name="tenant")
app.add_typer(k8s.app, name="k8s")
app.add_typer(node.app, name="node")
app.command("usage")(usage.usage)
app.command("top")(top.top)


@app.command()
def models(config: ConfigFile, debug: Debug = False) -> None:
    """List the models that CONFIG serves, and whether this node has their weights."""
    with readable_errors(debug):
        settings = load_settings(config)
        table = Table("model", "part", Column("weights", overflow="fold"), "on this node")
        for model in settings.models:
            for part, source in _sources(settings, model).items():
                folder = node_folder(source, settings.models_folder)
                there = on_this_node(source, settings.models_folder)
                missing = "no: octet pull" if source.revision else "no such model folder"
                size = f"{size_bytes(folder) / 2**30:.2f} GiB" if there else missing
                revision = f"@{source.revision[:8]}" if source.revision else ""
                table.add_row(model.id, part, source.location + revision, size)
        Console().print(table)


@app.command()
def pull(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Model to download: HUB/ID@REVISION, one file of it as "
            "HUB/ID@REVISION/FILE.safetensors, or a model's id in --config. Default: all models of "
            "--config."
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
    debug: Debug = False,
) -> None:
    """Download weights from the hub into this node's models folder, so that replicas start fast.

    A single file is also converted to a folder; name that folder as `source` in the settings.
    """
    with readable_errors(debug):
        settings = load_settings(config) if config else None
        models_folder = settings.models_folder if settings else None
        if structures:
            if settings is None or model:
                raise SettingsError("--structures: give --config and no MODEL")
            for served_model in settings.models:
                there = pull_structure(served_model.source, models_folder)
                console.print(f"{served_model.id}: {there}", highlight=False)
            return
        if model and (file := SINGLE_FILE.fullmatch(model)):
            from ..engine.single_file import pull_single_file

            _print_pulled(model, pull_single_file(_source(file[1]), file[2], models_folder))
            return
        if settings and model is None:
            sources = {s for m in settings.models for s in _sources(settings, m).values()}
        elif settings and model in (served := {m.id: m for m in settings.models}):
            sources = set(_sources(settings, served[model]).values())
        elif model:
            sources = {_source(model)}
        else:
            raise SettingsError("no model is given: name MODEL, or a settings file with --config")
        for source in sorted(sources, key=lambda s: s.location):
            folder = fetch(source, models_folder)
            verify(folder)
            _print_pulled(source.location, folder)


def _print_pulled(what: str, folder: Path) -> None:
    gib = size_bytes(folder) / 2**30
    console.print(f"{what}: {gib:.2f} GiB in {folder}", highlight=False)


@app.command()
def convert(
    file: Annotated[
        Path,
        typer.Argument(help="A model as one safetensors file, such as sd3.5_large.safetensors."),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to create, in diffusers' layout.")],
    debug: Debug = False,
) -> None:
    """Convert a single-file checkpoint, in 16 bit or in scaled FP8, to a folder that Octet loads.

    OUT holds the transformer, the VAE and the scheduler in bfloat16. Text encoders in FILE are left
    out: the setting `text_encoders` names their own source.
    """
    with readable_errors(debug), console.status("converting"):
        from ..engine.single_file import convert

        convert(file, out)
    _print_pulled(file.name, out)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Model to convert: a folder, or HUB/ID@REVISION.")],
    out: Annotated[Path, typer.Argument(help="Folder to create for the FP8 checkpoint.")],
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
    debug: Debug = False,
) -> None:
    """Write an FP8 checkpoint of MODEL to the folder OUT, and print sizes and load times.

    OUT is complete: it loads without MODEL.
    """
    with readable_errors(debug):
        folder = fetch(_source(model), models_folder)
        with console.status("quantising"):
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


@app.command("check-config")
def check_config(config: ConfigFile, debug: Debug = False) -> None:
    """Check CONFIG and the OCTET_* environment variables without starting anything.

    Prints the pools, and every value that differs from its default with the place where it is set.
    """
    with readable_errors(debug):
        settings, changed = load_settings(config), changed_values(config)
        if settings.auth == "keys":
            read_tenants(Path(settings.tenants_folder).expanduser())
            read_keys(Path(settings.tenants_folder).expanduser())
    table = Table("model", "pool", "replicas", "slots", "GPU each", "CPU each")
    for model in settings.models:
        for pool in model.pools:
            row = (
                model.id,
                " on ".join(filter(None, (pool.precision, pool.card))),
                pool.replicas,
                pool.slots,
                f"{pool.num_gpus:g}",
                f"{pool.num_cpus:g}",
            )
            table.add_row(*map(str, row))
    Console().print(table)
    values = Table(
        Column("key", overflow="fold"),
        Column("value", overflow="fold"),
        Column("set in", overflow="fold"),
    )
    for key, value, place in changed:
        values.add_row(escape(key), escape(str(value)), escape(place))
    Console().print(values)
    console.print(f"{config}: ok", style="green", highlight=False)


def _sources(settings: Settings, model: Model) -> dict[str, Source]:
    """The source of the weights of each part of a model: its pools and its text encoders."""
    (encoder,) = [e for e in settings.text_encoders if e.id == model.text_encoder]
    pools = {f"pool {pool.precision}": pool.source or model.source for pool in model.pools}
    return {**pools, f"text encoder {encoder.id}": encoder.source}


def _source(model: str) -> Source:
    """Parse a folder or HUB/ID@REVISION. Raises `SettingsError` if the text is neither."""
    location, _, revision = model.partition("@")
    if Path(model).is_dir():
        location, revision = str(Path(model).resolve()), ""
    try:
        return Source(location=location, revision=revision or None)
    except ValueError:
        raise SettingsError(
            f"'{model}' is neither a folder nor HUB/ID@REVISION with the 40 hexadecimal digits of "
            "a commit (one file of it: HUB/ID@REVISION/FILE.safetensors)"
        ) from None


def main() -> None:
    app()
