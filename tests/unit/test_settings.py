"""Settings files: valid examples, named faults, overrides, and the live settings."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from serve.errors import SettingsError
from serve.settings import reference
from serve.settings.application import S3Settings, Settings
from serve.settings.file import load_settings
from serve.settings.serve_config import (
    ApplicationArguments,
    LiveEncoderSettings,
    LivePoolSettings,
    serve_config,
    versions,
)

from ..builders import ROOT

EXAMPLES = ROOT / "examples"
LAPTOP = EXAMPLES / "laptop.yaml"


@pytest.mark.parametrize("name", ["laptop.yaml", "sd35.yaml"])
def test_examples_are_valid(name: str) -> None:
    settings = load_settings(EXAMPLES / name, {})
    assert Settings.model_validate(settings.model_dump(mode="json")) == settings


def test_sd35_serves_the_three_models_with_one_set_of_text_encoders() -> None:
    settings = load_settings(EXAMPLES / "sd35.yaml", {})
    assert [m.id for m in settings.models] == ["sd3.5-large", "sd3.5-large-turbo", "sd3.5-medium"]
    assert {m.text_encoder for m in settings.models} == {"sd35"}
    assert all(m.source.revision for m in settings.models)


Change = Callable[[dict[str, Any]], object]
WAY = {"sampler": "dpmpp_2m", "num_inference_steps": 9}


def write(folder: Path, change: Change) -> Path:
    """The laptop settings with a change, in a folder of its own."""
    data = yaml.safe_load(LAPTOP.read_text())
    for part in (data["models"][0], data["text_encoders"][0]):
        part["source"]["location"] = str(EXAMPLES.parent / "demo" / "model")
    change(data)
    file = folder / "octet.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(modles=[]), ["unknown key 'modles'", "did you mean 'models'?"]),
        (
            lambda d: d["models"][0]["defaults"].update(guidance=3),
            ["models[0].defaults", "unknown key 'guidance'", "'guidance_scale'"],
        ),
        (lambda d: d["http"].update(port=0), ["http.port", "found 0"]),
        (lambda d: d["models"][0].update(pools=[]), ["models[0].pools"]),
        (lambda d: d["models"][0].update(text_encoder="clip"), ["'clip'", "['landscapes']"]),
        (lambda d: d["models"].append(d["models"][0]), ["'landscapes' is defined twice"]),
        (lambda d: d["models"][0]["defaults"].update(width=130), ["130x128", "multiples of 16"]),
        (
            lambda d: d["models"][0].update(presets={"high": WAY}),
            ["presets.high: quality 'high' is the model's default"],
        ),
        (
            lambda d: d["models"][0].update(presets={"low": WAY | {"num_inference_steps": 28}}),
            ["presets.low: 28 steps are not fewer than the default's 28"],
        ),
        (lambda d: d["models"][0].update(presets={"Low": WAY}), ["models[0].presets.Low"]),
        (
            lambda d: d["models"][0].update(presets={"low": WAY | {"sampler": "ddim"}}),
            ["models[0].presets.low.sampler", "'dpmpp_2m'"],
        ),
        (
            lambda d: d["models"][0].update(routing=[{"name": "a", "prompt": "("}]),
            ["models[0].routing[0]", "prompt '(' is no regular expression"],
        ),
        (
            lambda d: d["models"][0].update(
                routing=[{"name": "a", "prompt": "a"}], pools=d["models"][0]["pools"][:1]
            ),
            ["routing needs a pool with precision fp16"],
        ),
        (
            lambda d: d["models"][0].update(source={"location": "org/model"}),
            ["models[0].source", "'org/model' is not a folder", "revision"],
        ),
        (
            lambda d: d["models"][0].update(source={"location": "org/model", "revision": "main"}),
            ["models[0].source.revision", "'main'"],
        ),
        (
            lambda d: d["models"][0]["pools"].append({"precision": "fp8"}),
            ["two pools have the same precision"],
        ),
        (
            lambda d: d["models"][0]["pools"][0].update(warm_sizes=["1000x1000"]),
            ["warm_sizes '1000x1000': width and height must be multiples of 16"],
        ),
        (
            lambda d: d["models"][0]["pools"][0].update(num_gpus=0.5, card="h10"),
            ["models[0].pools[0]", "card 'h10'", "h100"],
        ),
        (
            lambda d: d["models"][0]["pools"][0].update(num_gpus=0.5, card="h100", memory_gib=50),
            ["memory_gib 50.0 is more than num_gpus 0.5 of a h100"],
        ),
        (
            lambda d: d["models"][0]["pools"][0].update(memory_gib=5),
            ["memory_gib are for what takes GPUs"],
        ),
        (
            lambda d: d["models"][0]["pools"][1].update(adaln_8_bit=True),
            ["adaln_8_bit is for fp8 pools"],
        ),
        (
            lambda d: d["models"][0]["pools"][0].update(allow_fp8_nodes=False),
            ["models[0].pools[0]", "allow_fp8_nodes is for fp16 pools"],
        ),
        (lambda d: d.pop("emulate_fp8"), ["its fp8 pool takes no GPU"]),
        (lambda d: d.update(public_url="images.example"), ["public_url"]),
        (lambda d: d.update(max_queued=3), ["max_queued 3 must be at least max_images 4"]),
        (
            lambda d: d.update(results={"link_expires_s": 100, "max_age_s": 99}),
            ["results", "link_expires_s 100 must be at most max_age_s 99"],
        ),
    ],
)
def test_faults_are_named(tmp_path: Path, change: Change, words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(write(tmp_path, change), {})
    for word in words:
        assert word in str(caught.value)


def test_one_fault_is_one_line(tmp_path: Path) -> None:
    def too_many(data: dict[str, Any]) -> None:
        data["models"][0]["defaults"]["num_inference_steps"] = 1000

    with pytest.raises(SettingsError) as caught:
        load_settings(write(tmp_path, too_many), {})
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(SettingsError, match=r"^OCTET_FOO: no such key"):
        load_settings(LAPTOP, {"OCTET_FOO": "1"})


def test_environment_overrides() -> None:
    environ = {
        "OCTET_HTTP__PORT": "9000",
        "OCTET_MODELS__0__DEFAULTS__NUM_INFERENCE_STEPS": "20",
        "HOME": "/root",
    }
    settings = load_settings(LAPTOP, environ)
    assert settings.http.port == 9000
    assert settings.models[0].defaults.num_inference_steps == 20


@pytest.mark.parametrize(
    "name", ["OCTET_HTP__PORT", "OCTET_MODELS__7__ID", "OCTET_EMULATE_FP8__X", "OCTET_PORT"]
)
def test_an_override_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(SettingsError):
        load_settings(LAPTOP, {name: "1"})


@pytest.mark.parametrize("text", ["- 1", "a: [", b"\xff\xfe\x00"])
def test_files_that_are_no_settings(tmp_path: Path, text: str | bytes) -> None:
    file = tmp_path / "octet.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SettingsError, match=r"octet\.yaml"):
        load_settings(file, {})


def test_local_folders_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()

    def here(data: dict[str, Any]) -> None:
        data["models"][0]["source"]["location"] = "weights"

    settings = load_settings(write(tmp_path, here), {})
    assert settings.models[0].source.location == str((tmp_path / "weights").resolve())


def test_data_folders_are_relative_to_the_file_and_home_folders_stay(tmp_path: Path) -> None:
    def here(data: dict[str, Any]) -> None:
        data.update(data_folder="images", models_folder="~/models")

    settings = load_settings(write(tmp_path, here), {})
    assert settings.data_folder == str(tmp_path.resolve() / "images")
    assert settings.models_folder == "~/models"


def test_settings_are_frozen() -> None:
    settings = load_settings(LAPTOP, {})
    with pytest.raises(ValueError, match="frozen"):
        settings.http.port = 1


MODEL, POOL = "OCTET_MODELS__0__", "OCTET_MODELS__0__POOLS__0__"
RESTARTING = {  # the applications of examples/laptop.yaml that get new replicas by a change
    "OCTET_MAX_QUEUED": ("7", set()),
    "OCTET_IGNORE_UNKNOWN_FIELDS": ("true", set()),
    "OCTET_RESULTS__MAX_BYTES": ("1000", set()),
    "OCTET_DRAIN_TIMEOUT_S": ("9", set()),
    "OCTET_INGRESS__REPLICAS": ("3", set()),
    f"{MODEL}DEFAULTS__WIDTH": ("64", set()),
    f"{MODEL}LIMITS__MAX_IMAGES": ("2", set()),
    f"{POOL}REPLICAS": ("3", set()),
    f"{POOL}MIN_REPLICAS": ("0", set()),
    f"{POOL}SLOTS": ("2", {"Generator-landscapes-fp8"}),
    f"{MODEL}MAX_SEQUENCE_LENGTH": (
        "16",
        {"Generator-landscapes-fp8", "Generator-landscapes-fp16"},
    ),
    "OCTET_TEXT_ENCODERS__0__REPLICAS": ("2", set()),
    "OCTET_TEXT_ENCODERS__0__CACHE_MIB": ("64", {"TextEncoder-landscapes"}),
    "OCTET_DATA_FOLDER": ("/data", {"octet", "Jobs"}),
    "OCTET_INGRESS__NUM_CPUS": ("1", {"octet"}),
}


@pytest.mark.parametrize("name", RESTARTING)
def test_a_change_gives_new_replicas_only_to_the_applications_that_need_them(name: str) -> None:
    value, expected = RESTARTING[name]
    before, after = load_settings(LAPTOP, {}), load_settings(LAPTOP, {name: value})
    assert serve_config(after) != serve_config(before)
    assert {one for one, v in versions(after).items() if v != versions(before).get(one)} == expected


def test_a_new_model_pool_or_text_encoder_changes_no_other_application(tmp_path: Path) -> None:
    def add(data: dict[str, Any]) -> None:
        (model,) = data["models"]
        new = {**model, "id": "new", "text_encoder": "other", "max_sequence_length": 16}
        data["models"] = [new, model]
        # The first pool is the unit of the model's work, which running replicas are told.
        new_pool = {"precision": "fp16", "card": "a100-80", "num_gpus": 1}
        model["pools"] = [new_pool, {**model["pools"][0]}]
        data["text_encoders"] += [{**data["text_encoders"][0], "id": "other"}]

    before = load_settings(write(tmp_path, lambda _: None), {})
    after = load_settings(write(tmp_path, add), {})
    old, new = versions(before), versions(after)
    assert new.keys() - old.keys() == {
        *("Generator-new-fp8", "Generator-new-fp16", "TextEncoder-other"),
        "Generator-landscapes-fp16-a100-80",
    }
    assert old.keys() - new.keys() == {"Generator-landscapes-fp16"}
    assert all(old[name] == new[name] for name in old.keys() & new.keys())


def test_replicas_are_given_what_the_settings_say() -> None:
    settings = load_settings(EXAMPLES / "sd35.yaml", {})
    for application in serve_config(settings)["applications"]:
        arguments = ApplicationArguments.model_validate(application["args"])
        for deployment in application["deployments"]:
            live = deployment["user_config"]
            if pool := arguments.pool:
                (model,) = (m for m in settings.models if m.id == pool.model.id)
                (own,) = (p for p in model.pools if model.pool_name(p) == pool.name)
                most = deployment["autoscaling_config"]["max_replicas"]
                assert pool.pool.model_copy(update={"replicas": most}) == own
                assert LivePoolSettings.model_validate(live).reference.card == model.pools[0].card
            elif arguments.text_encoder:
                assert LiveEncoderSettings.model_validate(live).max_sequence_lengths == (256,)
            else:
                assert Settings.model_validate(live) == settings


def test_the_reference_in_the_docs_is_the_one_of_the_classes() -> None:
    """`python -m serve.settings.reference` prints it."""
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert text.endswith(reference.reference())


def test_the_reference_has_every_key_of_the_classes() -> None:
    groups = reference.groups()
    found = {f"{group}.{s.key}".lstrip(".") for group in groups for s in groups[group]}
    for example in ("laptop", "sd35"):
        data = yaml.safe_load((EXAMPLES / f"{example}.yaml").read_text())
        assert set(keys_in(data)) <= found
    restarts = {s.key: s.restarts for s in groups[""]}
    assert restarts["max_queued"] == "nothing"
    assert restarts["s3"] == "Ingresses, Dispatcher, Jobs"
    assert restarts["emulate_fp8"] == "pools"
    assert restarts["autoscaling_policy"] == "every replica"
    assert restarts["http"] == "`octet serve`"
    restarts = {s.key: s.restarts for s in groups["models[].pools[]"]}
    assert (restarts["slots"], restarts["replicas"]) == ("the pool's replicas", "nothing")


def keys_in(data: Any, prefix: str = "") -> Iterator[str]:
    """The paths of all keys, `[]` for each entry of a list."""
    if isinstance(data, list):
        for entry in data:
            if isinstance(entry, dict):
                yield from keys_in(entry, f"{prefix}[]")
    if isinstance(data, dict):
        for name, value in data.items():
            key = f"{prefix}.{name}".lstrip(".")
            if prefix.endswith(".presets"):  # whose keys are names
                key = f"{prefix}.NAME"
            else:
                yield key
            yield from keys_in(value, key)


@pytest.mark.parametrize("url", ["minio:9000", "minio.example", "ftp://minio", "http://"])
def test_the_address_of_a_bucket_needs_a_scheme_and_a_host(url: str) -> None:
    with pytest.raises(ValidationError):
        S3Settings(bucket="images", endpoint_url=url)
    assert S3Settings(bucket="images", endpoint_url="http://minio:9000").endpoint_url
