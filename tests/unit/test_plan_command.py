"""The command `octet plan`: numbers, settings that load, and readable errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cards import CARDS
from cluster.placement import Node
from cluster.structure import TRANSFORMERS
from serve.cli.main import app
from serve.cli.plan_inputs import cards_of, encoder_gib, only_encoder
from serve.errors import SettingsError
from serve.settings.application import Settings
from serve.settings.file import load_settings

SD35 = Path(__file__).parents[2] / "examples" / "sd35.yaml"
ONE_H100 = "--gpu", "h100", "--model", "sd3.5-large"


def octet_plan(*args: str) -> Any:
    return CliRunner().invoke(app, ["plan", *args])


def as_json(*args: str) -> Any:
    result = octet_plan(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_table_and_the_picture() -> None:
    result = octet_plan("--gpu", "h100:8", "--gpu", "rtx4090:4", "--model", "sd3.5-large")
    assert result.exit_code == 0
    for shown in ("7 × h100", "4 × rtx4090", "text encoders", "|sd3.5-large", "GiB free"):
        assert shown in result.stdout
    assert "Estimated from arithmetic, not measured" in result.stdout
    assert "No 16-bit pool" in result.stdout
    assert "No 16-bit pool" not in octet_plan(*ONE_H100, "--gpu", "a100-80").stdout


def test_columns_and_bars_are_explained() -> None:
    said = " ".join(octet_plan(*ONE_H100, "--model", "sd3.5-medium").stdout.split())
    assert "spot $" in said
    assert "Bars: the memory of one card, to scale. Each box is a replica" in said


def test_large_on_an_h100_takes_twice_the_arithmetic_floor() -> None:
    """40 steps of 49.6 ms each with FP8 linears at 1024 × 1024, by an independent formula."""
    (card,) = as_json(*ONE_H100)["cards"]
    (option,) = card["replicas"]
    assert 1 / option["images_s"] == pytest.approx(40 * 2 * 0.0496, rel=0.05)
    assert option["usd_per_1000_on_demand"] == pytest.approx(4.76 / 3.6 / option["images_s"])


def test_prices_are_replaced(tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("h100: {on_demand: 2.38}\n")
    (before,), (after,) = (
        found["cards"][0]["replicas"]
        for found in (as_json(*ONE_H100), as_json(*ONE_H100, "--prices", str(prices)))
    )
    assert after["usd_per_1000_on_demand"] == pytest.approx(before["usd_per_1000_on_demand"] / 2)
    assert after["usd_per_1000_spot"] == before["usd_per_1000_spot"]


@pytest.mark.parametrize(
    "text",
    ["h100: free", "h100: 0", "h1000: 1", "[1]", "h100: {a: 1}", "{", "h100: true", "h100: .nan"],
)
def test_invalid_prices_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "prices.yaml").write_text(text)
    result = octet_plan(*ONE_H100, "--prices", str(tmp_path / "prices.yaml"))
    assert result.exit_code == 1
    assert "prices.yaml" in result.stderr


def test_a_plan_that_does_not_fit_has_a_reason_and_exit_code_1() -> None:
    result = octet_plan("--gpu", "t4:4", "--model", "sd3.5-large")
    assert result.exit_code == 1
    assert "sd3.5-large on t4: needs" in result.stderr
    result = octet_plan("--gpu", "t4:4", "--model", "sd3.5-large", "--json")
    assert result.exit_code == 1
    assert "needs" in json.loads(result.stdout)["reason"]


def test_planned_settings_load_and_say_what_the_plan_says(tmp_path: Path) -> None:
    args = "--gpu", "h100:2", "--gpu", "a100-80", "--config", str(SD35)
    planned = tmp_path / "planned.yaml"
    planned.write_text(octet_plan(*args, "--settings").stdout)
    settings, before = load_settings(planned, {}), load_settings(SD35, {})
    pools = {
        (m.id, p.card, p.slots, p.num_gpus, p.replicas) for m in settings.models for p in m.pools
    }
    assert pools == {
        (p["model"], p["card"], p["slots"], p["num_gpus"], p["replicas"])
        for p in as_json(*args)["pools"]
        if p["model"]
    }
    (encoder,) = settings.text_encoders
    assert encoder.card == "h100"
    assert encoder.memory_gib == pytest.approx(7.33, abs=0.02)
    assert encoder.warm_prompts == before.text_encoders[0].warm_prompts
    assert [m.defaults for m in settings.models] == [m.defaults for m in before.models]
    on_a100 = {p.precision for m in settings.models for p in m.pools if p.card == "a100-80"}
    assert on_a100 == {"fp16"}


def test_pools_keep_what_the_plan_does_not_decide(tmp_path: Path) -> None:
    config = yaml.safe_load(SD35.read_text())
    config["models"][0]["pools"][0].update(num_cpus=0.2, compile="max-autotune", card="l4")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    result = octet_plan("--gpu", "h100", "--config", str(tmp_path / "config.yaml"), "--settings")
    (pool,) = yaml.safe_load(result.stdout)["models"][0]["pools"]
    assert (pool["num_cpus"], pool["compile"], pool["card"]) == (0.2, "max-autotune", "h100")
    assert pool["warm_sizes"] == ["1024x1024"]


def test_autoscaled_pools_keep_their_minimum_replicas(tmp_path: Path) -> None:
    config = tmp_path / "elastic.yaml"
    data = yaml.safe_load(SD35.read_text())
    for pool in data["models"][0]["pools"]:
        pool.update(replicas=9, min_replicas=3)
    config.write_text(yaml.safe_dump(data))
    result = octet_plan("--gpu", "h100:2", "--config", str(config), "--settings")
    (large, *others) = yaml.safe_load(result.stdout)["models"]
    for pool in large["pools"]:
        assert pool["min_replicas"] == min(3, pool["replicas"])
    assert not any("min_replicas" in pool for model in others for pool in model["pools"])


def test_a_plan_for_small_images_says_so_in_the_settings() -> None:
    result = octet_plan(*ONE_H100, "--size", "512x512", "--settings")
    (model,) = yaml.safe_load(result.stdout)["models"]
    assert model["limits"] == {"max_pixels": 512 * 512}
    assert model["pools"][0]["warm_sizes"] == ["512x512"]


def test_each_pool_keeps_the_settings_of_the_pool_on_its_card() -> None:
    """With the cards for which the overlay was made, its pools come back, and none is left out."""
    overlay = SD35.parents[1] / "k8s" / "overlays" / "mixed-gpu" / "settings.yaml"
    cards = "h100:4", "l40s:4", "l4:8", "a100-80:4", "a10:8"
    gpus = [word for card in cards for word in ("--gpu", card)]
    result = octet_plan(*gpus, "--config", str(overlay), "--settings")
    assert "left out" not in result.stderr

    def least(settings: dict[str, Any]) -> dict[tuple[str, str], int]:
        pools = ((m["id"], p) for m in settings["models"] for p in m["pools"])
        return {(model, pool["card"]): pool["min_replicas"] for model, pool in pools}

    planned = least(yaml.safe_load(result.stdout))
    before = least(yaml.safe_load(overlay.read_text()))
    assert planned == {key: before[key] for key in planned}
    assert len(planned) > 6


def test_pools_that_the_plan_leaves_out_are_named() -> None:
    result = octet_plan("--gpu", "h100:8", "--config", str(SD35), "--settings")
    assert "left out: pool fp16 of sd3.5-large\n" in result.stderr


def test_the_demo_is_planned_by_its_own_files() -> None:
    laptop = SD35.with_name("laptop.yaml")
    found = as_json("--gpu", "l4", "--config", str(laptop), "--encoders-on-cpu")
    (option,) = found["cards"][0]["replicas"]
    assert option["gib"] < 1.5
    assert found["notes"] == []  # its T5 is small
    settings = load_settings(laptop, {})
    assert 0.9 < encoder_gib(only_encoder(settings), settings) < 1.4


def test_text_encoders_on_cpus_come_with_the_price_of_a_new_prompt() -> None:
    (note,), without = (
        as_json("--gpu", "rtx4060", "--model", "sd3.5-medium", "--encoders-on-cpu")["notes"],
        as_json(*ONE_H100)["notes"],
    )
    assert "a new prompt takes about 55 s on 2 cores, 14 s on 8 cores" in note
    assert without == []


def test_a_plan_is_for_one_set_of_text_encoders() -> None:
    config = yaml.safe_load(SD35.read_text())
    config["text_encoders"].append({**config["text_encoders"][0], "id": "other"})
    settings = Settings.model_validate(config)
    with pytest.raises(SettingsError, match="one set"):
        only_encoder(settings)


def test_a_foreign_model_is_refused_in_words(tmp_path: Path) -> None:
    config = yaml.safe_load(SD35.read_text())
    (tmp_path / "model" / "transformer").mkdir(parents=True)
    (tmp_path / "model" / "transformer" / "config.json").write_text('{"layers": 3}')
    config["models"][0]["source"] = {"location": str(tmp_path / "model")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    result = octet_plan("--gpu", "h100", "--config", str(tmp_path / "config.yaml"))
    assert result.exit_code == 1
    assert "not the configuration of an SD3.5 transformer" in result.stderr


def test_encoders_on_cpu_take_no_gpu(tmp_path: Path) -> None:
    result = octet_plan(
        "--gpu", "h100", "--config", str(SD35), "--encoders-on-cpu", "--adaln-8-bit", "--settings"
    )
    (tmp_path / "planned.yaml").write_text(result.stdout)
    settings = load_settings(tmp_path / "planned.yaml", {})
    assert settings.text_encoders[0].num_gpus == 0
    assert all(p.adaln_8_bit for m in settings.models for p in m.pools)


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ((), "give one of --gpu and --ray, such as --gpu h100:8"),
        (("--gpu", "h100"), "give one of --model and --config"),
        (("--gpu", "h100x"), "did you mean 'h100'"),  # before anything else is asked for
        (("--gpu", "A100", "--model", "sd3.5-large"), "name one of a100-40, a100-80"),
        ((*ONE_H100, "--config", str(SD35)), "give only one of --model and --config"),
        (("--gpu", "h10", "--model", "sd3.5-large"), "did you mean 'h100'"),
        (("--gpu", "h100:0", "--model", "sd3.5-large"), "'0' must be a number of cards from 1 to"),
        (("--gpu", "h100:-1", "--model", "sd3.5-large"), "'-1' must be a number of cards"),
        (("--gpu", "h100", "--model", "sd3.5-huge"), "did you mean"),
        (("--gpu", "h100", "--model", "sd3.5-large=none"), "'none' must be a share of the images"),
        ((*ONE_H100, "--model", "sd3.5-large"), "given twice"),
        ((*ONE_H100, "--size", "big"), "WIDTHxHEIGHT"),
        ((*ONE_H100, "--size", "1000x1000"), "multiples of 16"),
        ((*ONE_H100, "--size", "00x00"), "WIDTHxHEIGHT"),
        (("--gpu", "h100", "--config", str(SD35), "--size", "512x512"), "CONFIG has its own"),
        ((*ONE_H100, "--json", "--settings"), "not both"),
        ((*ONE_H100, "--prices", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_wrong_input_is_named(args: tuple[str, ...], complaint: str) -> None:
    result = octet_plan(*args)
    assert result.exit_code == 2
    assert complaint in result.stderr


def test_a_larger_share_gives_a_model_more_cards() -> None:
    """On cards that hold only one of two models, the model with more requests gets more cards."""

    def cards_of_turbo(share: str) -> int:
        turbo = f"sd3.5-large-turbo={share}"
        cards = as_json("--gpu", "rtx4090:8", "--model", "sd3.5-large", "--model", turbo)["cards"]
        with_turbo = (c for c in cards if any("turbo" in r["model"] for r in c["replicas"]))
        return sum(c["count"] for c in with_turbo)

    assert cards_of_turbo("0.2") < cards_of_turbo("1") < cards_of_turbo("5")


@pytest.mark.parametrize("model", TRANSFORMERS)
def test_every_card_of_the_file_is_answered(model: str) -> None:
    for card in CARDS:
        result = octet_plan("--gpu", f"{card}:2", "--model", model)
        fits = CARDS[card].memory_gib > 15 or model == "sd3.5-medium"
        assert result.exit_code == (0 if fits else 1), result.output


def test_the_cards_of_a_cluster() -> None:
    nodes = [
        Node("1", {"ray.io/accelerator-type": "H100"}, 8, 8),
        Node("2", {"ray.io/accelerator-type": "H100"}, 8, 4),
        Node("3", {"ray.io/accelerator-type": "A100", "octet/card": "a100-80"}, 8, 1),
        Node("4", {"ray.io/accelerator-type": "Odd"}, 8, 1),
        Node("5", {}, 8, 0),
        Node("6", {"ray.io/accelerator-type": "H100", "octet/precision": "fp16"}, 8, 1),
    ]
    groups, left_out = cards_of(nodes, reserved_gib=2)
    assert {(g.card.id, g.count, g.reserved_gib) for g in groups} == {
        ("h100", 12, 2),
        ("a100-80", 1, 2),
    }
    assert left_out == [
        "node 4: 1 GPUs of an unknown card are left out",
        "node 6: h100 is labelled for 16 bit and left out",
    ]
