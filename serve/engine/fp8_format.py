"""The format of FP8 checkpoints: which files they have, and how a folder is known to be one.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import json
from pathlib import Path

TRANSFORMER, T5 = "transformer", "text_encoder_3"
METHODS = {TRANSFORMER: "octet-fp8-rowwise-fused", T5: "octet-quanto-fp8"}
WEIGHTS = "fp8.safetensors"
QUANTO_MAP = "quanto_map.json"


def is_fp8(folder: Path, component: str) -> bool:
    """Return whether a component of a checkpoint holds FP8 weights that `quantize` has written."""
    config = json.loads((folder / component / "config.json").read_text(encoding="utf-8"))
    method = config.get("quantization_config", {}).get("quant_method")
    return bool(method == METHODS[component])
