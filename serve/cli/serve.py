"""`octet serve` and `octet demo`: serve in the foreground, until a signal says otherwise."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Annotated, Any

import typer
from rich.console import Console

from ..launch import RunningApplication, run_application
from ..models.example_prompts import example_prompts
from ..settings.application import Settings
from ..settings.file import load_settings
from ..tenants.files import KEYS, TENANTS, read_tenants
from .doctor_settings import bucket_fault
from .exit_codes import UsageError
from .tenant_access import StoredTenants
from .terminal import ConfigFile, complain, console

STOP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
APPLY = signal.SIGUSR1
LOOK_S = 1.0
DEMO_SETTINGS = Path(__file__).parents[2] / "examples" / "laptop.yaml"


def serve(config: ConfigFile) -> None:
    """Serve the models of CONFIG in the foreground, on a Ray cluster started for them.

    Ctrl-C or SIGTERM finishes running images and stops; SIGUSR1 applies changed settings.
    """
    _serve(lambda: load_settings(config))


def demo(
    port: Annotated[int | None, typer.Option(help="Port to listen on; default: 8000.")] = None,
) -> None:
    """Serve the small demo model on this machine, in the foreground. Needs no GPU."""
    if port is not None and not 1 <= port <= 65535:
        raise UsageError(f"port {port} must be between 1 and 65535")
    environ = {**os.environ, **({} if port is None else {"OCTET_HTTP__PORT": str(port)})}
    _serve(lambda: load_settings(DEMO_SETTINGS, environ))


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
        with ExitStack() as started:
            with _answering_ctrl_c():
                octet = started.enter_context(run_application(settings, _news_printer()))
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


@contextmanager
def _answering_ctrl_c() -> Iterator[None]:
    """Say at once that a signal has come, while the block runs.

    Python's own handlers wait until Ray's code returns, which may take many seconds. The system
    writes the number of a signal to the socket at once.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def answer() -> None:
        if reader.recv(1):
            console.print("stopping as soon as Ray answers")

    thread = Thread(target=answer)
    before = signal.set_wakeup_fd(writer.fileno())
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()  # ends the thread
        thread.join()
        reader.close()


def _warn_about_access(settings: Settings) -> None:
    """Warn if anyone may generate images without a key, or if there are no tenants yet.

    Raises `SettingsError` or `OSError` if the database on this machine, or a file of tenants,
    cannot be read.
    """
    if settings.auth != "keys":
        host = settings.http.host
        said = f"auth is {settings.auth}: anyone who reaches {host} may generate images"
        style = "dim" if settings.auth == "none" else "red"  # none: only this machine reaches it
        console.print(said, style=style, highlight=False, soft_wrap=True)
        return
    if settings.tenants_folder and read_tenants(Path(settings.tenants_folder).expanduser()):
        return
    try:
        with closing(StoredTenants(settings)) as stored:
            if not any(True for _ in stored.tenants()):
                complain("there are no tenants yet: octet tenant add, or octet tenant apply FOLDER")
    except OSError as error:
        if settings.database_is_of_one_node:
            raise
        complain(f"{error}: until the database answers, no tenant can call")


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
    """A function that prints new autoscaling decisions, and faults of files and stores.

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
        for part, fault in status.faults.items():
            if fault != faults.get(part):
                kept = "keeping the last valid " if part in (TENANTS, KEYS) else ""
                complain(f"octet: {kept}{part}: {fault}")
        for part in faults.keys() - status.faults.keys():
            again = "is valid again" if part in (TENANTS, KEYS) else "works again"
            console.print(f"{part} {again}", highlight=False)
        faults = status.faults

    return print_changes


def _news_printer() -> Callable[[str], None]:
    """A function that prints lines of news, each after the seconds since the start began."""
    began = time.monotonic()

    def print_news(news: str) -> None:
        text = f"{time.monotonic() - began:6.1f} s  {news}"
        console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)

    return print_news


def _announce(octet: RunningApplication) -> None:
    """Print the playground's address and a curl command that generates an image."""
    url, model = octet.url, octet.settings.models[0]
    known = example_prompts(model, octet.settings.models_folder)
    prompt = known[0] if known else "a lighthouse at sunset"
    body = json.dumps({"model": model.id, "prompt": prompt}, ensure_ascii=False)
    key = ' -H "authorization: Bearer $OCTET_KEY"' if octet.settings.auth == "keys" else ""
    out = Console(highlight=False, soft_wrap=True)
    out.print(f"\n[bold]Octet is ready.[/] Playground: {url}/\n\nGenerate an image:\n")
    out.print(
        f"curl -s {url}/v1/images/generations -H 'content-type: application/json'{key} \\\n"
        f"  -d {shlex.quote(body)} \\\n"
        "  | python3 -c 'import base64, json, sys; answer = json.load(sys.stdin); "
        '"data" in answer or sys.exit(json.dumps(answer)); '
        'sys.stdout.buffer.write(base64.b64decode(answer["data"][0]["b64_json"]))\' '
        "> octet.png\n",
        markup=False,
    )
    out.print("Ctrl-C stops it.")
    out.file.flush()
