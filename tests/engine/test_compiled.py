"""Tests that compiled blocks compute what eager ones do, and that no request waits for a compiler.

Most tests use a backend that traces like the real one but generates no code. So they need no C++
compiler and less time.
"""

from __future__ import annotations

import contextvars
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch._dynamo.utils import counters
from typer.testing import CliRunner

from serve.cli import doctor_machine
from serve.cli.main import app
from serve.engine import precompile, warm_up
from serve.engine.compiled import compile_blocks, preferred
from serve.engine.compiled_code import CompiledCode, usable_cpus
from serve.engine.denoiser import Denoiser
from serve.engine.denoising_loop import DenoisingLoop
from serve.engine.precision import RECIPES
from serve.engine.prompt_embeds import PromptEmbeds
from serve.engine.warm_up import Phases, WarmUp, choose_layout
from serve.request import ImageRequest
from serve.settings.models import Pool

from ..builders import DEMO_MODEL, ROOT
from ..ports import free_port

TOKENS = 109  # text tokens of each prompt of the demo model


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def embeds() -> PromptEmbeds:
    torch.manual_seed(0)
    return PromptEmbeds(torch.randn(2, TOKENS, 128), torch.randn(2, 128))


def latents(denoiser: Denoiser, px: int, images: int, guided: bool = True) -> torch.Tensor:
    """The latents of a batch of `images` images of `px` × `px` after two steps."""
    both = embeds()
    rows = both if guided else PromptEmbeds(both.tokens[:1], both.pooled[:1])
    batch = [
        denoiser.begin(rows, width=px, height=px, num_inference_steps=2, guidance_scale=3.0, seed=s)
        for s in range(images)
    ]
    for _ in range(2):
        denoiser.denoise_step(batch)
    return torch.cat([image.latents for image in batch])


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def shortened() -> Denoiser:
    """The demo model in FP8 with one block of each of its three kinds: first, middle, last."""
    denoiser = Denoiser.load(DEMO_MODEL, RECIPES["fp8"])
    del denoiser.transformer.transformer_blocks[2:-1]
    return denoiser


def test_compiled_blocks_compute_the_same_latents_as_eager_ones() -> None:
    eager, compiled = shortened(), shortened()
    compile_blocks(compiled.transformer, {(2, 64)}, backend="eager")
    for px, images in ((128, 1), (160, 2)):  # a shape with code of its own, and another one
        assert torch.equal(latents(eager, px, images), latents(compiled, px, images))


def in_thread(run: Callable[..., Any], threads: set[str]) -> Callable[..., Any]:
    """The same function, which adds the name of the thread that calls it to `threads`."""

    def called(*args: Any) -> Any:
        threads.add(threading.current_thread().name)
        return run(*args)

    return called


@pytest.mark.long
def test_after_the_warm_up_nothing_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other sizes than `warm_sizes`, other numbers of rows and a single row need no new code."""
    denoiser = shortened()
    del denoiser.transformer.transformer_blocks[1:]
    pool = Pool(
        precision="fp8", num_gpus=1, slots=1, compile="default", warm_sizes=("128x128", "192x128")
    )
    warming = WarmUp(denoiser, pool, str(tmp_path), backend="eager")
    warming.prepare()
    used: dict[str, set[str]] = {"denoise_step": set(), "decode": set()}
    for name, threads in used.items():
        run = getattr(denoiser, name)
        monkeypatch.setattr(denoiser, name, in_thread(run, threads))
    loop = DenoisingLoop(denoiser, max_rows=2, beside_steps=True)
    code = CompiledCode(tmp_path / torch.__version__, warming._kind(embeds()))
    phases = Phases()
    with code.compiling():  # as if another replica of this node and kind were compiling
        run = contextvars.copy_context().run  # the way in which asyncio.to_thread calls a function
        thread = threading.Thread(
            target=run, args=(warming.run, loop, embeds(), phases), daemon=True
        )
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert graphs() == 0
    thread.join()
    assert code.complete
    assert phases.seconds["lock"] > 0.1
    assert phases.seconds["warm-up"] > 0
    # cuDNN keeps its plans by thread, so the warm-up is of use in the serving threads only.
    assert used == {"denoise_step": {"denoising"}, "decode": {"decoding_0"}}
    loop.close()
    made = graphs()
    # Code for two sizes in 1 and 2 rows each, and flexible code for one row and for several.
    assert 2 * 2 <= made <= 2 * 2 + 3
    for px, images, guided in (
        (128, 1, True),
        (128, 1, False),
        (64, 1, False),
        (160, 2, True),
        (208, 1, False),
    ):
        latents(denoiser, px, images, guided)
    assert graphs() == made


def test_replicas_wait_for_each_other_only_while_code_is_missing(tmp_path: Path) -> None:
    code, same = CompiledCode(tmp_path, {"card": "a"}), CompiledCode(tmp_path, {"card": "a"})
    other = CompiledCode(tmp_path, {"card": "b"})
    order: list[str] = []

    def second() -> None:
        with same.compiling():
            order.append("second")

    thread = threading.Thread(target=second)
    with pytest.raises(RuntimeError, match="no memory"), code.compiling():
        raise RuntimeError("no memory")
    assert not code.complete
    with code.compiling():
        thread.start()
        with other.compiling():  # another kind does not wait
            order.append("other")
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["other", "first", "second"]
    assert code.complete
    with code.compiling():  # complete: nobody waits any more
        second()
    assert order[-1] == "second"


def test_a_volume_that_cannot_be_written_only_costs_the_mark(tmp_path: Path) -> None:
    code = CompiledCode(tmp_path / "missing", {"card": "a"})
    with code.compiling():
        pass
    assert not code.complete


def test_a_pools_compile_setting_decides_how_it_compiles() -> None:
    modes = {
        mode: warm_up.chosen_mode(Pool(precision="fp16", compile=mode), on_cuda=False)
        for mode in get_args(Pool.model_fields["compile"].annotation)
    }
    assert modes == {
        "auto": "off",
        "off": "off",
        "default": "default",
        "max-autotune": "max-autotune",
    }
    assert warm_up.warm_sizes(Pool(precision="fp16"), 128) == [(128, 128)]


@pytest.mark.long
def test_code_is_compiled_ahead_and_its_mark_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command compiles for examples/laptop.yaml, with few blocks and torch's eager backend.

    `octet doctor` says what is missing before, and what is there afterwards.
    """
    denoiser = shortened()
    monkeypatch.setattr(Denoiser, "load", lambda *_: denoiser)
    monkeypatch.setattr(doctor_machine, "_compile_error", lambda: "")  # it takes 10 s
    monkeypatch.setattr(precompile, "WarmUp", functools.partial(warm_up.WarmUp, backend="eager"))
    pool = "OCTET_MODELS__0__POOLS__0__"
    for name, value in {
        f"{pool}COMPILE": "default",
        f"{pool}SLOTS": "1",
        f"{pool}WARM_SIZES": '["64x64"]',
        "OCTET_COMPILED_FOLDER": str(tmp_path),
        "OCTET_HTTP__PORT": str(free_port()),
    }.items():
        monkeypatch.setenv(name, value)

    def octet(command: str) -> str:
        result = CliRunner().invoke(app, [command, str(ROOT / "examples" / "laptop.yaml")])
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    assert "code of pool landscapes-fp8 is not compiled here: run octet compile" in octet("doctor")
    said = octet("compile")
    assert "landscapes-fp8: compiled in" in said
    assert "landscapes-fp16: nothing to compile here" in said
    assert "landscapes-fp8: compiled already" in octet("compile")
    assert "not compiled here" not in octet("doctor")
    monkeypatch.setenv(f"{pool}SLOTS", "2")  # other numbers of rows need other code
    assert "is not compiled here" in octet("doctor")


@pytest.mark.parametrize("fast", [torch.channels_last, torch.contiguous_format])
def test_the_vae_gets_the_layout_in_which_it_decodes_faster(
    fast: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = Denoiser.load(DEMO_MODEL, RECIPES["bf16"])
    weight = denoiser.vae.decoder.conv_in.weight

    def decode(_: torch.Tensor) -> None:
        if not weight.is_contiguous(memory_format=fast):
            time.sleep(0.05)

    monkeypatch.setattr(denoiser, "decode", decode)
    assert choose_layout(denoiser, torch.zeros(1)) == str(fast).removeprefix("torch.")
    assert weight.is_contiguous(memory_format=fast)


@pytest.mark.parametrize(
    ("limit", "cpus"), [("150000 100000", 2), ("max 100000", 3), ("", 3), (None, 3)]
)
def test_compilers_are_as_many_as_the_containers_cpus(
    limit: str | None, cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    file = tmp_path / "cpu.max"
    if limit is not None:
        file.write_text(limit)
    assert usable_cpus(file) == cpus


def test_an_attention_kernel_is_preferred_only_for_a_clear_gain() -> None:
    assert preferred({"cudnn": 0.95, "flash": 1.0}) == ["flash", "cudnn"]
    assert preferred({"cudnn": 0.8, "flash": 1.0}) == ["cudnn", "flash"]
    assert preferred({"efficient": 2.0}) == ["efficient"]
    assert preferred({}) == []


def test_inputs_that_the_preferred_attention_refuses_are_still_computed() -> None:
    script = """
import torch, torch.nn.functional as F
from serve.engine.compiled import prefer_attention
x = torch.randn(1, 1, 64, 512)
before = F.scaled_dot_product_attention(x, x, x)
prefer_attention(["cudnn"])
assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
assert torch._C._get_sdp_priority_order()[0] == int(torch.nn.attention.SDPBackend.CUDNN_ATTENTION)
assert torch.allclose(F.scaled_dot_product_attention(x, x, x), before, atol=1e-5)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)  # noqa: S603 - our own


@pytest.mark.long
def test_the_loops_thread_compiles_more_than_eight_shapes() -> None:
    """torch keeps the limits of its compiler in a context.

    A thread that does not get this context may compile only eight shapes.
    """
    denoiser = Denoiser.load(DEMO_MODEL, RECIPES["bf16"])
    del denoiser.transformer.transformer_blocks[1:]
    everything = {(2, side * side) for side in range(64)}
    compile_blocks(denoiser.transformer, everything, backend="eager")
    loop = DenoisingLoop(denoiser, max_rows=2)
    for px in range(32, 32 + 16 * 10, 16):
        request = ImageRequest(
            id="1", model="m", prompt="p", seed=0, width=px, height=px,
            num_inference_steps=1, guidance_scale=2.0,
        )  # fmt: skip
        loop.generate(request, embeds()).result()
    loop.close()
    assert graphs() == 10


def test_repetitions_of_a_phase_are_counted_under_one_name() -> None:
    phases = Phases()
    for _ in range(2):
        with phases.timed("load"):
            pass
    assert phases.seconds.keys() == {"load"}
    assert "load 0.0 s" in str(phases)


START = """
import json, sys
import torch
from torch._dynamo.utils import counters
from serve.engine.compiled_code import keep_compiled_code
keep_compiled_code(sys.argv[1])
torch.compile(torch.nn.Linear(16, 16))(torch.ones(2, 16))
print(json.dumps({k: counters["inductor"][k] for k in ("fxgraph_cache_hit", "fxgraph_cache_miss")}))
"""


@pytest.mark.skipif(
    shutil.which("g++") is None and not os.environ.get("REQUIRE_SERVERS"),
    reason="torch compiles for CPUs with g++",
)
@pytest.mark.long
def test_a_second_start_finds_the_compiled_code_of_the_first(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", START, str(tmp_path)]
    first, second = (
        json.loads(
            subprocess.run(  # noqa: S603 - our own interpreter and program
                command, capture_output=True, text=True, check=True
            ).stdout.splitlines()[-1]
        )
        for _ in range(2)
    )
    assert first == {"fxgraph_cache_hit": 0, "fxgraph_cache_miss": 1}
    assert second == {"fxgraph_cache_hit": 1, "fxgraph_cache_miss": 0}
    assert (tmp_path / torch.__version__).is_dir()
