"""The measurement of Octet beside its peers: the load, what counts, and what the tables say."""

import base64
import io
from typing import Any

import pytest
from PIL import Image

from bench.peers.__main__ import LEAST_PSNR_DB
from bench.peers.contestants import CONTESTANTS, PATIENCE_S, lines_of
from bench.peers.load import (
    IN_TIME,
    KINDS,
    arrivals,
    images_within,
    in_time,
    kind_of,
    request,
    tail_s,
)
from bench.peers.report import beside_best_peer, likeness_db, table
from serve.cli.load_client import LoadAnswer, TimedRequest

KIND = KINDS[0]


def answer(latency_s: float, status: int = 200) -> LoadAnswer:
    return LoadAnswer(
        TimedRequest(0, "light", request(KIND, 1, "part")), status, "", latency_s, latency_s
    )


def test_all_contestants_get_the_same_requests_at_the_same_times() -> None:
    first, again = (arrivals("0.5", "light", 5, 60) for _ in range(2))
    assert first == again
    assert {kind_of(r.body) for r in first} == set(KINDS)
    other = arrivals("0.8", "light", 8, 60)
    prompts = [r.body["prompt"] for r in (*first, *other)]
    assert len(set(prompts)) == len(prompts), "no cache can answer for another request"
    for contestant in CONTESTANTS:
        assert kind_of(contestant.body(first[0].body)) == kind_of(first[0].body)


def test_a_request_is_in_time_within_a_multiple_of_its_own_time_and_only_with_a_picture() -> None:
    own_s = {KIND: 2.0}
    found = [answer(IN_TIME * 2), answer(IN_TIME * 2 + 0.1), answer(1.0, status=503)]
    assert in_time(found, own_s) == pytest.approx(1 / 3)
    assert in_time(found, own_s, 10) == pytest.approx(2 / 3)
    assert tail_s(found, 0.99) == PATIENCE_S, "a refusal is not a short latency"


def cell(goodput: float, p99_s: float, flooded_s: float, failed: int, equal: float) -> Any:
    at = {"requests": 9, "failed": 0, "p50_s": 0.1, "p99_slowdown": 3.0}
    return {
        "version": "1",
        "lines": 10,
        "start_s": 1.0,
        "speed": 40.0,
        "equal_per_s": equal,
        "mixed_per_s": equal,
        "memory_mib": 100.0,
        "mixed": {
            "0.8": {**at, "goodput": goodput, "goodput_each": {"5": goodput}, "p99_s": p99_s}
        },
        "flooded": {**at, "goodput": goodput, "p99_s": flooded_s},
        "killed": {**at, "failed": failed, "open": 9},
    }


def test_octet_is_compared_with_the_peer_that_is_best_in_each_number() -> None:
    cells = {
        "Octet": cell(0.9, 4.0, 1.0, 2, 3.0),
        "a": cell(0.6, 2.0, 8.0, 9, 6.0),
        "b": cell(0.3, 5.0, 4.0, 0, 1.0),
    }
    keys = beside_best_peer(cells)
    assert keys["goodput_vs_best_peer_80"] == pytest.approx(1.5)
    assert keys["p99_vs_best_peer_80"] == pytest.approx(2.0)
    assert keys["flood_p99_vs_best_peer"] == pytest.approx(0.25)
    assert keys["equal_throughput_vs_best_peer"] == pytest.approx(0.5)
    assert keys["failed_at_kill"] == 2
    found = {"machine": "m", "dtype": "float32", "quick": True, "octet_mixed_per_s": 1.0}
    shown = table({**found, **keys, "contestants": cells})
    assert "| Octet | 80% | 9, 0 | 90% | 0.10 | 4.00 | 3.0 |" in shown
    assert "| `p99_vs_best_peer_80` | 2 |" in shown


def test_another_image_is_not_alike() -> None:
    def file(value: int) -> str:
        made = io.BytesIO()
        Image.new("RGB", (4, 4), (value, value, value)).save(made, "PNG")
        return base64.b64encode(made.getvalue()).decode()

    assert likeness_db(file(10), file(11)) > LEAST_PSNR_DB > likeness_db(file(10), file(30))


def test_lines_count_what_a_user_writes_and_not_what_explains_it(tmp_path: Any) -> None:
    code = tmp_path / "a.py"
    code.write_text(
        '"""What it is."""\n\n# why\nx = [\n    1,\n]\n\n\ndef f():\n    """So."""\n    return x\n'
    )
    assert lines_of(code) == 3
    settings = tmp_path / "a.yaml"
    settings.write_text("# why\na: 1\n\nb: 2 # so\n")
    assert lines_of(settings) == 2


def test_an_image_counts_by_the_part_of_its_time_that_lies_within() -> None:
    within = answer(2.0)  # from 0 to 2 s
    assert images_within([within], 0.0, 4.0) == 1
    assert images_within([within], 1.0, 4.0) == pytest.approx(0.5)
    assert images_within([within], 0.0, 0.5) == pytest.approx(0.25)
    assert images_within([within], 2.5, 4.0) == 0
    assert images_within([answer(2.0, status=503)], 0.0, 4.0) == 0
    batch = [answer(8.0)] * 16  # two a second, although none is answered in the first 4 s
    assert images_within(batch, 0.0, 4.0) / 4.0 == 2
