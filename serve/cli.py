"""The `octet` command."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .launch import LaunchError, Running, running
from .settings import Settings, SettingsError, load_settings

STOP = signal.SIGINT, signal.SIGTERM
DEMO_SETTINGS = Path(__file__).parent.parent / "examples" / "laptop.yaml"

app = typer.Typer(
    help="Stable Diffusion 3.5 in FP8 for many tenants on Ray Serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)
ConfigFile = Annotated[Path, typer.Argument(help="Settings file (YAML); see examples/.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


@contextmanager
def readable_errors(debug: bool) -> Iterator[None]:
    """Errors that we foresee in one line each, exit code 1."""
    try:
        yield
    except (SettingsError, LaunchError) as error:
        if debug:
            raise
        console.print(f"octet: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


@app.command()
def serve(config: ConfigFile, debug: Debug = False) -> None:
    """Serve the models of CONFIG on a Ray of their own, in the foreground."""
    with readable_errors(debug):
        _serve(lambda: load_settings(config))


@app.command()
def demo(
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    debug: Debug = False,
) -> None:
    """Serve the small demo model on this machine, in the foreground."""
    with readable_errors(debug):
        if port is not None and not 1 <= port <= 65535:
            raise SettingsError(f"port {port} must be between 1 and 65535")
        environ = {**os.environ, **({} if port is None else {"OCTET_HTTP__PORT": str(port)})}
        _serve(lambda: load_settings(DEMO_SETTINGS, environ))


@app.command("check-config")
def check_config(config: ConfigFile, debug: Debug = False) -> None:
    """Check CONFIG and the OCTET_* overrides without starting anything."""
    with readable_errors(debug):
        settings = load_settings(config)
    table = Table("model", "pool", "replicas", "GPU each", "CPU each")
    for model in settings.models:
        for pool in model.pools:
            row = (
                model.id,
                pool.precision,
                pool.replicas,
                f"{pool.num_gpus:g}",
                f"{pool.num_cpus:g}",
            )
            table.add_row(*map(str, row))
    Console().print(table)
    console.print(f"{config}: ok", style="green", highlight=False)


def _serve(read: Callable[[], Settings]) -> None:
    """Until Ctrl-C or SIGTERM; SIGHUP reads the settings again."""
    before = {number: signal.getsignal(number) for number in STOP}
    _on_stop(_interrupt)
    try:
        with running(read(), _tell_changes()) as octet:
            try:
                signal.signal(signal.SIGHUP, lambda *_: _apply(octet, read))
                _announce(octet)
                while True:
                    signal.pause()
            except KeyboardInterrupt:
                console.print("finishing what is being drawn; Ctrl-C again drops it")
                _on_stop(_interrupt)
                with suppress(KeyboardInterrupt):
                    octet.drain()
                _on_stop(signal.SIG_IGN)
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    console.print("stopped")


def _on_stop(handler: Any) -> None:
    for number in STOP:
        signal.signal(number, handler)


def _interrupt(*_: object) -> None:
    _on_stop(signal.SIG_IGN)  # another Ctrl-C must not interrupt the cleaning up
    raise KeyboardInterrupt


def _apply(octet: Running, read: Callable[[], Settings]) -> None:
    """Bring the running application to the settings as they are now."""
    try:
        octet.apply(read())
    except SettingsError as error:
        console.print(f"octet: settings not applied: {error}", style="red", markup=False)
    else:
        console.print("settings applied")


def _tell_changes() -> Callable[[str], None]:
    """Print news, each once, as long as nothing else has been heard."""
    last = ""

    def tell(news: str) -> None:
        nonlocal last
        if news != last:
            console.print(news, style="dim", highlight=False, soft_wrap=True)
        last = news

    return tell


def _announce(octet: Running) -> None:
    url, model = octet.url, octet.settings.models[0]
    prompt = "a futuristic cityscape at sunset"
    out = Console(highlight=False, soft_wrap=True)
    out.print(f"\n[bold]Octet is ready.[/] Playground: {url}/\n\nDraw a picture:\n")
    out.print(
        f"curl -s {url}/v1/images/generations -H 'content-type: application/json' \\\n"
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
