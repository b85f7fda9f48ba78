"""Mistakes with every `octet` command: exit code, and a message that says what to do."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from serve.cli.main import app
from serve.cli.ray_cluster import ASKS_FOR_TOKEN, NO_RAY, nodes_of_cluster
from serve.launch import LaunchError

from ..builders import ROOT
from ..wait import wait_for

LAPTOP = str(ROOT / "examples" / "laptop.yaml")
NO_FILE = "examples/laptop.yaml is a complete settings file"
H100 = "plan --gpu h100 --model sd3.5-large"

# Command line, exit code, and the part of the message that says what is allowed or what to do.
# {}: an empty folder. {closed}: the address of a port where nothing listens.
MISTAKES = [
    ("serve nowhere.yaml", 2, NO_FILE),
    ("serve {}/models.yaml", 1, "did you mean 'models'?"),
    ("serve", 2, "Try 'octet serve --help' for help"),
    ("demo --port 70000", 2, "must be between 1 and 65535"),
    ("demo --prot 9000", 2, "(Possible options: --port)"),
    ("check-config nowhere.yaml", 2, NO_FILE),
    ("check-config {}/models.yaml", 1, "did you mean 'models'?"),
    ("check-config {}/empty.yaml", 1, "examples/laptop.yaml is a complete one"),
    ("check-config {}/broken.yaml", 1, "broken.yaml:1:10: not YAML"),
    ("doctor nowhere.yaml", 2, NO_FILE),
    ("doctor --ray {closed}", 1, "no Ray at {closed}: "),
    ("models nowhere.yaml", 2, NO_FILE),
    ("pull", 2, "name MODEL, or a settings file with --config"),
    ("pull landscape", 2, "neither a folder nor HUB/ID@REVISION"),
    ("pull --structures", 2, "give --config and no MODEL"),
    ("pull octet.yaml", 2, "is a settings file: octet pull --config octet.yaml"),
    ("compare recipe=bf16 recipe=fp8", 2, "needs the settings of its model: --config FILE"),
    (f"compare recipe=bf15 recipe=fp8 --config {LAPTOP}", 2, "did you mean 'bf16'?"),
    (f"compare recipe=bf16 recipe=fp8,quality=low,steps=9 --config {LAPTOP}", 2, "a quality, or"),
    (f"compare bf16 fp8 --config {LAPTOP}", 2, "expected NAME=VALUE"),
    (f"compare recipe=bf16 steps=3 --config {LAPTOP}", 2, "needs recipe=…"),
    (f"compare recipe=bf16 recipe=fp8,quality=best --config {LAPTOP}", 2, "known: auto"),
    (f"compare recipe=bf16 recipe=fp8 --config {LAPTOP} --size big", 2, "WIDTHxHEIGHT"),
    (f"compare recipe=bf16 recipe=fp8 --config {LAPTOP} --size 16x16", 1, "sides from 64"),
    (f"compare recipe=bf16 recipe=fp8 --config {LAPTOP} --category-min text", 2, "NAME=NUMBER"),
    (f"compare recipe=bf16 recipe=fp8 --config {LAPTOP} --category-min a=1", 2, "dark scenes"),
    ("compare url=http://{closed} url=http://{closed}", 1, "is the server running?"),
    ("compare {}/models.yaml.json {}/x.json", 1, "No such file"),
    ("calibrate landscapes", 2, "octet calibrate MODEL --config octet.yaml"),
    (f"calibrate landscape --config {LAPTOP}", 2, "did you mean 'landscapes'?"),
    (f"calibrate landscapes --config {LAPTOP} --suite nowhere", 1, "known: landscapes, sd35"),
    ("jobs list nowhere.yaml", 2, NO_FILE),
    (f"jobs list {LAPTOP}", 1, "names no database: set data_folder"),
    ("jobs list {}/stored.yaml --state done", 2, "'queued', 'running', 'succeeded'"),
    ("jobs show {}/stored.yaml job_1", 1, "nothing there has the id 'job_1'"),
    ("jobs retry {}/stored.yaml job_1", 1, "nothing there has the id 'job_1'"),
    ("jobs cancel {}/stored.yaml job_1", 1, "nothing there has the id 'job_1'"),
    ("jobs dead nowhere.yaml", 2, NO_FILE),
    ("store backup nowhere.yaml x.db", 2, NO_FILE),
    (f"store backup {LAPTOP} {{}}/x.db", 1, "names no database: set data_folder"),
    ("store import {}/stored.yaml --folder {}/none", 1, "there are no files of usage records"),
    ("convert nowhere.safetensors out", 2, "no such file or folder"),
    ("convert {}/empty.yaml {}/out", 1, "not a safetensors file"),
    ("quantize nowhere {}/out", 2, "neither a folder nor HUB/ID@REVISION"),
    ("quantize {} {}/out", 1, "{}: "),
    ("compile nowhere.yaml", 2, NO_FILE),
    (f"compile {LAPTOP} --pool landscape", 2, "did you mean 'landscapes-fp8'?"),
    ("plan --gpu h101 --model sd3.5-large", 2, "did you mean 'h100'?"),
    ("plan --gpu h100", 2, "give one of --model and --config, such as --model sd3.5-large"),
    (f"{H100} --size big", 2, "expected WIDTHxHEIGHT in pixels"),
    (f"{H100} --prices nowhere.yaml", 2, "no such file or folder"),
    (f"{H100} --prices {{}}/models.yaml", 1, "card 'modles': known: t4"),
    ("plan --gpu t4:4 --model sd3.5-large", 1, "sd3.5-large on t4: needs"),
    ("plan --ray {closed} --model sd3.5-medium", 1, "no Ray at {closed}: "),
    ("simulate --workload weekly", 2, "expected one of poisson"),
    ("simulate --hours 0.1 --plot {}/b.foo", 2, "--plot"),
    ("simulate --rate 0", 2, "greater than or equal to 0.001"),
    ("bench localhost:8000", 2, "expected http://HOST:PORT"),
    ("bench http://x --mix big", 2, "such as 512x512:28=3"),
    ("bench http://x --rate 1 --clients 2", 2, "give one of them"),
    ("bench http://{closed} --rate 20 --seconds 0.2", 1, "is the server running?"),
    ("usage", 2, "Name a settings file with data_folder or store by --config"),
    (f"usage --config {LAPTOP}", 1, "name no database: set data_folder"),
    ("usage --config {}/stored.yaml", 1, "on the node where the Dispatcher runs"),
    ("usage --config {}/stored.yaml --records --json", 2, "leave out --json"),
    ("usage --config {}/stored.yaml --since yesterday", 2, "expected YYYY-MM-DD"),
    ("tenant add acme", 2, "--config, or a running server with --url"),
    (f"tenant add acme --config {LAPTOP}", 1, "name no database: set data_folder"),
    ("tenant add a_b --config {}/stored.yaml", 1, "an id is"),
    ("tenant add acme --url http://{closed}", 1, "is the server running?"),
    ("tenant set acme --config {}/stored.yaml", 2, "name a limit, such as --monthly-work"),
    ("tenant set acme --config {}/stored.yaml --weight 2", 1, "tenant 'acme' does not exist"),
    ("tenant set acme --config {}/stored.yaml --unset x", 1, "tenant 'acme' does not exist"),
    ("tenant list", 2, "--config, or a running server with --url"),
    ("tenant add-key acme --config {}/stored.yaml", 1, "tenant 'acme' does not exist"),
    ("tenant add-key a --config {}/stored.yaml --scope all", 1, "unknown scope 'all'"),
    ("tenant add-key a --config {}/stored.yaml --expires soon", 1, "must be a time such as"),
    ("tenant revoke acme --config {}/stored.yaml", 1, "tenant 'acme' does not exist"),
    ("tenant remove acme --config {}/stored.yaml", 2, "there is no terminal to ask; add --yes"),
    ("tenant apply nowhere --config {}/stored.yaml", 2, "no such file or folder"),
    ("tenant apply {} --config {}/stored.yaml", 1, "tenants.yaml: no such file"),
    ("tenant audit", 2, "--config, or a running server with --url"),
    ("tenant erase acme", 2, "Name a settings file with --config"),
    (f"tenant erase acme --config {LAPTOP}", 1, "name no database: set data_folder"),
    ("top nowhere", 2, "expected http://HOST:PORT"),
    ("top http://{closed}", 1, "is the server running?"),
    ("node cordon '' --url http://{closed}", 2, "octet top shows the ids of the nodes"),
    ("node cordon 3f --url http://{closed}", 1, "is the server running?"),
    ("node uncordon 3f --url http://{closed}", 1, "is the server running?"),
    ("k8s render nowhere.yaml --overlay {}", 2, NO_FILE),
    (f"k8s render {LAPTOP} --overlay nowhere", 2, "no such file or folder"),
    (f"k8s render {LAPTOP} --overlay {{}}", 1, "nodes.yaml"),
    ("k8s leave", 2, "Try 'octet k8s leave --help' for help"),
    ("k8s leave 10", 1, "no Ray at {closed}: "),
]


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The words of each command, and the command; groups of commands are left out."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield path, command
    for name, one in (inner or {}).items():
        yield from commands(one, (*path, name))


COMMANDS = dict(commands(get_command(app)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "empty.yaml").write_text("")
    laptop = Path(LAPTOP).read_text().replace("../demo", str(ROOT / "demo"))
    (tmp_path / "stored.yaml").write_text(f"{laptop}data_folder: data\n")
    (tmp_path / "models.yaml").write_text("modles: []\n")
    (tmp_path / "broken.yaml").write_text("models: [}\n")
    return tmp_path


@pytest.fixture(scope="module")
def closed() -> Iterator[str]:
    """The address of a port that stays closed: it is bound, but nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@pytest.mark.parametrize(("line", "code", "advice"), MISTAKES, ids=[line for line, *_ in MISTAKES])
def test_a_mistake_is_explained(
    line: str, code: int, advice: str, folder: Path, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", closed)
    monkeypatch.setenv("COLUMNS", "200")
    words = shlex.split(line.replace("{closed}", closed).replace("{}", str(folder)))
    result = CliRunner().invoke(app, words, prog_name="octet")
    said = " ".join(result.stderr.split())
    wanted = advice.replace("{closed}", closed).replace("{}", str(folder))
    assert (result.exit_code, wanted in said) == (code, True), result.output
    assert not re.search(r"Traceback|\b[A-Z]\w*(Error|Exception)\b", result.output), result.output


def test_every_command_is_among_the_mistakes() -> None:
    lines = [line for line, *_ in MISTAKES]
    for path in COMMANDS:
        assert any(line.startswith(" ".join(path)) for line in lines), path


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_command_has_two_examples_that_it_understands(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    lines = re.findall(r"`(.+?)`", command.epilog or "")
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(line)
        del words[: words.index("octet") + 1]
        assert words[: len(path)] == list(path)
        with command.make_context(line, words[len(path) :], resilient_parsing=True) as context:
            assert not context.args
        options = {name for param in command.params for name in param.opts}
        assert {word for word in words if word.startswith("--")} <= options


def test_ctrl_c_ends_a_command_that_waits_for_ray() -> None:
    """Something listens at the address, but is no Ray; Ray's client would try for a minute."""
    octet = Path(sys.executable).parent / "octet"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with subprocess.Popen(  # noqa: S603 - our own command
            [octet, "doctor", "--ray", address], stderr=subprocess.DEVNULL, start_new_session=True
        ) as doctor:
            wait_for(lambda: bool(psutil.Process(doctor.pid).children()))
            os.killpg(doctor.pid, signal.SIGINT)  # as a terminal does
    assert doctor.returncode == 130


def test_the_whole_reason_why_ray_refuses_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "Version mismatch: the cluster was started with:\n    Ray: 1.0\n    Python: 3.9"
    for code, out, err, says in (
        (NO_RAY, json.dumps(reason), "noise", f"no Ray at auto: {reason}"),
        (ASKS_FOR_TOKEN, "", "noise", "the Ray at auto asks for a token"),
        (1, "", "Traceback\nImportError: no ray", "asking the Ray at auto failed: ImportError"),
    ):
        done = subprocess.CompletedProcess([], code, out, err)
        monkeypatch.setattr(subprocess, "run", lambda *_, found=done, **__: found)
        with pytest.raises(LaunchError) as raised:
            nodes_of_cluster("auto")
        assert str(raised.value).startswith(says)
