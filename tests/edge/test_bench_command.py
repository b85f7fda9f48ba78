"""`octet bench` on a server over HTTP."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from serve.cli.bench import report
from serve.cli.load_client import LoadAnswer, TimedRequest
from serve.cli.main import app
from serve.settings.application import Settings

from ..ports import free_port
from ..wait import wait_for
from .edge import Edge, started


@pytest.fixture(scope="module")
def edge(laptop: Settings) -> Iterator[Edge]:
    with started(laptop) as edge:
        yield edge


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["bench", *words])
    return done.exit_code, done.output


def report_of(*words: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["bench", *words, "--json"])
    assert done.exit_code == 0, done.output
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_arrivals_of_two_tenants_and_two_shapes(edge: Edge) -> None:
    words = "--rate 40 --seconds 2 --tenant a=x --tenant b=y --mix 64x64:2=3 --mix :4 --repeated .5"
    rows = report_of(edge.url, *words.split())
    assert rows.keys() == {"all", "tenant a", "tenant b", "shape 64x64:2", "shape :4"}
    everything = rows["all"]
    assert 50 < everything["requests"] < 110
    assert everything["ok"] == everything["in_time"] == everything["requests"]
    assert everything["requests"] == rows["tenant a"]["requests"] + rows["tenant b"]["requests"]
    assert rows["shape 64x64:2"]["requests"] > rows["shape :4"]["requests"]
    assert sum(everything["cache"].values()) == everything["requests"]
    assert everything["cache"]["hit"] + everything["cache"].get("shared", 0) > 5
    assert 0 < everything["p50_s"] <= everything["p90_s"] <= everything["p99_s"] < 2
    generated = edge.painter.generated
    assert generated == everything["cache"]["off"] + everything["cache"]["miss"]


def test_edits_are_sent_beside_generations(edge: Edge) -> None:
    words = "--rate 30 --seconds 2 --mix 64x64:2 --mix 96x80:4 --edits 0.5"
    rows = report_of(edge.url, *words.split())
    assert rows["all"]["ok"] == rows["all"]["requests"]
    edits, generations = rows["endpoint edits"], rows["endpoint generations"]
    assert min(edits["ok"], generations["ok"]) > 10
    assert edits["ok"] + generations["ok"] == rows["all"]["ok"]


def test_edits_need_sizes(edge: Edge) -> None:
    code, output = run(edge.url, "--edits", "0.5")
    assert (code, "must name a size" in output) == (2, True)


def test_closed_loop_clients_give_a_table_and_a_plot(edge: Edge, tmp_path: Path) -> None:
    picture = tmp_path / "bench.png"
    words = ["--clients", "3", "--seconds", "0.5", "--slo-s", "0.001", "--plot", str(picture)]
    code, output = run(edge.url, *words)
    try:
        import matplotlib  # noqa: F401 - may be missing
    except ImportError:
        assert (code, "needs matplotlib" in output) == (2, True)
        code, output = run(edge.url, *words[:-2])
    else:
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert code == 0, output
    assert "│ all │" in output


def test_refusals_are_counted_and_explained_once(edge: Edge) -> None:
    """The size is refused, so no request is served."""
    words = edge.url, "--rate", "20", "--seconds", "1", "--mix", "77x77", "--json"
    done = CliRunner().invoke(app, ["bench", *words])
    rows = json.loads(done.stdout)
    count = rows["all"]["requests"]
    assert (done.exit_code, rows["all"]["ok"], rows["all"]["p50_s"]) == (1, 0, None)
    assert rows["all"]["codes"] == {"invalid_value": count}
    assert done.stderr.count("must be multiples of 16") == 1
    assert f"{count} × invalid_value: size '77x77'" in done.stderr


def test_ctrl_c_reports_what_there_is(edge: Edge) -> None:
    octet = Path(sys.executable).parent / "octet"
    before = edge.painter.generated
    with subprocess.Popen(  # noqa: S603 - our own command
        [octet, "bench", edge.url, "--rate", "50", "--seconds", "600"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as bench:
        wait_for(lambda: edge.painter.generated > before + 20)
        bench.send_signal(signal.SIGINT)
        output, _ = bench.communicate(timeout=60)
    assert bench.returncode == 130
    assert "│ all │" in output


def test_a_server_that_is_not_there_gets_no_load() -> None:
    code, output = run(f"http://127.0.0.1:{free_port()}", "--rate", "5", "--seconds", "600")
    assert code == 1
    assert "Connection refused: is the server running?" in output


def test_a_server_that_goes_is_explained() -> None:
    def answer_once(server: socket.socket) -> None:
        with server:
            server.accept()[0].close()

    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    thread = threading.Thread(target=answer_once, args=(server,))
    thread.start()
    code, output = run(f"http://127.0.0.1:{port}", *["--rate", "20", "--seconds", "1", "--json"])
    thread.join()
    assert code == 1
    assert "× no connection: Connect" in output
    assert "is the server running?" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["localhost:8000"], "no address"),
        (["http://x", "--mix", "big"], "SIZE:STEPS=WEIGHT"),
        (["http://x", "--mix", "64x"], "SIZE:STEPS=WEIGHT"),
        (["http://x", "--mix", "=."], "SIZE:STEPS=WEIGHT"),
        (["http://x", "--mix", "=0"], "all weights are 0"),
        (["http://x", "--tenant", "a"], "NAME=KEY"),
        (["http://x", "--rate", "1", "--clients", "2"], "give one of them"),
    ],
)
def test_wrong_options_are_explained(words: list[str], message: str) -> None:
    code, output = run(*words)
    assert code == 2
    assert message in " ".join(output.split())


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


class Recorder(BaseHTTPRequestHandler):
    """Answers every request with an empty object and keeps the bodies in `bodies`."""

    bodies: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


def test_the_same_seed_sends_the_same_requests() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    words = "--rate 100 --seconds .4 --mix 64x64:2=3 --mix :4 --model m --repeated .5 --seed"

    def bodies(seed: str) -> list[dict[str, Any]]:
        Recorder.bodies.clear()
        run(f"http://127.0.0.1:{server.server_port}", *words.split(), seed)
        return sorted(Recorder.bodies, key=lambda body: json.dumps(body, sort_keys=True))

    sent = bodies("1")
    assert bodies("1") == sent != bodies("2")
    server.shutdown()
    server.server_close()
    assert all({"prompt", "model"} <= body.keys() for body in sent)
    repeated = [body["seed"] for body in sent if "seed" in body]
    assert 0.25 * len(sent) < len(repeated) < 0.75 * len(sent)
    assert max(repeated) < 20
