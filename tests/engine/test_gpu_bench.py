"""The GPU scripts run whole on a CPU, with small shapes: what they print is measured there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import engine, packing, steps
from bench.gpu.model import BF16, FP8, FP8_EAGER, WAYS, Bench

from ..builders import ROOT

TINY = Bench("cpu", tiny=True)


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(main: Any, monkeypatch: pytest.MonkeyPatch, out: Path, *args: str) -> Any:
    """What a script writes."""
    monkeypatch.setattr("sys.argv", ["script", "--tiny", "--out", str(out), *args])
    main()
    (file,) = out.iterdir()
    (found,) = json.loads(file.read_text()).values()
    return found


def test_they_need_no_ray() -> None:
    program = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "starlette"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import bench.gpu.steps, bench.gpu.engine, bench.gpu.packing
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)  # noqa: S603 - our own
    assert done.returncode == 0, done.stderr


def test_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = [FP8, BF16, FP8_EAGER, WAYS["torchao row-wise compiled"]]
    monkeypatch.setattr(steps, "WAYS", {way.name: way for way in ways})
    monkeypatch.setattr(steps, "t5_ms", lambda _: {})
    found = run(steps.main, monkeypatch, tmp_path)
    measured = {(c["model"], c["way"]) for c in found["steps"] if c.get("step_ms", 0) > 0}
    assert measured >= {(m, w.name) for m in steps.MODELS for w in ways[:3]}
    assert all(cell["finite"] for cell in found["steps"])
    assert all(25 < db < 32 for kinds in found["sqnr_db"].values() for db in kinds.values())
    printed = capsys.readouterr().out
    assert "ms/step" in printed
    if any(failed["way"] == ways[3].name for failed in found["failed"]):
        assert "No module named 'torchao'" in printed


def test_time_that_does_not_suffice_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steps, "WAYS", {way.name: way for way in (BF16, FP8_EAGER)})
    monkeypatch.setattr(steps, "t5_ms", lambda _: {})
    found = run(steps.main, monkeypatch, tmp_path, "--minutes", "0")
    assert not any("step_ms" in cell for cell in found["steps"])
    assert f"left out: {2 * 2}" in capsys.readouterr().out


def test_t5_in_both_formats() -> None:
    found = steps.t5_ms(TINY)
    assert all(ms > 0 for ms in found.values())
    assert found.keys() == {"bf16", "quanto fp8"}


def test_ways_differ_as_their_names_say() -> None:
    """Same random weights: FP8 is near 16 bit and not equal to it."""
    out = {}
    for name in ("bf16 eager", "fp8 eager", "fp8-adaln8 compiled"):
        torch.manual_seed(0)
        denoiser = TINY.denoiser("sd3.5-medium", WAYS[name])
        image = denoiser.begin(
            TINY.embeds(2), width=64, height=64, num_inference_steps=2, guidance_scale=2.0, seed=0
        )
        denoiser.denoise_step([image])
        out[name] = image.velocity
    exact = out["bf16 eager"]
    for name in ("fp8 eager", "fp8-adaln8 compiled"):
        error = (out[name] - exact).abs().mean() / exact.abs().mean()
        assert 1e-4 < error < 0.2, name
    assert not torch.equal(out["fp8 eager"], out["fp8-adaln8 compiled"])


def test_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bench.engine.STEPS", (1, 2))
    found = run(engine.main, monkeypatch, tmp_path, "--images", "4")
    assert all(per_s > 0 for per_s in found["images_per_s"].values())
    assert found["stream"]["images"] == 4
    assert found["coefficients"].keys() == {"constant", "step", "token", "token2", "pixel"}


def test_packing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packing, "PROCESSES", (1, 2))
    monkeypatch.setattr(packing, "SLOTS", (2,))
    found = run(
        packing.main, monkeypatch, tmp_path, "--side", "64", "--steps", "1", "--seconds", "2"
    )
    assert [(c["processes"], c["slots"]) for c in found["cells"]] == [(1, 2), (2, 2)]
    assert all(c["images_s"] > 0 and c["latency_p99_s"] > 0 for c in found["cells"])
