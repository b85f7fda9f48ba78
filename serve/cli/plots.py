"""Check of `--plot` before the work begins: matplotlib, and a file that can be written."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from .exit_codes import UsageError

FORMATS = ".png", ".svg", ".pdf", ".jpg", ".webp"


def check_plot(file: Path | None) -> None:
    """Raise `SettingsError` if no plot can be written to `file`; None: no plot is wanted."""
    if file is None:
        return
    if find_spec("matplotlib") is None:
        raise UsageError(
            "--plot needs matplotlib, which is not installed here: pip install matplotlib"
        )
    if file.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {file}: the name must end in one of {', '.join(FORMATS)}")
    folder = file.parent
    if not folder.is_dir():
        raise UsageError(f"--plot {file}: there is no folder {folder}")
    if file.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        raise UsageError(f"--plot {file}: this file cannot be written")
