"""`octet compile`: compile ahead what replicas would compile at their first start."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import OctetError, did_you_mean
from ..settings.file import load_settings
from ..settings.serve_config import pool_arguments
from .exit_codes import UsageError
from .terminal import ConfigFile, console, working


def compile_pools(
    config: ConfigFile,
    pool: Annotated[
        list[str] | None, typer.Option(help="Pool to compile for, may be repeated; default: all.")
    ] = None,
) -> None:
    """Compile the code of CONFIG's pools for this machine's card, into compiled_folder.

    Replicas on nodes with such cards and this folder then start without compiling. Pools that
    cannot run on this machine are left out.
    """
    known = {one.name: one for one in pool_arguments(load_settings(config))}
    for name in pool or ():
        if name not in known:
            raise UsageError(f"--pool '{name}': {did_you_mean(name, known)}")
    from ..engine.precompile import compile_pool, is_compiled  # loads torch and diffusers

    for name in pool or known:
        try:
            done = is_compiled(known[name])
            if done is False:
                with working(f"compiling {name}"):
                    said = f"compiled in {compile_pool(known[name])}"
            else:
                said = "compiled already" if done else "nothing to compile here"
        except OctetError as error:
            said = f"left out: {error.message}"
        console.print(f"{name}: {said}", highlight=False, soft_wrap=True)
