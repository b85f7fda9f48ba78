"""Tests of the precision recipes: accuracy of FP8, independence of rows, saving and loading."""

from __future__ import annotations

import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config, T5EncoderModel

from serve.engine.fused_attention import fuse_qkv
from serve.engine.precision import (
    ADALN,
    E4M3,
    ENCODER_RECIPES,
    RECIPES,
    Fp8Linear,
    Fp8StoredLinear,
    apply_recipe,
    fp8_fault,
    fp8_layer,
    quantize_rows,
    store_in_fp8,
)
from serve.engine.prompt_encoder import PromptEncoder

from ..builders import DEMO_MODEL, ROOT

SMALL_T5 = T5Config(
    vocab_size=64, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4,
    feed_forward_proj="gated-gelu",
)  # fmt: skip


def sqnr_db(exact: torch.Tensor, found: torch.Tensor) -> float:
    noise = (exact - found.float()).pow(2).mean()
    return float(10 * torch.log10(exact.pow(2).mean() / noise))


@pytest.mark.parametrize(("k", "n"), [(192, 192), (192, 768), (768, 192), (2432, 256)])
def test_an_fp8_linear_has_about_29_db_of_signal_to_noise(k: int, n: int) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(k, n), torch.randn(128, k)
    with torch.no_grad():
        found = Fp8Linear.quantize(linear)(x)
        assert sqnr_db(linear(x), found) == pytest.approx(28.7, abs=1.0)


def test_a_device_whose_fp8_product_fails_or_is_wrong_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert fp8_fault("cpu") is None

    def missing(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("row-wise scaling is not supported\nhere")

    multiply = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", missing)
    assert fp8_fault("cpu") == "a small FP8 product fails: row-wise scaling is not supported"
    for wrong in (0.0, 2.0, float("nan")):
        monkeypatch.setattr(
            torch, "_scaled_mm", lambda *a, wrong=wrong, **k: wrong * multiply(*a, **k)
        )
        assert "is wrong by" in str(fp8_fault("cpu"))


REFERENCE = """
import sys, torch
from safetensors.torch import save_file
from torchao.quantization import Float8Tensor, PerRow
torch.manual_seed(0)
w, x = torch.randn(256, 512) / 23, torch.randn(64, 512)
def rows(t):
    return Float8Tensor.from_hp(t, float8_dtype=torch.float8_e4m3fn, granularity=PerRow())
qw, qx = rows(w), rows(x)
y = qx.dequantize().float() @ qw.dequantize().float().T
save_file({"w": w, "x": x, "y": y, "numbers": qw.qdata, "scale": qw.scale}, sys.argv[1])
"""


def test_rows_are_quantised_like_torchao_does(tmp_path: Path) -> None:
    """torchao has a folder of its own, because next to diffusers it slows every import."""
    file = tmp_path / "reference.safetensors"
    subprocess.run(  # noqa: S603 - our own interpreter and program
        [sys.executable, "-c", REFERENCE, str(file)],
        env={"PYTHONPATH": str(ROOT / ".venv" / "reference")},
        check=True,
        capture_output=True,
    )
    reference = load_file(file)
    numbers, scale = quantize_rows(reference["w"])
    torch.testing.assert_close(scale, reference["scale"].float(), rtol=1e-6, atol=0)
    same = (numbers.float() == reference["numbers"].float()).float().mean()
    assert same > 0.999  # a rounding tie may fall either way
    linear = nn.Linear(512, 256, bias=False)
    linear.weight.data = reference["w"]
    exact = reference["x"] @ reference["w"].T
    ours = Fp8Linear.quantize(linear)(reference["x"])
    assert sqnr_db(exact, ours) == pytest.approx(sqnr_db(exact, reference["y"]), abs=0.1)


def test_outliers_in_other_rows_change_nothing() -> None:
    torch.manual_seed(0)
    linear = Fp8Linear.quantize(nn.Linear(64, 64))
    mine = torch.randn(16, 64)
    alone = linear(torch.cat([mine, torch.randn(16, 64)]))[:16]
    beside = linear(torch.cat([mine, torch.randn(16, 64) * 1000]))[:16]
    assert torch.equal(alone, beside)


def test_nan_stays_visible_in_its_own_row() -> None:
    x = torch.ones(2, 64)
    x[0, 3] = float("nan")
    y = Fp8Linear.quantize(nn.Linear(64, 64))(x)
    assert y[0].isnan().any()
    assert y[1].isfinite().all()


@pytest.mark.parametrize(("k", "n"), [(60, 64), (64, 60)])
def test_unaligned_sizes_are_refused(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        Fp8Linear.quantize(nn.Linear(k, n))


@pytest.fixture(scope="module")
def transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel.from_pretrained(DEMO_MODEL / "transformer")


def test_only_attention_and_feed_forward_layers_of_blocks_are_fp8(
    transformer: SD3Transformer2DModel,
) -> None:
    model = apply_recipe(SD3Transformer2DModel.from_config(transformer.config), RECIPES["fp8"])
    fp8 = {name for name, m in model.named_modules() if isinstance(m, Fp8Linear)}
    plain = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert all(name.startswith("transformer_blocks.") for name in fp8)
    assert all(".attn" in name or ".ff" in name for name in fp8)
    assert not any(fp8_layer(name, RECIPES["fp8"]) for name in plain)
    # A block has 12: q, k and v of both streams, two outputs, and two feed-forwards of two layers.
    # The last block lacks 3: the text's output and feed-forward. The dual block has 4 more.
    assert len(fp8) == 4 * 12 - 3 + 4
    assert all(m.weight.dtype is E4M3 for m in model.modules() if isinstance(m, Fp8Linear))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_adaln_can_be_stored_in_8_bit(transformer: SD3Transformer2DModel) -> None:
    """The 8-bit weights are converted to 16 bit for use, so their rounding is the only error."""
    config = transformer.config
    torch.manual_seed(0)
    original = SD3Transformer2DModel.from_config(config).to(torch.bfloat16)
    for name, parameter in original.named_parameters():
        if fnmatch(name, f"{ADALN}.weight"):  # output channels of very different size
            parameter.data *= torch.logspace(0, 2, len(parameter)).bfloat16()[:, None]
    state = original.state_dict()
    small = SD3Transformer2DModel.from_config(config)
    small.load_state_dict(state)
    apply_recipe(small, RECIPES["fp8-adaln8"])
    stored = {n: m for n, m in small.named_modules() if isinstance(m, Fp8StoredLinear)}
    assert stored.keys() == {f"transformer_blocks.{i}.{n}.linear" for i in range(4)
                             for n in ("norm1", "norm1_context")}  # fmt: skip
    name, layer = next(iter(stored.items()))
    x = torch.randn(3, config.num_attention_heads * config.attention_head_dim).bfloat16()
    exact = original.get_submodule(name)(x).float()
    error = (layer(x).float() - exact).square().mean(0) / exact.square().mean(0)
    assert layer(x).dtype is torch.bfloat16
    assert (
        1e-4 < error.median() < 2e-3
    )  # 27 to 40 dB; FP8 activations would add as much error again
    row_alone, row_beside = layer(x[:1]), layer(x)[:1]
    assert torch.allclose(row_alone, row_beside, atol=1e-2)


def test_joined_projections_are_exact_and_replace_the_single_ones(
    transformer: SD3Transformer2DModel,
) -> None:
    config, state = transformer.config, transformer.state_dict()
    for recipe in ("fp8", "fp32"):
        plain, fused = (SD3Transformer2DModel.from_config(config) for _ in range(2))
        for model in (plain, fused):
            model.load_state_dict(state)
        fuse_qkv(fused)
        for model in (plain, fused):
            apply_recipe(model, RECIPES[recipe])
        names = {n.rpartition(".")[2] for n, _ in fused.named_modules() if ".attn" in n}
        assert {"to_qkv", "to_added_qkv"} <= names
        assert not names & {"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"}
        sizes = [sum(t.nbytes for t in m.state_dict().values()) for m in (plain, fused)]
        assert sizes[0] == sizes[1]
        dtype = RECIPES[recipe].dtype
        torch.manual_seed(0)
        inputs = {
            "hidden_states": torch.randn(2, 16, 16, 16).to(dtype),
            "timestep": torch.tensor([900.0, 20.0]),
            "encoder_hidden_states": torch.randn(2, 64, 128).to(dtype),
            "pooled_projections": torch.randn(2, 128).to(dtype),
        }
        with torch.inference_mode():
            first, second = (m.eval()(**inputs, return_dict=False)[0] for m in (plain, fused))
        assert first.std() > 0.01
        assert torch.allclose(first, second, atol=1e-5 if recipe == "fp32" else 0.0)


def test_an_fp8_transformer_is_unchanged_by_saving_and_loading(
    transformer: SD3Transformer2DModel, tmp_path: Path
) -> None:
    model = apply_recipe(transformer, RECIPES["fp8"])
    save_file(model.state_dict(), tmp_path / "fp8.safetensors")
    with torch.device("meta"):
        empty = apply_recipe(SD3Transformer2DModel.from_config(model.config), RECIPES["fp8"])
    empty.load_state_dict(load_file(tmp_path / "fp8.safetensors"), assign=True)
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, 16, 16, 16).bfloat16(),
        "timestep": torch.tensor([900.0, 20.0]),
        "encoder_hidden_states": torch.randn(2, 64, 128).bfloat16(),
        "pooled_projections": torch.randn(2, 128).bfloat16(),
    }
    with torch.inference_mode():
        first, second = (m.eval()(**inputs, return_dict=False)[0] for m in (model, empty))
    assert first.std() > 0.01
    assert (first - second).abs().max() == 0.0


def test_t5_in_fp8_is_unchanged_by_saving_and_loading(tmp_path: Path) -> None:
    from optimum.quanto import quantization_map, requantize

    torch.manual_seed(0)
    t5 = T5EncoderModel(SMALL_T5).eval()
    ids = torch.arange(32)[None]
    with torch.inference_mode():
        exact = t5(ids).last_hidden_state
        store_in_fp8(t5, "quanto")
        stored = t5(ids).last_hidden_state
        # T5 has one embedding under two names; safetensors refuses tensors that share memory.
        state = {name: tensor.clone() for name, tensor in t5.state_dict().items()}
        save_file(state, tmp_path / "t5.safetensors")
        with torch.device("meta"):
            again = T5EncoderModel(SMALL_T5).eval()
        requantize(again, load_file(tmp_path / "t5.safetensors"), quantization_map(t5))
        reloaded = again(ids).last_hidden_state
    assert sqnr_db(exact, stored) > 20
    assert (stored - reloaded).abs().max() == 0.0
    weights = load_file(tmp_path / "t5.safetensors")
    kinds = {t.dtype for name, t in weights.items() if name.endswith("_data")}
    assert kinds == {E4M3}


def test_t5_stored_by_octet_is_as_exact_as_by_quanto() -> None:
    torch.manual_seed(0)
    state = T5EncoderModel(SMALL_T5).state_dict()
    found: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for how in ("exact", "fp8", "quanto"):
            t5 = T5EncoderModel(SMALL_T5).to(torch.bfloat16).eval()
            t5.load_state_dict(state)
            if how != "exact":
                store_in_fp8(t5, how)  # type: ignore[arg-type]  # one of the two
            found[how] = t5(torch.arange(32)[None]).last_hidden_state.float()
    own, quanto = (sqnr_db(found["exact"], found[how]) for how in ("fp8", "quanto"))
    assert own > 20
    assert own > quanto - 0.5


@pytest.mark.parametrize("name", ["t5-fp8", "t5-quanto"])
def test_with_t5_in_fp8_text_encoders_run_in_bfloat16_or_else_in_float32(name: str) -> None:
    exact = PromptEncoder(DEMO_MODEL).encode_prompts(["a city at night"], 32)
    recipe = ENCODER_RECIPES[name]
    for on_card, dtype in (
        (recipe.on("bf16"), torch.bfloat16),
        (recipe.on("fp16"), torch.float32),
        (recipe.on("fp32"), torch.float32),
    ):
        found = PromptEncoder(DEMO_MODEL, on_card).encode_prompts(["a city at night"], 32)
        assert found.tokens.dtype is dtype
        assert sqnr_db(exact.tokens, found.tokens) > 20


def test_encoders_that_are_not_stored_in_fp8_keep_their_memory_on_a_cpu_without_bfloat16() -> None:
    assert ENCODER_RECIPES["bf16"].on("fp32").dtype is torch.bfloat16
    assert ENCODER_RECIPES["fp32"].on("fp32").dtype is torch.float32


def test_the_vae_runs_in_the_recipes_format_on_a_card_only_and_never_in_float16() -> None:
    on_card = {name: recipe.vae_dtype("cuda") for name, recipe in RECIPES.items()}
    assert on_card == {
        "fp8": torch.bfloat16,
        "fp8-adaln8": torch.bfloat16,
        "bf16": torch.bfloat16,
        "fp16": torch.float32,
        "fp32": torch.float32,
    }
    assert {recipe.vae_dtype("cpu") for recipe in RECIPES.values()} == {torch.float32}
