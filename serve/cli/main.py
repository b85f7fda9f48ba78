"""The `octet` command: all commands by task, with examples, and what their errors become."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import SettingsError
from ..launch import LaunchError
from ..models.checkpoints import CheckpointError
from . import (
    bench,
    calibrate,
    check_config,
    compare,
    compile_pools,
    doctor,
    jobs,
    k8s,
    node,
    plan,
    serve,
    simulate,
    store,
    tenant,
    top,
    usage,
    weights,
)
from .exit_codes import FAULT, USED_WRONGLY, UsageError
from .terminal import complain, examples

RUN, MODELS, QUALITY, CAPACITY = "Run", "Models", "Quality", "Capacity"
TENANTS, OPERATE = "Tenants", "Operate"


class Commands(TyperGroup):
    """The commands. Each expected error ends a command with one message and an exit code.

    With `octet --debug` expected errors are raised, as unexpected ones always are: a traceback
    belongs in a bug report.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the command line names."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # such as `| head`, which closes the pipe early
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit from None
        except (SettingsError, LaunchError, CheckpointError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            complain(f"octet: {_message(error)}")
            raise typer.Exit(USED_WRONGLY if isinstance(error, UsageError) else FAULT) from None


def _message(error: Exception) -> str:
    """The message of an error; for an error of the operating system, the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="Exit codes: 0 done; 1 the command ran and found or met a fault; 2 the command line is "
    "wrong; 130 interrupted.",
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
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Stable Diffusion 3.5 in FP8 for many tenants on Ray Serve."""


def _add(panel: str, name: str, command: Callable[..., None], *lines: str) -> None:
    """Add a command to a panel of the help; `lines`: command lines that show its use."""
    app.command(name, rich_help_panel=panel, epilog=examples(*lines))(command)


_add(RUN, "demo", serve.demo, "octet demo", "octet demo --port 9000")
_add(
    RUN,
    "serve",
    serve.serve,
    "octet serve examples/laptop.yaml",
    "OCTET_HTTP__PORT=9000 octet serve octet.yaml",
)
_add(
    RUN,
    "check-config",
    check_config.check_config,
    "octet check-config octet.yaml",
    "octet check-config octet.yaml --json",
)
_add(
    RUN,
    "doctor",
    doctor.doctor,
    "octet doctor octet.yaml",
    "octet doctor octet.yaml --ray 10.0.0.5:6379",
)
_add(MODELS, "models", weights.models, "octet models octet.yaml", "octet models octet.yaml --json")
_add(
    MODELS,
    "pull",
    weights.pull,
    "octet pull --config octet.yaml",
    "octet pull stabilityai/stable-diffusion-3.5-large@REVISION",
)
_add(
    MODELS,
    "convert",
    weights.convert,
    "octet convert sd3.5_large.safetensors models/sd35-large",
    "octet convert sd3.5_large_fp8_scaled.safetensors models/sd35-large-fp8",
)
_add(
    MODELS,
    "quantize",
    weights.quantize,
    "octet quantize demo/model models/landscapes-fp8",
    "octet quantize models/sd35-large models/sd35-large-fp8 --adaln-8-bit",
)
_add(
    MODELS,
    "compile",
    compile_pools.compile_pools,
    "octet compile octet.yaml",
    "octet compile octet.yaml --pool sd3.5-large-fp8",
)
_add(
    QUALITY,
    "compare",
    compare.compare,
    "octet compare recipe=bf16 recipe=fp8 --config octet.yaml --min-ssim 0.97",
    "octet compare url=http://127.0.0.1:8000,precision=fp16 url=http://127.0.0.1:8000,precision=fp8",
)
_add(
    QUALITY,
    "calibrate",
    calibrate.calibrate,
    "octet calibrate landscapes --config examples/laptop.yaml",
    "octet calibrate landscapes --config examples/laptop.yaml --guidance 5 --settings presets.yaml",
)
_add(
    CAPACITY,
    "plan",
    plan.plan,
    "octet plan --gpu h100:8 --model sd3.5-large",
    "octet plan --gpu h100:8 --gpu l4:4 --config octet.yaml --settings",
)
_add(
    CAPACITY,
    "simulate",
    simulate.simulate,
    "octet simulate --workload spikes --rate 2 --hours 6",
    "octet simulate --config octet.yaml --workload requests.csv",
)
_add(
    CAPACITY,
    "bench",
    bench.bench,
    "octet bench http://127.0.0.1:8000 --rate 2 --seconds 30",
    "octet bench http://127.0.0.1:8000 --clients 8 --mix 128x128:10=3 --mix 256x256:28",
)
app.add_typer(tenant.app, name="tenant", rich_help_panel=TENANTS)
_add(
    TENANTS,
    "usage",
    usage.usage,
    "octet usage --config octet.yaml",
    "octet usage --config octet.yaml --tenant acme --since 2026-11-01 --records",
)
_add(
    OPERATE,
    "top",
    top.top,
    "octet top",
    "octet top https://images.example --once --json",
)
app.add_typer(jobs.app, name="jobs", rich_help_panel=OPERATE)
app.add_typer(store.app, name="store", rich_help_panel=OPERATE)
app.add_typer(node.app, name="node", rich_help_panel=OPERATE)
app.add_typer(k8s.app, name="k8s", rich_help_panel=OPERATE)
