"""Measure the memory of 1 and 4 processes that hold the same FP8 transformer on a CPU.

    python -m bench.shared_weights [--heads 12]

Each process imports torch and diffusers, loads the checkpoint and touches every weight. The weights
are either mapped from the file, as replicas load them, or copied. Memory is counted as PSS, in
which a page that n processes share counts 1/n for each; this includes torch's own libraries. There
are two checkpoints, both as `octet quantize` writes them: the demo model's, and a random one with
SD3.5 Medium's structure at a reduced width.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from .load_time import SD35_MEDIUM_HEADS, random_model

DEMO = Path(__file__).parents[1] / "demo" / "model"
PROCESSES = 1, 4


def hold(folder: Path, copied: bool) -> None:
    """Load the weights, print `ready`, and keep them until standard input ends."""
    import torch

    from serve.engine.denoiser import load_transformer
    from serve.engine.precision import RECIPES

    transformer = load_transformer(folder, RECIPES["fp8"], "cpu")
    state = transformer.state_dict()
    if copied:
        state = {name: tensor.clone() for name, tensor in state.items()}
        transformer.load_state_dict(state, assign=True)
    for tensor in state.values():
        tensor.view(torch.uint8).max()
    print("ready", flush=True)
    sys.stdin.read()


def pss_mib(folder: Path, copied: bool, processes: int) -> float:
    """PSS in MiB of all processes together."""
    command = [sys.executable, "-W", "ignore", "-m", "bench.shared_weights", "--hold", str(folder)]
    command += ["--copied"] if copied else []
    holding = [
        subprocess.Popen(  # noqa: S603 - this interpreter, this module
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(processes)
    ]
    try:
        for process in holding:
            if process.stdout is None or "ready" not in process.stdout.readline():
                raise RuntimeError("a process did not load the weights")
        return sum(_pss_mib(process.pid) for process in holding)
    finally:
        for process in holding:
            process.communicate()


def _pss_mib(pid: int) -> float:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    (line,) = [line for line in rollup.splitlines() if line.startswith("Pss:")]
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--heads", type=int, default=12, help="attention heads; 24 is the width of SD3.5 Medium"
    )
    parser.add_argument("--hold", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--copied", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.hold:
        hold(arguments.hold, arguments.copied)
        return
    from serve.engine.fp8_checkpoint import quantize

    with tempfile.TemporaryDirectory() as temporary:
        random_model(Path(temporary) / "bf16", arguments.heads)
        sources = {
            "demo model": DEMO,
            f"Medium at {arguments.heads / SD35_MEDIUM_HEADS:g} width": Path(temporary) / "bf16",
        }
        print("| MiB (PSS) of all | weights | 1 process | 4 processes | each further process |")
        print("|---|---|---|---|---|")
        for name, source in sources.items():
            folder = Path(temporary) / f"fp8-{len(name)}"
            quantize(source, folder)
            for how in ("mapped", "copied"):
                one, four = (pss_mib(folder, how == "copied", n) for n in PROCESSES)
                print(f"| {name} | {how} | {one:.0f} | {four:.0f} | {(four - one) / 3:.0f} |")


if __name__ == "__main__":
    main()
