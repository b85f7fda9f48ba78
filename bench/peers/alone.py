"""What diffusers' pipeline does without a server, by which the servers are judged."""

from __future__ import annotations

import os
import statistics
import time

from .contestants import MODEL, SMALL
from .landscapes import Landscapes
from .load import KINDS, Kind, OwnTimes, request

CHECKED = {**SMALL, "num_inference_steps": 20, "seed": 3}


def alone(repeats: int) -> tuple[str, OwnTimes, str]:
    """What diffusers' pipeline does without a server. Run it in a process of its own.

    Returns the number format in which it is fastest on this CPU, the seconds of an image of each
    kind, and the image of `CHECKED` in base64.
    """
    os.environ["PEER_MODEL"] = str(MODEL)
    took_s, pipelines = {}, {}
    for dtype in "float32", "bfloat16":
        os.environ["PEER_DTYPE"] = dtype
        pipelines[dtype] = Landscapes()
        pipelines[dtype].images([SMALL | {"seed": 0}])
        began = time.perf_counter()
        pipelines[dtype].images([SMALL | {"seed": 0}])
        took_s[dtype] = time.perf_counter() - began
    fastest = min(took_s, key=lambda dtype: took_s[dtype])
    return (
        fastest,
        _own_times(pipelines[fastest], repeats),
        pipelines[fastest].images([CHECKED])[0],
    )


def _own_times(landscapes: Landscapes, repeats: int) -> dict[Kind, float]:
    """Median seconds of an image of each kind in the pipeline alone."""
    found: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
    landscapes.images([request(KINDS[0], 0, "alone")])  # the first takes longer
    for turn in range(repeats):
        for kind, took_s in found.items():
            began = time.perf_counter()
            landscapes.images([request(kind, turn, "alone")])
            took_s.append(time.perf_counter() - began)
    return {kind: statistics.median(took_s) for kind, took_s in found.items()}
