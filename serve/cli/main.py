"""The `octet` command: its command line, and `octet serve` with its signals."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ..errors import SettingsError
from ..launch import RunningApplication, run_application
from ..models.checkpoints import node_folder, on_this_node, size_bytes, verify
from ..models.checkpoints import pull as fetch
from ..models.structures import pull_structure
from ..settings.application import Settings
from ..settings.file import changed_values, load_settings
from ..settings.models import Model, Source
from ..tenants.files import TENANTS, read_keys, read_tenants
from . import bench, compile_pools, doctor, k8s, node, plan, simulate, tenant, top, usage
from .doctor_settings import bucket_fault
from .terminal import ConfigFile, ConfigOption, Debug, complain, console, readable_errors

STOP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
APPLY = signal.SIGUSR1
LOOK_S = 1.0
SINGLE_FILE = re.compile(r"([^@]+@[0-9a-f]{40})/(.+\.safetensors)")
DEMO_SETTINGS = Path(__file__).parents[2] / "examples" / "laptop.yaml"

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
def serve(config: ConfigFile, debug: Debug = False) -> None:
    """Serve the models of CONFIG in the foreground, on a Ray cluster started for them.

    Ctrl-C or SIGTERM finishes running images and stops; SIGUSR1 applies changed settings.
    """
    with readable_errors(debug):
        _serve(lambda: load_settings(config))


@app.command()
def demo(
    port: Annotated[int | None, typer.Option(help="Port to listen on; default: 8000.")] = None,
    debug: Debug = False,
) -> None:
    """Serve the small demo model on this machine, in the foreground. Needs no GPU."""
    with readable_errors(debug):
        if port is not None and not 1 <= port <= 65535:
            raise SettingsError(f"port {port} must be between 1 and 65535")
        environ = {**os.environ, **({} if port is None else {"OCTET_HTTP__PORT": str(port)})}
        _serve(lambda: load_settings(DEMO_SETTINGS, environ))


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


def _serve(read: Callable[[], Settings]) -> None:
    """Serve until Ctrl-C, SIGTERM or the end of the terminal.

    `read` returns the current settings. SIGUSR1 reads and applies them again.
    """
    events: SimpleQueue[int] = SimpleQueue()  # its `put` may be called in a signal handler
    before = {number: signal.getsignal(number) for number in (*STOP, APPLY)}
    nohup = before[signal.SIGHUP] is signal.SIG_IGN
    stop = [number for number in STOP if not (nohup and number == signal.SIGHUP)]

    def on_stop(handler: Any) -> None:
        for number in stop:
            signal.signal(number, handler)

    def interrupt(*_: object) -> None:
        on_stop(signal.SIG_IGN)  # a second Ctrl-C must not interrupt the clean-up
        raise KeyboardInterrupt

    on_stop(interrupt)
    signal.signal(APPLY, signal.SIG_IGN)
    try:
        settings = read()
        _warn_about_access(settings)
        if fault := bucket_fault(settings):
            complain(f"octet: {fault}\nimages for URLs wait on disk until the bucket can be used")
        with run_application(settings, _news_printer()) as octet:
            _announce(octet)
            for number in (*stop, APPLY):
                signal.signal(number, lambda number, _: events.put(number))
            print_changes = _change_printer(octet)
            while (event := _next_signal(events)) in (None, APPLY):
                if event:
                    _apply(octet, read)
                print_changes()
            signal.signal(APPLY, signal.SIG_IGN)
            on_stop(interrupt)
            console.print("finishing the images that are running; Ctrl-C again drops them")
            try:
                octet.drain()
            finally:
                on_stop(signal.SIG_IGN)
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    console.print("stopped")


def _warn_about_access(settings: Settings) -> None:
    """Warn if anyone may generate images without a key, or if there are no tenants yet.

    Raises `SettingsError` for tenants that cannot be read, unless the Dispatcher has a copy of the
    last valid ones.
    """
    if settings.auth != "keys":
        host = settings.http.host
        complain(f"auth is {settings.auth}: anyone who reaches {host} may generate images")
        return
    try:
        if not read_tenants(Path(settings.tenants_folder).expanduser()):
            complain("there are no tenants yet: add one with octet tenant add")
    except SettingsError as error:
        if not (Path(str(settings.usage_path)).expanduser() / TENANTS).exists():
            raise
        complain(f"{error}\noctet: serving the last valid tenants")


def _apply(octet: RunningApplication, read: Callable[[], Settings]) -> None:
    """Apply the current settings to the running application.

    `read` returns the current settings. On an error the application runs on with the old settings.
    """
    before = octet.settings
    try:
        settings = read()
        names = Settings.model_fields
        changed = [name for name in names if getattr(before, name) != getattr(settings, name)]
        if not changed:
            console.print("settings are as before")
            return
        starting = octet.apply(settings)
    except Exception as error:  # also any of Ray's errors while its controller restarts
        complain(f"octet: settings not applied: {error}")
    else:
        _warn_about_access(settings)
        note = f": replicas of {', '.join(starting)} start; /ready shows when they are there"
        text = f"settings applied ({', '.join(changed)}){note if starting else ''}"
        console.print(text, soft_wrap=True, highlight=False)


def _next_signal(events: SimpleQueue[int]) -> int | None:
    """The next signal, or None if none comes within `LOOK_S` seconds."""
    try:
        return events.get(timeout=LOOK_S)
    except Empty:
        return None


def _change_printer(octet: RunningApplication) -> Callable[[], None]:
    """A function that prints new autoscaling decisions, and faults of the tenants' files.

    A decision says how many replicas a pool should have, and why. Each is printed once.
    """
    decisions: dict[str, str] = {}
    faults: dict[str, str] = {}

    def print_changes() -> None:
        nonlocal faults
        if (status := octet.known_status()) is None:
            return
        for pool, reason in ((name, pool.reason) for name, pool in status.pools.items()):
            if reason and reason != decisions.get(pool):
                console.print(f"{pool}: {reason}", style="dim", highlight=False, soft_wrap=True)
            decisions[pool] = reason
        for file, fault in status.faults.items():
            if fault != faults.get(file):
                complain(f"octet: keeping the last valid {file}: {fault}")
        for file in faults.keys() - status.faults.keys():
            console.print(f"{file} is valid again", highlight=False)
        faults = status.faults

    return print_changes


def _news_printer() -> Callable[[str], None]:
    """A function that prints a line of news, unless it is the same as the line before."""
    last = ""

    def print_news(news: str) -> None:
        nonlocal last
        if news != last:
            console.print(news, style="dim", highlight=False, soft_wrap=True)
        last = news

    return print_news


def _announce(octet: RunningApplication) -> None:
    """Print the playground's address and a curl command that generates an image."""
    url, model = octet.url, octet.settings.models[0]
    prompt = "a futuristic cityscape at sunset"
    key = ' -H "authorization: Bearer $OCTET_KEY"' if octet.settings.auth == "keys" else ""
    out = Console(highlight=False, soft_wrap=True)
    out.print(f"\n[bold]Octet is ready.[/] Playground: {url}/\n\nGenerate an image:\n")
    out.print(
        f"curl -s {url}/v1/images/generations -H 'content-type: application/json'{key} \\\n"
        f'  -d \'{{"model": "{model.id}", "prompt": "{prompt}"}}\' \\\n'
        "  | python3 -c 'import base64, json, sys; "
        'sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))\' '
        "> octet.png\n",
        markup=False,
    )
    out.print("Ctrl-C stops it.")
    out.file.flush()


def main() -> None:
    app()
