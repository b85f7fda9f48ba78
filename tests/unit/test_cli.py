from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve.cli import app

EXAMPLES = Path(__file__).parents[2] / "examples"


def octet(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def test_check_config_shows_the_pools() -> None:
    code, output = octet("check-config", str(EXAMPLES / "sd35.yaml"))
    assert code == 0
    assert "sd3.5-large-turbo" in output
    assert "ok" in output


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["check-config", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["serve", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["demo", "--port", "70000"], "port 70000 must be between 1 and 65535"),
    ],
)
def test_errors_are_one_line(command: list[str], words: str) -> None:
    code, output = octet(*command)
    assert code == 1
    assert words in output
    assert "Traceback" not in output
    assert len(output.strip().splitlines()) == 1


def test_debug_shows_where_it_came_from() -> None:
    result = CliRunner().invoke(app, ["check-config", "nowhere.yaml", "--debug"])
    assert type(result.exception).__name__ == "SettingsError"


def test_a_misspelt_key_names_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "octet.yaml"
    file.write_text("modles: []\n")
    code, output = octet("check-config", str(file))
    assert code == 1
    assert "did you mean 'models'?" in " ".join(output.split())


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, output = octet("demo", "--port", str(taken.getsockname()[1]))
    assert code == 1
    assert "cannot listen on 127.0.0.1" in output
