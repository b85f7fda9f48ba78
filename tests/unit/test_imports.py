"""Pure files need nothing but the standard library."""

import subprocess
import sys

PURE = [
    "autoscaling.load",
    "autoscaling.policy",
    "autoscaling.rates",
    "autoscaling.simulator",
    "autoscaling.workloads",
    "serve.request",
    "serve.errors",
    "serve.cost",
    "serve.dispatch.admission",
    "serve.dispatch.fair_queue",
    "serve.dispatch.forecast",
    "serve.dispatch.grants",
    "serve.dispatch.limits",
    "serve.dispatch.messages",
    "serve.dispatch.overview",
    "serve.dispatch.scaling",
    "serve.dispatch.tenant",
    "serve.engine.batching",
    "serve.engine.noise_schedule",
    "cluster.capability",
    "cluster.placement",
]
PROGRAM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "torch", "starlette", "pydantic"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
for module in sys.argv[1:]:
    __import__(module)
"""


def import_blocked(*modules: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - our own interpreter and arguments
        [sys.executable, "-c", PROGRAM, *modules], capture_output=True, text=True, check=False
    )


def test_pure_files_import_without_ray_torch_starlette_and_pydantic() -> None:
    result = import_blocked(*PURE)
    assert result.returncode == 0, result.stderr


def test_the_blocking_blocks() -> None:
    assert "pydantic is blocked" in import_blocked("serve.settings").stderr
