"""`octet bench` on a server over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from serve.cli.bench import _bodies, _shape, report
from serve.cli.load_client import LoadAnswer, TimedRequest
from serve.cli.main import app
from serve.errors import SettingsError
from serve.settings.application import Settings

from ..ports import free_port
from .edge import Edge, started


@pytest.fixture(scope="module")
def edge(laptop: Settings) -> Iterator[Edge]:
    with started(laptop) as edge:
        yield edge


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["bench", *words])
    return done.exit_code, done.output


def found(*words: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["bench", *words, "--json"])
    assert done.exit_code == 0, done.output
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_arrivals_of_two_tenants_and_two_shapes(edge: Edge) -> None:
    words = "--rate 40 --seconds 2 --tenant a=x --tenant b=y --mix 64x64:2=3 --mix :4 --repeated .5"
    rows = found(edge.url, *words.split())
    assert rows.keys() == {"all", "tenant a", "tenant b", "shape 64x64:2", "shape :4"}
    everything = rows["all"]
    assert 50 < everything["requests"] < 110
    assert everything["ok"] == everything["in_time"] == everything["requests"]
    assert everything["requests"] == rows["tenant a"]["requests"] + rows["tenant b"]["requests"]
    assert rows["shape 64x64:2"]["requests"] > rows["shape :4"]["requests"]
    assert sum(everything["cache"].values()) == everything["requests"]
    assert everything["cache"]["hit"] + everything["cache"].get("shared", 0) > 5
    assert 0 < everything["p50_s"] <= everything["p90_s"] <= everything["p99_s"] < 2
    drawn = edge.painter.generated
    assert drawn == everything["cache"]["off"] + everything["cache"]["miss"]


def test_clients_a_table_and_a_picture(edge: Edge, tmp_path: Path) -> None:
    picture = tmp_path / "bench.png"
    words = ["--clients", "3", "--seconds", "0.5", "--slo-s", "0.001", "--plot", str(picture)]
    code, output = run(edge.url, *words)
    try:
        import matplotlib  # noqa: F401 - where it is not, that is said
    except ImportError:
        assert (code, "needs matplotlib" in output) == (1, True)
    else:
        assert code == 0, output
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert "│ all │" in output


def test_refusals_are_told_by_their_code(edge: Edge) -> None:
    rows = found(edge.url, "--rate", "20", "--seconds", "1", "--mix", "77x77")
    assert rows["all"]["ok"] == 0
    assert rows["all"]["codes"] == {"invalid_value": rows["all"]["requests"]}
    assert rows["all"]["p50_s"] is None


def test_a_server_that_is_not_there_is_exit_code_1() -> None:
    words = ["--rate", "5", "--seconds", "1", "--json"]
    code, output = run(f"http://127.0.0.1:{free_port()}", *words)
    assert code == 1
    assert "ClientConnectorError" in output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["localhost:8000"], "no address"),
        (["http://x", "--mix", "big"], "SIZE:STEPS=WEIGHT"),
        (["http://x", "--mix", "=."], "SIZE:STEPS=WEIGHT"),
        (["http://x", "--mix", "=0"], "all weights are 0"),
        (["http://x", "--tenant", "a"], "NAME=KEY"),
        (["http://x", "--rate", "0.001", "--seconds", "0.1"], "no request was sent"),
    ],
)
def test_wrong_words_are_explained(words: list[str], said: str) -> None:
    code, output = run(*words)
    assert code == 1
    assert said in " ".join(output.split())
    assert "Traceback" not in output


def test_a_report_counts_what_was_in_time() -> None:
    def answered(latency_s: float, status: int = 200, code: str = "") -> LoadAnswer:
        return LoadAnswer(TimedRequest(0, "t", {}), status, code, latency_s, latency_s)

    rows = report([answered(1), answered(2), answered(10), answered(0.1, 429, "slow_down")], 5)
    assert rows["all"] == {
        "requests": 4,
        "ok": 3,
        "in_time": 2,
        "in_time_per_s": 0.2,
        "codes": {"slow_down": 1},
        "cache": {},
        "p50_s": 2,
        "p90_s": 10,
        "p99_s": 10,
    }


def test_the_same_seed_asks_for_the_same() -> None:
    shapes = [_shape("64x64:2=3"), _shape("")]
    one, same, other = (_bodies(shapes, "m", 0.5, seed) for seed in (1, 1, 2))
    bodies = [one() for _ in range(40)]
    assert bodies == [same() for _ in range(40)] != [other() for _ in range(40)]
    assert {"prompt", "model"} <= bodies[0].keys()
    repeated = [body["seed"] for body in bodies if "seed" in body]
    assert 10 < len(repeated) < 30
    assert max(repeated) < 20
    with pytest.raises(SettingsError):
        _shape("64x")
