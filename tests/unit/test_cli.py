import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from serve.cli import plots
from serve.cli.main import app
from serve.errors import SettingsError
from serve.results.disk import DiskStore
from serve.results.store import new_name
from serve.settings.file import changed_values
from serve.store.database import Database
from serve.usage.ledger import UsageLedger
from serve.usage.record import UsageRecord

from ..stored import store_in, usage_in

EXAMPLES = Path(__file__).parents[2] / "examples"


def octet(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def test_check_config_shows_the_pools() -> None:
    code, output = octet("check-config", str(EXAMPLES / "sd35.yaml"))
    assert code == 0
    assert "sd3.5-large-turbo" in output
    assert "ok" in output


def test_debug_raises_the_error_itself() -> None:
    result = CliRunner().invoke(app, ["--debug", "check-config", "nowhere.yaml"])
    assert isinstance(result.exception, SettingsError)


def test_check_config_shows_what_was_set_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("OCTET_MODELS__0__LIMITS__MAX_STEPS", "60")
    file = tmp_path / "octet.yaml"
    text = (EXAMPLES / "laptop.yaml").read_text()
    file.write_text(text.replace("../demo/model", str(EXAMPLES.parent / "demo" / "model")))
    found = {key: (value, place) for key, value, place in changed_values(file)}
    lines = file.read_text().splitlines()

    def line(begins: str) -> str:
        (number,) = [i for i, text in enumerate(lines, 1) if text.lstrip("- ").startswith(begins)]
        return f"{file}:{number}"

    assert found["auth"] == ("none", line("auth:"))
    assert found["models[0].id"][0] == "landscapes"
    assert found["models[0].limits.max_size_px"] == (256, line("limits:"))
    assert found["models[0].limits.max_steps"] == (60, "OCTET_MODELS__0__LIMITS__MAX_STEPS")
    assert "max_queued" not in found  # it has its default
    code, output = octet("check-config", str(file))
    assert (code, "OCTET_MODELS__0__LIMITS__MAX_STEPS" in "".join(output.split())) == (0, True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "octet.yaml: the file is empty; examples/laptop.yaml is a complete one"),
        ("models: [\n a: }\n", "octet.yaml:2:5: not YAML: expected the node content"),
        ("- a\n", "octet.yaml: expected keys with values, found list"),
        ("max_queued: x\n", "octet.yaml: max_queued: Input should be a valid integer"),
    ],
)
def test_a_file_that_cannot_be_used_says_where(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "octet.yaml"
    file.write_text(text)
    code, output = octet("check-config", str(file))
    assert (code, says in output) == (1, True), output


def test_a_wrong_variable_is_blamed_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value, says in (
        ("OCTET_MAX_QUEUED", "abc", "octet: OCTET_MAX_QUEUED: max_queued: Input should be"),
        ("OCTET_MAX_QUEUED", "{", "octet: OCTET_MAX_QUEUED: '{' is not YAML"),
        (
            "OCTET_MODELS__0__LIMITS__MAX_STEPS",
            "0",
            "or OCTET_MODELS__0__LIMITS__MAX_STEPS: models",
        ),
    ):
        monkeypatch.setenv(name, value)
        code, output = octet("check-config", str(EXAMPLES / "laptop.yaml"))
        assert (code, says in output) == (1, True), output
        monkeypatch.delenv(name)


def test_a_model_folder_without_a_model_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "empty").mkdir()
    file = tmp_path / "octet.yaml"
    text = (EXAMPLES / "laptop.yaml").read_text()
    file.write_text(text.replace("../demo/model", "empty"))
    assert "no such model folder" in " ".join(octet("models", str(file))[1].split())


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command and group of commands."""
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


@pytest.mark.parametrize("words", list(commands(get_command(app))), ids=" ".join)
def test_no_help_is_cut_off_in_a_narrow_terminal(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, output = octet(*words, "--help")
    assert (code, "Usage:" in output) == (0, True)
    assert "…" not in output


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, output = octet("demo", "--port", str(taken.getsockname()[1]))
    assert code == 1
    assert "cannot listen on 127.0.0.1" in output


def settings_in(folder: Path) -> str:
    """A settings file with keys and a data folder; returns its path."""
    text = (EXAMPLES / "laptop.yaml").read_text()
    text = text.replace("../demo/model", str(EXAMPLES.parent / "demo" / "model"))
    file = folder / "settings.yaml"
    file.write_text(text.replace("auth: none", "auth: keys") + "data_folder: data\n")
    return str(file)


def charge(folder: Path, *tenants: str) -> None:
    """Charge an image of each of these tenants, in the database of `settings_in`."""
    with closing(Database(**store_in(folder / "data"))) as database:
        ledger = UsageLedger(database, time.time())
        for i, tenant in enumerate(tenants):
            usage = UsageRecord(str(i), 0, tenant, "id", "m", "fp8", "64x64", 10, 1.25)
            ledger.append([usage], time.time())


def test_commands_change_tenants_and_their_keys(tmp_path: Path) -> None:
    config = settings_in(tmp_path)

    def command(*arguments: str) -> tuple[int, str]:
        code, output = octet("tenant", *arguments, "--config", config)
        return code, " ".join(output.split())

    code, output = command("add", "acme", "--weight", "2", "--model", "m", "--requests-per-s", "5")
    assert code == 0
    assert re.search(r"octet_acme_[0-9a-f]{40}", output)
    for change, words in (
        (["list"], "requests_per_s 5"),
        (["set", "acme", "--monthly-work", "7", "--unset", "requests_per_s"], "acme: changed"),
        (["list"], "monthly_work 7"),
        (["add-key", "acme", "--scope", "read", "--expires", "2999-01-01"], "octet_acme_"),
        (["list"], "2999-01-01T00:00"),
        (["revoke", "acme", "--old"], "1 of the keys of acme revoked"),
        (["revoke", "acme"], "1 of the keys of acme revoked"),
        (["list"], "no key"),
        (["remove", "acme", "--yes"], "acme: deleted"),
        (["audit"], "delete tenant"),
    ):
        code, output = command(*change)
        assert (code, words in output) == (0, True), output
    assert "acme" not in command("list")[1]


def test_a_folder_is_applied_after_a_dry_run(tmp_path: Path) -> None:
    config, folder = settings_in(tmp_path), tmp_path / "tenants"
    folder.mkdir()
    (folder / "tenants.yaml").write_text("acme: {weight: 2}\n")
    for options, said in (
        (["--dry-run"], "create acme: weight None → 2.0"),
        ([], "1 changed"),
        ([], "0 changed"),
    ):
        code, output = octet("tenant", "apply", str(folder), "--config", config, *options)
        assert (code, said in output) == (0, True), output
    (folder / "tenants.yaml").write_text("{}")
    code, output = octet("tenant", "apply", str(folder), "--config", config)
    said = " ".join(output.split())
    assert (code, "deletes or revokes keys of: acme" in said) == (2, True), said
    assert "add --yes" in said
    (folder / "tenants.yaml").write_text("acme: {weight: 2}\n")
    code, output = octet("tenant", "set", "acme", "--weight", "3", "--config", config)
    assert (code, "managed by tenants.yaml" in " ".join(output.split())) == (1, True)


def test_a_tenant_is_erased(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    store = DiskStore(tmp_path / "data")
    names = [new_name(tenant, "png", 0.0) for tenant in ("acme", "other")]
    for name in names:
        store.put(name, b"x", "r")
    charge(tmp_path, "acme")
    code, output = octet("tenant", "erase", "acme", "--config", settings)
    said = " ".join(output.split())
    assert (code, "1 usage records and all jobs in" in said, "add --yes" in said) == (
        2,
        True,
        True,
    ), output
    assert store.get(names[0]) == b"x"
    code, output = octet("tenant", "erase", "acme", "--config", settings, "--yes")
    assert (code, "1 images, 1 records and 0 jobs of acme are deleted" in output) == (0, True), (
        output
    )
    assert store.get(names[1]) == b"x"
    assert not usage_in(tmp_path / "data")


def test_keys_that_still_work_are_named_before_an_erasure(tmp_path: Path) -> None:
    config = "--config", settings_in(tmp_path)
    assert octet("tenant", "add", "acme", *config)[0] == 0
    said = " ".join(octet("tenant", "erase", "acme", *config)[1].split())
    assert "The keys of acme still work: revoke them first with octet tenant revoke acme" in said
    assert octet("tenant", "revoke", "acme", *config)[0] == 0
    assert "still work" not in octet("tenant", "erase", "acme", *config)[1]


def test_usage_that_is_not_there_is_explained(tmp_path: Path) -> None:
    config = "--config", settings_in(tmp_path)
    code, output = octet("usage", *config)
    assert (code, "no such database" in " ".join(output.split())) == (1, True)
    assert not (tmp_path / "data").exists()
    charge(tmp_path, "acme")
    code, output = octet("usage", *config, "--tenant", "acne")
    assert (code, "did you mean 'acme'?" in " ".join(output.split())) == (1, True)


def test_the_version_is_printed() -> None:
    assert octet("--version") == (0, f"octet {version('octet-serve')}\n")


def test_a_ray_that_is_not_there_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for command in (["doctor"], ["plan", "--model", "sd3.5-medium"]):
        code, output = octet(*command, "--ray", f"127.0.0.1:{port}")
        said = " ".join(output.split())
        assert (code, f"no Ray at 127.0.0.1:{port}: " in said) == (1, True), output


@pytest.mark.parametrize(
    ("file", "says"),
    [("b.foo", "must end in one of .png"), ("gone/b.png", "there is no folder")],
)
def test_a_plot_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, says: str
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda _: True)
    monkeypatch.setattr("serve.cli.simulate.workload_of", lambda *_: pytest.fail("work began"))
    code, output = octet("simulate", "--plot", str(tmp_path / file))
    assert (code, says in " ".join(output.split())) == (2, True), output
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    code, output = octet("simulate", "--plot", str(tmp_path / "b.png"))
    assert (code, "pip install matplotlib" in " ".join(output.split())) == (2, True), output


def test_usage_is_summed_by_tenant_and_model(tmp_path: Path) -> None:
    config = "--config", settings_in(tmp_path)
    charge(tmp_path, "acme", "acme", "other")
    _, output = octet("usage", *config)
    lines = [line for line in output.splitlines() if "acme" in line]
    assert len(lines) == 2  # the sum and its only model
    assert all("2.500" in line for line in lines)
    assert "other" in output
    _, output = octet("usage", *config, "--tenant", "other", "--records")
    assert [json.loads(line)["tenant"] for line in output.splitlines()] == ["other"]


def test_auth_none_is_allowed_on_loopback_addresses_only(tmp_path: Path) -> None:
    text = (EXAMPLES / "laptop.yaml").read_text().replace("../demo", str(EXAMPLES.parent / "demo"))
    file = tmp_path / "octet.yaml"
    file.write_text(text.replace("127.0.0.1", "0.0.0.0"))  # noqa: S104 - this address is refused
    code, output = octet("check-config", str(file))
    assert code == 1
    assert "auth none: anybody who reaches 0.0.0.0 could generate images" in output
    file.write_text(file.read_text().replace("auth: none", "auth: none-on-any-address"))
    assert octet("check-config", str(file))[0] == 0
    file.write_text(text.replace("auth: none", "auth: keys"))
    assert "set data_folder" in octet("check-config", str(file))[1]


def test_json_says_what_the_tables_say(tmp_path: Path) -> None:
    laptop = str(EXAMPLES / "laptop.yaml")

    def found(*arguments: str) -> Any:
        result = CliRunner().invoke(app, [*arguments, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    assert [pool["pool"] for pool in found("check-config", laptop)["pools"]] == ["fp8", "fp16"]
    assert {"auth", "models[0].id"} <= {
        one["key"] for one in found("check-config", laptop)["changed"]
    }
    rows = found("models", laptop)
    assert {row["part"] for row in rows} == {"pool fp8", "pool fp16", "text encoder landscapes"}
    assert all(row["bytes"] > 10**6 for row in rows)
    config = "--config", settings_in(tmp_path)
    assert octet("tenant", "add", "acme", "--weight", "2", *config)[0] == 0
    (acme,) = found("tenant", "list", *config)
    assert (acme["limits"], len(acme["keys"])) == ({"weight": 2}, 1)
    charge(tmp_path, "acme", "acme")
    (row,) = found("usage", *config)["usage"]
    assert (row["tenant"], row["outcome"], row["images"], row["work_s"]) == (
        "acme",
        "delivered",
        2,
        2.5,
    )


def test_without_a_terminal_there_are_no_colours() -> None:
    command = Path(sys.executable).parent / "octet"
    for words, stream in (
        (["check-config", str(EXAMPLES / "laptop.yaml")], "stdout"),
        (["check-config", "nowhere.yaml"], "stderr"),
        (["--help"], "stdout"),
    ):
        done = subprocess.run(  # noqa: S603 - our own command
            [command, *words], capture_output=True, text=True, check=False
        )
        text = getattr(done, stream)
        assert text
        assert "\x1b" not in text
