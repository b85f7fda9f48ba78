"""Parts of `octet serve` that need no Ray: what it prints, and Ctrl-C while Ray's code runs."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from serve.cli.serve import _announce
from serve.launch import LaunchError, _check_encoders
from serve.settings.application import Settings
from serve.settings.file import load_settings
from serve.settings.models import Source

from ..builders import ROOT

# The main thread gets no signal, like while it runs Ray's code; the process does.
BLOCKED = """
import ctypes, signal
from serve.cli.serve import _answering_ctrl_c
def interrupt(*_): raise KeyboardInterrupt
signal.signal(signal.SIGINT, interrupt)
with _answering_ctrl_c():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    print("blocked", flush=True)
    ctypes.CDLL(None).poll(None, 0, 600_000)
"""


@pytest.mark.parametrize("prompt", ["it's 'here'; rm x", 'a "quoted" prompt', "a\nb", "Zürich"])
def test_the_curl_that_is_announced_is_safe_to_copy(
    prompt: str, laptop: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model's folder may come from anybody, and so may its example prompts."""
    (tmp_path / "example_prompts.json").write_text(json.dumps([prompt]))
    model = laptop.models[0].model_copy(update={"source": Source(location=str(tmp_path))})
    settings = laptop.model_copy(update={"models": (model,)})
    _announce(SimpleNamespace(url="http://127.0.0.1:8000", settings=settings))  # type: ignore[arg-type]  # all that it reads
    printed = capsys.readouterr().out
    command = printed[printed.index("curl ") : printed.index("| python3")]
    words = shlex.split(command.replace("\\\n", " "))
    body = words[words.index("-d") + 1]
    assert json.loads(body) == {"model": "landscapes", "prompt": prompt}
    assert words[-2:] == ["-d", body]


def test_the_announced_command_shows_an_error_of_the_server(
    laptop: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _announce(SimpleNamespace(url="http://x", settings=laptop))  # type: ignore[arg-type]  # all that it reads
    printed = capsys.readouterr().out
    save = printed[printed.index("python3 -c") : printed.index("\n\nCtrl-C")]
    save = save.replace("python3", sys.executable, 1)

    def run(answer: dict[str, object]) -> tuple[int, str]:
        done = subprocess.run(  # noqa: S602 - the command that users copy
            save, shell=True, input=json.dumps(answer), cwd=tmp_path, capture_output=True, text=True
        )
        return done.returncode, done.stderr

    assert run({"error": {"message": "no such model"}}) == (
        1,
        '{"error": {"message": "no such model"}}\n',
    )
    assert run({"data": [{"b64_json": "aGk="}]}) == (0, "")
    assert (tmp_path / "octet.png").read_text() == "hi"


def test_text_encoders_that_can_never_start_are_named_at_once() -> None:
    sd35 = load_settings(ROOT / "examples" / "sd35.yaml", {})
    with pytest.raises(LaunchError, match=r"text encoder sd35 takes 0\.1 GPU, and this"):
        _check_encoders(sd35, 0.0)
    _check_encoders(sd35, 1.0)


def test_ctrl_c_is_answered_while_code_in_c_blocks() -> None:
    with subprocess.Popen(  # noqa: S603 - this interpreter
        [sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "blocked\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "stopping as soon as Ray answers\n"
        process.kill()
