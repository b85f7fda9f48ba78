"""The command `octet simulate`, and the settings of autoscaling."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autoscaling.simulation.fleet import NodeType
from serve.cli.main import app
from serve.cli.simulate_scenario import policy_of, scenario_of_settings, workload_of
from serve.errors import SettingsError
from serve.models.replica_bounds import other_needs, scaling_limits
from serve.settings.file import load_settings

ROOT = Path(__file__).parents[2]
LAPTOP, SD35 = ROOT / "examples" / "laptop.yaml", ROOT / "examples" / "sd35.yaml"


def simulate(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["simulate", "--hours", "0.2", *arguments])


def test_policies_are_compared() -> None:
    result = simulate("--policy", "queued-work", "--policy", "static:12", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found.keys() == {"queued-work", "static:12"}
    assert found["queued-work"]["requests"] == found["static:12"]["requests"] > 1000
    assert found["static:12"]["ups"] == 1
    assert found["queued-work"]["usd_by_card"].keys() == {"h100"}
    table = simulate("--policy", "ray-serve:1,0,60")
    assert "ray-ser" in table.output


def test_a_trace_on_the_fleet_of_a_settings_file(tmp_path: Path) -> None:
    file = tmp_path / "day.csv"
    rows = "".join(f"{i},t,128,128,28,3.0\n" for i in range(0, 300, 3))
    file.write_text("time,tenant,width,height,steps,guidance\n" + rows)
    result = simulate("--workload", str(file), "--config", str(LAPTOP), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["queued-work"]["requests"] == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workload", "weekly"), "--workload 'weekly': expected one of poisson"),
        (("--policy", "magic"), "--policy 'magic'"),
        (("--policy", "static"), "how many replicas? For example static:8"),
        (("--policy", "keda:1,2,3,4,5"), "keda takes target, stabilisation_s, cooldown_s"),
        (("--policy", "queued-work:3,60,1,1,1"), "queued-work takes spare, hold_s"),
        (("--policy", "keda:nan"), "keda takes"),
        (("--policy", "keda:0"), "keda takes"),
        (("--card", "h1000"), "--card 'h1000'"),
        (("--model", "sd4"), "--model 'sd4'"),
        (("--config", str(LAPTOP), "--model", "other"), "--model 'other'"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], message: str) -> None:
    result = simulate(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_numbers_of_a_policy_are_read_in_order() -> None:
    assert policy_of("ray-serve:1.5,0") == (
        "ray-serve",
        {"target_ongoing_requests": 1.5, "upscale_delay_s": 0.0},
    )
    assert policy_of("queued-work") == ("queued-work", {})


def test_limits_follow_from_settings() -> None:
    environ = {
        "OCTET_INGRESS__REPLICAS": "3",
        "OCTET_INGRESS__MIN_REPLICAS": "1",
        "OCTET_TEXT_ENCODERS__0__REPLICAS": "4",
        "OCTET_TEXT_ENCODERS__0__MIN_REPLICAS": "0",
        "OCTET_MODELS__0__POOLS__0__CARD": "h100",
        "OCTET_MODELS__0__POOLS__1__CARD": "a100-80",
        "OCTET_MODELS__0__POOLS__0__MIN_REPLICAS": "1",
    }
    limits = scaling_limits(load_settings(SD35, environ))
    fp8, fp16 = limits.pools["sd3.5-large-fp8-h100"], limits.pools["sd3.5-large-fp16-a100-80"]
    assert (fp8.min_replicas, fp8.max_replicas, fp16.min_replicas) == (1, 2, 1)
    assert fp8.speed == pytest.approx(1 / 3)  # three share a card
    assert fp8.speed > fp16.speed > 0.1  # in the same unit of work
    assert fp8.usd_h > 0
    assert limits.followers["Ingress"].max_replicas == 3
    assert set(limits.followers["TextEncoder-sd35"].pools) == set(limits.pools)
    assert not scaling_limits(load_settings(LAPTOP, {})).followers


def test_deployments_beside_the_pools_take_room_too() -> None:
    others = other_needs(load_settings(SD35, {}))
    assert {"Dispatcher", "Ingress", "Jobs", "TextEncoder-sd35"} == others.keys()
    assert others["Dispatcher"][1] == 1
    assert "Jobs" not in other_needs(load_settings(LAPTOP, {})), "without a data folder none run"
    need, least = others["TextEncoder-sd35"]
    encoder = load_settings(SD35, {}).text_encoders[0]
    assert (need, least) == (encoder.need, encoder.least)


def test_nodes_that_start_cold_make_waits_longer() -> None:
    def p99_s(*options: str) -> float:
        result = simulate("--workload", "spikes", "--rate", "1", "--json", *options)
        assert result.exit_code == 0, result.output
        return float(json.loads(result.output)["queued-work"]["wait_p99_s"])

    usual_s = p99_s()
    assert p99_s("--weights-gib", "8", "--volume-gib-s", "0.1") > usual_s
    assert p99_s("--compile-s", "150") > usual_s


def test_a_provider_that_takes_nodes_makes_replicas_start_again() -> None:
    def starts(*options: str) -> int:
        result = simulate("--policy", "static:8", "--json", *options)
        return int(json.loads(result.output)["static:8"]["starts"])

    assert starts() == 8
    assert starts("--spot-s", "120", "--notice-s", "30") > 16


def test_replicas_that_share_a_card_share_its_time() -> None:
    scenario = scenario_of_settings(
        load_settings(SD35, {}), "sd3.5-medium", NodeType("", 0.0, node_s=60)
    )
    pool = scenario.pools["sd3.5-medium-fp8"]
    assert pool.node_type.per_node == 6
    assert pool.costs.token == pytest.approx(6 * scenario.unit.token)
    assert pool.pool.speed == pytest.approx(1 / 6)
    assert pool.pool.start_s == 90
    outcome = scenario.run(workload_of("poisson", 0.005, 3), "static", numbers={"replicas": 2})
    assert outcome.attainment > 0.9


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "OCTET_MODELS__0__POOLS__0__MIN_REPLICAS",
            "3",
            "min_replicas 3 must be at most replicas 2",
        ),
        ("OCTET_INGRESS__MIN_REPLICAS", "0", "ingress: min_replicas must be at least 1"),
        ("OCTET_AUTOSCALING__UTILISATION", "1.5", "utilisation"),
        ("OCTET_AUTOSCALING__HOLDS", "5", "unknown key 'holds'"),
        ("OCTET_AUTOSCALING_POLICY", "magic", "queued-work"),
    ],
)
def test_invalid_autoscaling_settings_are_refused(name: str, value: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
        load_settings(LAPTOP, {name: value})


def said(*arguments: str) -> str:
    return " ".join(str(simulate(*arguments).output).split())


def test_a_workload_that_no_number_of_replicas_can_serve_is_explained() -> None:
    """Two H100s cannot serve fifty images of SD3.5 Large a second."""
    too_much = "s of work per second, and all 2 replicas that there may be do 2.0"
    assert too_much in said("--rate", "50", "--replicas", "2")
    assert "s of work per second" not in said("--rate", "0.1")


def test_cards_without_a_price_are_named() -> None:
    text = said("--config", str(SD35), "--rate", "0.01")
    assert "No price is known for unknown card, which counts as $ 0." in text
