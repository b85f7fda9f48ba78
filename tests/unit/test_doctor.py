"""The findings of `octet doctor` on described machines."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.capability import Device
from cluster.placement import Node
from serve.cli.doctor_machine import Finding, Machine, examine
from serve.cli.doctor_settings import examine_cluster, examine_settings
from serve.cli.main import app
from serve.settings.application import Settings
from serve.settings.file import load_settings

EXAMPLES = Path(__file__).parents[2] / "examples"
H100 = Machine(
    device=Device("NVIDIA H100 80GB HBM3", (9, 0), 79.1),
    gpus=1,
    cpus=16,
    free_gib=78.6,
    torch="2.13.0",
    torch_cuda="13.0",
    driver="580.159.04",
    fp8_error="",
    compile_error="",
    disk_free_gib=500.0,
    nvcc=True,
)
A100 = replace(H100, device=Device("NVIDIA A100-SXM4-80GB", (8, 0), 79.2))
LAPTOP = replace(
    H100,
    device=Device("cpu", None, 16.0),
    gpus=0,
    free_gib=16.0,
    torch="2.13.0+cpu",
    torch_cuda=None,
    driver=None,
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def settings(name: str, **environ: str) -> Settings:
    return load_settings(EXAMPLES / name, {"OCTET_HTTP__PORT": str(free_port()), **environ})


def texts(findings: Iterable[Finding], verdict: str) -> str:
    return "\n".join(f.text for f in findings if f.verdict == verdict)


def test_a_good_card_has_no_problem() -> None:
    findings = list(examine(H100))
    assert not texts(findings, "problem")
    assert not texts(findings, "note")
    assert "1 × NVIDIA H100 80GB HBM3, 78.6 of 79.1 GiB free" in texts(findings, "ok")
    assert "capability 9.0 has FP8" in texts(findings, "ok")
    assert "the card is known as 'h100'" in texts(findings, "ok")


@pytest.mark.parametrize(
    ("example", "card", "gib"),
    [
        ("consumer-8gb.yaml", "NVIDIA GeForce RTX 4060 Laptop GPU", 7.75),
        ("one-card-24gb.yaml", "NVIDIA GeForce RTX 4090", 23.51),
    ],
)
def test_the_examples_for_small_cards_fit_by_computation(
    example: str, card: str, gib: float
) -> None:
    """Every replica is promised the memory that its slots need, and all promises fit the card."""
    machine = replace(H100, device=Device(card, (8, 9), gib), free_gib=gib)
    found = settings(example)
    findings = list(examine_settings(found, machine))
    assert not [f.text for f in findings if "GiB" in f.text and f.verdict != "ok"]
    parts = [pool.num_gpus for model in found.models for pool in model.pools]
    assert sum(parts) + sum(encoder.num_gpus for encoder in found.text_encoders) <= 1
    (model,) = found.models
    tight = found.model_copy(
        update={
            "models": [
                model.model_copy(
                    update={"pools": (model.pools[0].model_copy(update={"slots": 16}),)}
                )
            ]
        }
    )
    assert "are promised" in texts(examine_settings(tight, machine), "note")


@pytest.mark.parametrize(
    ("machine", "problem"),
    [
        (replace(LAPTOP, driver="470.82.01", torch_cuda="12.8"), "470.82.01 is older than R535"),
        (replace(LAPTOP, driver="570.1", torch_cuda="13.0"), "570.1 is older than R580"),
        (replace(H100, fp8_error="a small FP8 product fails: x"), "fails: x: FP8 pools cannot run"),
        (replace(H100, compile_error="RuntimeError: no gcc"), "FP8 without it is slower"),
        (replace(LAPTOP, driver="580.1"), "torch 2.13.0+cpu is built without CUDA"),
        (replace(LAPTOP, driver="580.1", torch_cuda="13.0"), "torch sees no card"),
    ],
)
def test_problems_of_a_machine_are_named(machine: Machine, problem: str) -> None:
    assert problem in texts(examine(machine), "problem")
    assert not texts(examine(machine, needs_gpu=False), "problem")


def test_notes_on_a_machine_are_no_problems() -> None:
    assert "no FP8 tensor cores (8.9 needed)" in texts(examine(A100), "note")
    assert "no GPU" in texts(examine(LAPTOP), "note")
    tight = replace(H100, disk_free_gib=20.0)
    assert "20 GiB of disk free for weights; SD3.5 Large" in texts(examine(tight), "note")
    unheard_of = replace(H100, device=Device("NVIDIA Unheard-Of", (12, 1), 48.0), driver=None)
    assert "not in Octet's list of cards" in texts(examine(unheard_of), "note")


def test_a_model_folder_without_a_model_is_a_problem(tmp_path: Path) -> None:
    """`octet pull` could not help there; a model of the hub is only a note."""
    (tmp_path / "empty").mkdir()
    file = tmp_path / "octet.yaml"
    text = (EXAMPLES / "laptop.yaml").read_text()
    file.write_text(text.replace("../demo/model", "empty"))
    found = texts(examine_settings(load_settings(file, {}), LAPTOP), "problem")
    assert f"the folder {tmp_path / 'empty'} has no model_index.json: no model is there" in found


def test_the_laptop_runs_the_demo_and_not_the_real_models() -> None:
    assert not texts(examine_settings(settings("laptop.yaml"), LAPTOP), "problem")
    problems = texts(examine_settings(settings("sd35.yaml"), LAPTOP), "problem")
    assert "pool sd3.5-large-fp8: takes 0.3 GPU, and this machine has none" in problems
    assert "text encoder sd35: takes 0.1 GPU" in problems


def test_a_pool_that_cannot_run_is_no_problem_while_another_can() -> None:
    """On an A100 the 16-bit pools serve Large and Medium; Turbo has only an FP8 pool."""
    findings = list(examine_settings(settings("sd35.yaml"), A100))
    assert "pool sd3.5-large-fp8: NVIDIA A100" in texts(findings, "note")
    assert texts(findings, "problem").splitlines() == [
        "pool sd3.5-large-turbo-fp8: NVIDIA A100-SXM4-80GB: capability 8.0 has no FP8 tensor "
        "cores (8.9 needed)"
    ]


def test_taken_memory_and_too_small_promises_are_reported() -> None:
    full = replace(H100, free_gib=10.0)
    problems = texts(examine_settings(settings("sd35.yaml"), full), "problem")
    assert "sd3.5-large-turbo-fp8: promised 23.7 GiB, and only 10.0 GiB are free" in problems
    small = settings("sd35.yaml", OCTET_MODELS__0__POOLS__0__NUM_GPUS="0.1")
    notes = texts(examine_settings(small, H100), "note")
    assert "sd3.5-large-fp8: promised 7.9 GiB, and its weights alone need 11.1" in notes
    tight = settings("sd35.yaml", OCTET_MODELS__0__POOLS__0__NUM_GPUS="0.15")
    notes = texts(examine_settings(tight, H100), "note")
    assert "pool sd3.5-large-fp8: 4 images of 1048576 pixels need 16." in notes
    assert "and 11.9 GiB are promised" in notes
    poor = settings("sd35.yaml", OCTET_TEXT_ENCODERS__0__NUM_GPUS="0.01")
    problems = texts(examine_settings(poor, H100), "problem")
    assert "text encoder sd35: promised 0.8 GiB, and its weights alone need 6.8" in problems


@pytest.mark.parametrize("part", ["1.0", "0.9999"])
def test_a_whole_card_is_free_although_the_doctor_itself_takes_some(part: str) -> None:
    whole = settings("sd35.yaml", OCTET_MODELS__1__POOLS__0__NUM_GPUS=part)
    assert "promised" not in texts(examine_settings(whole, H100), "problem")


def test_pools_that_fit_alone_but_not_together_are_a_problem() -> None:
    large = {f"OCTET_MODELS__{m}__POOLS__0__NUM_GPUS": "0.6" for m in range(3)}
    without_16_bit = {f"OCTET_MODELS__{m}__POOLS__1__NUM_GPUS": "0.6" for m in (0, 2)}
    problems = texts(
        examine_settings(settings("sd35.yaml", **large, **without_16_bit), H100), "problem"
    )
    assert "one replica of each model take 1.90 GPUs together, and this machine has 1" in problems
    problems = texts(examine_settings(settings("sd35.yaml"), replace(H100, cpus=2)), "problem")
    assert "everything takes 5.0 CPUs, and this machine has 2" in problems


def test_planned_settings_have_no_problem(tmp_path: Path) -> None:
    args = ["plan", "--gpu", "h100", "--config", str(EXAMPLES / "sd35.yaml"), "--settings"]
    (tmp_path / "planned.yaml").write_text(CliRunner().invoke(app, args).stdout)
    planned = load_settings(tmp_path / "planned.yaml", {"OCTET_HTTP__PORT": str(free_port())})
    findings = list(examine_settings(planned, H100))
    assert not texts(findings, "problem")
    assert "promised" not in texts(findings, "note")


def test_a_pool_bound_to_another_card_is_a_problem() -> None:
    bound = settings("sd35.yaml", OCTET_MODELS__1__POOLS__0__CARD="h200")
    problems = texts(examine_settings(bound, H100), "problem")
    assert "sd3.5-large-turbo-fp8-h200: bound to h200, and the card here is h100" in problems


def test_quanto_on_a_card_needs_nvcc() -> None:
    without = replace(H100, nvcc=False)
    quanto = settings("sd35.yaml", OCTET_TEXT_ENCODERS__0__PRECISION="t5-quanto")
    assert "with nvcc" in texts(examine_settings(quanto, without), "note")
    assert "nvcc" not in texts(examine_settings(quanto, H100), "note")
    assert "nvcc" not in texts(examine_settings(settings("sd35.yaml"), without), "note")


def test_a_taken_port_is_a_problem() -> None:
    taken = settings("laptop.yaml")
    with socket.socket() as other:
        other.bind(("127.0.0.1", taken.http.port))
        other.listen()
        problems = texts(examine_settings(taken, LAPTOP), "problem")
    assert "cannot listen on 127.0.0.1:" in problems


def test_the_nodes_of_a_cluster_are_examined() -> None:
    nodes = [
        Node("head", num_cpus=4),
        Node("a" * 12, {"ray.io/accelerator-type": "T4"}, num_cpus=4, num_gpus=2),
        Node("b" * 12, {"ray.io/accelerator-type": "Odd"}, num_cpus=4, num_gpus=1),
    ]
    findings = list(examine_cluster(nodes, settings("sd35.yaml")))
    assert "node aaaaaaaa: 2 × t4, 4 CPUs" in texts(findings, "ok")
    assert "unknown card Odd" in texts(findings, "note")
    assert "pool sd3.5-large-fp8: none of the nodes" in texts(findings, "note")
    # 0.4 of a T4 are 5.8 GiB; the memory of the odd card is unknown.
    assert "pool sd3.5-large-fp16: 1 of the nodes" in texts(findings, "ok")
    assert "text encoder sd35: 1 of the nodes" in texts(findings, "ok")
    assert texts(findings, "problem") == "pool sd3.5-large-turbo-fp8: none of the nodes can hold it"


def test_a_cpu_without_bfloat16_is_examined_like_any_other() -> None:
    slow = replace(LAPTOP, device=Device("cpu", None, 16.0, cpu_bf16=False))
    found, usual = (
        texts(examine_settings(settings("laptop.yaml"), machine), "note")
        for machine in (slow, LAPTOP)
    )
    assert found == usual


def test_a_store_is_opened(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/octet.db"
    found = settings("laptop.yaml", OCTET_STORE__URL=url)
    assert f"database {url}: its tables are up to date" in texts(
        examine_settings(found, LAPTOP), "ok"
    )
    port = free_port()
    found = settings("laptop.yaml", OCTET_STORE__URL=f"postgresql://u@127.0.0.1:{port}/octet")
    (problem,) = texts(examine_settings(found, LAPTOP), "problem").splitlines()
    assert problem.startswith(f"database: postgresql://u@127.0.0.1:{port}/octet: connection failed")
