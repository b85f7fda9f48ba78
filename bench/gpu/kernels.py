"""List the CUDA kernels of a transformer block, with the bytes that they move, without a GPU.

    python -m bench.gpu.kernels [--json]    # needs Triton: `make check-kernels` installs it

torch's compiler generates the code of a block for an H100 here, although this machine has none: it
is told of a card (`pretend_h100`), and the block's tensors have shapes but no numbers. Triton then
compiles the kernels for the card, which tells how many registers they need. Nothing runs.

A block of SD3.5 Large and one of Medium with its second attention are measured at 1024² for one
image with guidance, in FP8: with the kernels that Octet chooses, with those that torch chooses by
itself, and with kernels of independent rows combined (`combo_kernels`, which torch calls
experimental).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers.models.attention import JointTransformerBlock
from torch import nn

from cluster.footprint import TEXT_TOKENS
from cluster.structure import TOKEN_PX, Structure, structure
from serve.engine.compiled import compile_blocks
from serve.engine.fused_attention import fuse_qkv
from serve.engine.modulation import Modulation
from serve.engine.precision import RECIPES, apply_recipe

from .model import Kernels, choose_kernels

ROWS = 2  # one image with guidance
SIDE_PX = 1024
MODELS = "sd3.5-large", "sd3.5-medium"
# The kinds of kernels, by how the names of their calls begin.
KINDS = {
    "triton": "triton_",
    "_scaled_mm": "_scaled_mm",
    "addmm": "addmm",
    "attention": "_scaled_dot_product",
}
OTHER = "other"

H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
    total_memory=80 * 2**30,
    gcnArchName="",
)
CALLED = re.compile(
    r"^ +(?:buf\d+ = )?(?:(?=triton_\w+\.run)|extern_kernels\.|torch\.ops\.\w+\.)(\w+)", re.M
)


class Kernel(NamedTuple):
    """A kernel that Triton compiled, and how often the block calls it.

    `gb`: gigabytes of the tensors that it reads and writes, each counted once. `loads`, `stores`:
    how often its code names a tensor to read or to write it; a tensor that is read twice counts
    twice. `gelus`: how often it computes GELU of a number. `registers`: of a thread, at most, over
    the variants of which the card will choose the fastest. `spilled`: bytes of a thread that found
    no place in registers.
    """

    name: str
    calls: int
    gb: float
    loads: int
    stores: int
    gelus: int
    registers: int
    spilled: int


class Block(NamedTuple):
    """The kernels of one transformer block.

    `calls`: how often the block calls a kernel, by kind. `kernels`: those that Triton compiled.
    """

    calls: Counter[str]
    kernels: list[Kernel]

    def total(self, what: str) -> float:
        """The sum of a field over all calls of kernels."""
        return float(sum(kernel.calls * getattr(kernel, what) for kernel in self.kernels))


# -- a card that is not there ---------------------------------------------------------------------


def pretend_h100() -> None:
    """Make torch's compiler and Triton generate code for an H100, for the rest of this process."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config
    from torch._inductor.fx_passes import fuse_attention, pad_mm
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    compiler = importlib.import_module("triton.backends.compiler")
    nvidia_driver = importlib.import_module("triton.backends.nvidia.driver")
    driver = importlib.import_module("triton.runtime.driver").driver

    zeros = "current_device", "synchronize", "set_device", "exchange_device"
    interface = dict.fromkeys((*zeros, "maybe_exchange_device", "get_raw_stream"), 0) | {
        "is_available": True,
        "is_triton_capable": True,
        "is_bf16_supported": True,
        "raise_if_triton_unavailable": None,
        "device_count": 1,
        "get_compute_capability": 90,
        "get_device_properties": H100,
    }
    _answer(CudaInterface, interface)
    _answer(CudaInterface.Worker, {"current_device": 0, "get_device_properties": H100})
    module = {
        "is_available": True,
        "current_device": 0,
        "device_count": 1,
        "get_device_properties": H100,
        "get_device_capability": (9, 0),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    _answer(torch.cuda, module)
    torch.version.cuda = "13.0"
    # These two look for patterns that the blocks do not have, and compute on the card to find them.
    _answer(fuse_attention, {"_sfdp_init": None})
    _answer(pad_mm, {"_pad_mm_init": None})
    # Indexing and the choice of attention need a torch that was built for CUDA.
    for tensor in FakeTensor, FunctionalTensor:
        _put(tensor, "__getitem__", _indexed)
    _put(F, "scaled_dot_product_attention", _flash_attention)
    stand_in = SimpleNamespace(
        get_current_target=lambda: compiler.GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    _put(nvidia_driver.CudaDriver, "__new__", lambda _: stand_in)
    driver.set_active(stand_in)
    config.fx_graph_cache = config.use_static_cuda_launcher = False
    config.compile_threads = 1
    config.profile_bandwidth = True  # writes the bytes of each kernel into the code


def _put(place: Any, name: str, value: Any) -> None:
    setattr(place, name, value)


def _answer(place: Any, answers: Mapping[str, Any]) -> None:
    """Replace functions of a module or a class by ones that return these values."""
    for name, value in answers.items():
        _put(place, name, staticmethod(lambda *_, value=value, **__: value))


def _indexed(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """`tensor[index]` for slices and None."""
    for dim, part in enumerate(index if isinstance(index, tuple) else (index,)):
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif part != slice(None):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, part.start, part.stop)
    return tensor


def _flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


# -- a block and its code -------------------------------------------------------------------------


class _Generated(BaseException):
    """Carries the generated code out of the compiler."""


def block(s: Structure) -> tuple[Any, int]:
    """Make a transformer of one block, in FP8 on the meta device; returns its modulation width too.

    The block is one from the middle: in SD3.5 the last one differs.
    """
    made: Any = nn.Module()
    made.time_text_embed = nn.Identity()
    with torch.device("meta"):
        layer = JointTransformerBlock(
            s.width,
            s.width // s.head_width,
            s.head_width,
            context_pre_only=False,
            qk_norm="rms_norm",
            use_dual_attention=bool(s.dual_layers),
        )
    made.transformer_blocks = nn.ModuleList([layer])
    apply_recipe(fuse_qkv(made), RECIPES["fp8"])
    outs = [m.out_features for n, m in layer.named_modules() if fnmatch(n, "norm1*.linear")]
    Modulation(made)
    return made.eval().requires_grad_(False), sum(outs)


def generated(s: Structure, choice: Kernels) -> str:
    """The code that torch's compiler generates for a block."""
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    def stop(graph: Any) -> None:
        raise _Generated(graph.codegen()[0].value)

    torch._dynamo.reset()
    tokens = (SIDE_PX // TOKEN_PX) ** 2
    made, modulation_width = block(s)
    compile_blocks(made, {(ROWS, tokens)})
    choose_kernels(choice)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.inference_mode(),
        mock.patch.object(GraphLowering, "compile_to_module", stop),
    ):
        for module in made.modules():
            tensors: Any
            for tensors in module._parameters, module._buffers:
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = torch.empty_like(tensor, device="cuda")

        def random(*shape: int) -> torch.Tensor:
            return torch.empty(shape, device="cuda", dtype=torch.bfloat16)

        try:
            made.transformer_blocks[0](
                hidden_states=random(ROWS, tokens, s.width),
                encoder_hidden_states=random(ROWS, TEXT_TOKENS, s.width),
                temb=random(ROWS, modulation_width),
            )
        except _Generated as code:
            return str(code)
    raise RuntimeError("the compiler generated no code")


def read(code: str, folder: Path) -> Block:
    """Compile the kernels in generated code, and count them; `folder` takes their files."""
    called = Counter(CALLED.findall(code))
    calls: Counter[str] = Counter()
    for name, times in called.items():
        kind = next((kind for kind, prefix in KINDS.items() if name.startswith(prefix)), OTHER)
        calls[kind] += times
    sources = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.S)
    return Block(calls, [_compiled(name, called[name], source, folder) for name, source in sources])


def _compiled(name: str, calls: int, source: str, folder: Path) -> Kernel:
    file = folder / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tuner = getattr(module, name)
    needs = [_registers(tuner._precompile_config(config), folder) for config in tuner.configs]
    gb = re.search(r"'kernel_num_gb': ([\d.e-]+)", source)
    assert gb
    return Kernel(
        name,
        calls,
        float(gb[1]),
        source.count("tl.load("),
        source.count("tl.store("),
        source.count("tanh("),
        *map(max, zip(*needs, strict=True)),
    )


def _registers(compiled: Any, folder: Path) -> tuple[int, int]:
    """Registers of a thread of a compiled kernel, and bytes that found no place in them."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.kernel.asm["cubin"])
    nvidia = importlib.import_module("triton.backends.nvidia").__path__[0]
    tool = Path(nvidia) / "bin" / "cuobjdump"
    printed = subprocess.run(  # noqa: S603 - Triton's own tool
        [tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True
    )
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", printed.stdout)
    assert usage, printed.stdout
    return int(usage[1]), int(usage[2]) + int(usage[3])


def measure() -> dict[str, dict[str, Block]]:
    """The kernels of a block, by model and by choice."""
    pretend_h100()
    with tempfile.TemporaryDirectory() as folder:
        return {
            model: {
                choice: read(generated(structure(model), choice), Path(folder))
                for choice in get_args(Kernels)
            }
            for model in MODELS
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print all kernels as JSON")
    arguments = parser.parse_args()
    try:
        triton = version("triton")
    except PackageNotFoundError:
        raise SystemExit("this needs Triton: `make check-kernels` installs it") from None
    found = measure()
    if arguments.json:
        rows = {
            model: {
                choice: {"calls": b.calls, "kernels": [k._asdict() for k in b.kernels]}
                for choice, b in by_choice.items()
            }
            for model, by_choice in found.items()
        }
        print(json.dumps(rows))
        return
    print(f"torch {torch.__version__}, triton {triton}, code for an H100; one block,")
    print(f"{SIDE_PX}², {ROWS} rows, FP8\n")
    columns = "model", "chosen by", *KINDS, OTHER, "GB", "loads", "stores", "GELUs", "spilled"
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for model, by_choice in found.items():
        for choice, b in by_choice.items():
            calls = " | ".join(str(b.calls[kind]) for kind in (*KINDS, OTHER))
            totals = " | ".join(
                f"{b.total(what):.3g}" for what in ("gb", "loads", "stores", "gelus", "spilled")
            )
            print(f"| {model} | {choice} | {calls} | {totals} |")


if __name__ == "__main__":
    main()
