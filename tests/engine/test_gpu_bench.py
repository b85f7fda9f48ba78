"""Tests that run the scripts of `bench/gpu` from start to end on a CPU, with small shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import accept, engine, packing, quick, steps
from bench.gpu.model import FP8_EAGER, WAYS, Bench
from cluster.structure import TRANSFORMERS

from ..builders import DEMO_MODEL

TINY = Bench("cpu", tiny=True)


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(main: Any, monkeypatch: pytest.MonkeyPatch, out: Path, *args: str) -> Any:
    """Run a script and return the results that it writes."""
    monkeypatch.setattr("sys.argv", ["script", "--tiny", "--out", str(out), *args])
    main()
    (file,) = out.glob("*.json")
    (found,) = json.loads(file.read_text()).values()
    return found


@pytest.mark.parametrize(
    "ways",
    [
        pytest.param(("fp8 eager",), marks=pytest.mark.long),
        pytest.param(
            ("fp8 compiled", "bf16 eager", "fp8 eager", "torchao row-wise compiled"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_steps_script_measures_every_way(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    ways: tuple[str, ...],
) -> None:
    chosen = [part for way in ways for part in ("--way", way)]
    found = run(steps.main, monkeypatch, tmp_path, *chosen)
    measured = {(c["model"], c["way"]) for c in found["steps"] if c.get("step_ms", 0) > 0}
    assert measured >= {(m, way) for m in steps.MODELS for way in ways[:3]}
    assert all(cell["finite"] for cell in found["steps"])
    assert all(25 < db < 32 for kinds in found["sqnr_db"].values() for db in kinds.values())
    assert all(ms > 0 for ms in found["t5_ms"].values())
    assert found["t5_ms"].keys() == {"bf16", "fp8", "quanto"}
    printed = capsys.readouterr().out
    assert "ms/step" in printed
    if any(failed["way"] == "torchao row-wise compiled" for failed in found["failed"]):
        assert "No module named 'torchao'" in printed


PARTS = [part.name for part in quick.Parts(TINY).in_order()]
SLOW = "medium_step", "two_processes"


@pytest.mark.parametrize(
    "parts",
    [[part for part in PARTS if part not in SLOW], pytest.param(PARTS, marks=pytest.mark.long)],
)
def test_the_quick_script_measures_every_part(
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = [argument for part in parts for argument in ("--part", part)]
    found = run(quick.main, monkeypatch, tmp_path, *chosen)
    assert [*found] == ["machine", *parts]
    assert not [part for part in found.values() if isinstance(part, str)]  # an error, or left out
    assert found["large_step"]["finite"]
    assert found["large_step"]["kernels_ms"]["matrix product"] > 0
    assert set(found["decode"]) == {"channels_last", "contiguous_format", "compiled"}
    if "two_processes" in parts:
        assert [cell["processes"] for cell in found["two_processes"]] == [1, 2]
    assert "over_floor" in capsys.readouterr().out


def test_the_quick_script_writes_what_it_has_when_time_is_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = run(quick.main, monkeypatch, tmp_path, "--minutes", "0.3")
    assert isinstance(found["rates"], dict)
    assert found["large_step"] == "left out: no time"


def test_cells_that_the_remaining_time_cannot_hold_have_no_results() -> None:
    rates = steps.rates(TINY)
    cells = list(steps.cells(TINY, "sd3.5-medium", FP8_EAGER, rates, [(64, 1)], steps.Clock(0)))
    assert cells == [{"model": "sd3.5-medium", "way": "fp8 eager", "side": 64, "requests": 1}]


def test_fp8_ways_come_close_to_16_bit_and_differ_from_it() -> None:
    """All ways have the same random weights."""
    out: dict[str, torch.Tensor] = {}
    for name in ("bf16 eager", "fp8 eager", "fp8-adaln8 compiled"):
        torch.manual_seed(0)
        denoiser = TINY.denoiser("sd3.5-medium", WAYS[name])
        image = denoiser.begin(
            TINY.embeds(2), width=64, height=64, num_inference_steps=2, guidance_scale=2.0, seed=0
        )
        noise = image.latents
        denoiser.denoise_step([image])
        out[name] = noise - image.estimate
    exact = out["bf16 eager"]
    for name in ("fp8 eager", "fp8-adaln8 compiled"):
        error = (out[name] - exact).abs().mean() / exact.abs().mean()
        assert 1e-4 < error < 0.2, name
    assert not torch.equal(out["fp8 eager"], out["fp8-adaln8 compiled"])


@pytest.mark.long
def test_the_engine_script_measures_throughput_and_a_stream(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = run(engine.main, monkeypatch, tmp_path, "--images", "4")
    assert all(per_s > 0 for per_s in found["images_per_s"].values())
    assert found["stream"]["images"] == 4
    assert found["coefficients"].keys() == {"constant", "step", "token", "token2", "pixel"}


@pytest.mark.long
def test_the_packing_script_measures_every_cell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = [
        "--side",
        "64",
        "--steps",
        "1",
        "--seconds",
        "2",
        "--processes",
        "1",
        "2",
        "--slots",
        "2",
    ]
    found = run(packing.main, monkeypatch, tmp_path, *arguments)
    assert [(c["processes"], c["slots"]) for c in found["cells"]] == [(1, 2), (2, 2)]
    assert all(c["images_s"] > 0 and c["latency_p99_s"] > 0 for c in found["cells"])


@pytest.mark.long
def test_the_packing_script_measures_models_beside_each_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = "--together", "--side", "64", "--seconds", "2", "--slots", "1"
    found = run(packing.main, monkeypatch, tmp_path, *arguments)
    (cell,) = found["cells"]
    assert cell["models"].keys() == TRANSFORMERS.keys()
    parts = [model["part"] for model in cell["models"].values()]
    assert sum(parts) == pytest.approx(cell["kept"])
    assert all(0 < part < 1.2 for part in parts)  # three processes share the machine's cores


def test_the_acceptance_compares_fp8_with_16_bit_on_real_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo model stands for the real weights; its FP8 images are close to those in 16 bit."""
    sizes = ("--prompts", "2", "--side", "128", "--steps", "8", "--minutes", "0")
    found = run(accept.main, monkeypatch, tmp_path, "--model", str(DEMO_MODEL), *sizes)
    real = found["real_weights"]
    assert real["prompts"] == 2
    assert 0.8 < real["ssim_least"] <= real["ssim_median"] < 1
    assert real["fp8"]["step_ms"] > 0
    page = tmp_path / capsys.readouterr().out.split("page: ")[1].strip().rpartition("/")[2]
    assert "ssim_median" in page.read_text()


def test_the_acceptance_says_what_it_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    found = run(accept.main, monkeypatch, tmp_path, "--minutes", "0")
    assert "set HF_TOKEN" in found["real_weights"]
