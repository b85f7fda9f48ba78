"""Tests of checkpoints on real files: pulled from a local hub, quantised, verified and loaded."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import pytest
import torch

from bench.load_time import measure
from serve.engine.denoiser import DENOISER_COMPONENTS, Denoiser, load_transformer
from serve.engine.fp8_checkpoint import quantize
from serve.engine.fp8_format import is_fp8
from serve.engine.precision import ENCODER_RECIPES, RECIPES
from serve.engine.prompt_encoder import ENCODER_COMPONENTS, PromptEncoder
from serve.engine.single_file import pull_single_file
from serve.models.checkpoints import MANIFEST, CheckpointError, open_checkpoint, verify
from serve.models.structures import structure_of
from serve.settings.models import Source

from ..builders import DEMO_MODEL, ROOT, laptop_settings
from .stability import saved, stabilitys_model, tiny_models

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "fp8"
    quantize(DEMO_MODEL, out)
    return out


# -- quantised checkpoints ------------------------------------------------------------------------


def test_an_fp8_checkpoint_generates_the_same_image_bit_for_bit(fp8_folder: Path) -> None:
    latents = []
    for folder in (DEMO_MODEL, fp8_folder):
        encoder = PromptEncoder(folder, ENCODER_RECIPES["t5-quanto"])
        denoiser = Denoiser.load(folder, RECIPES["fp8"])
        embeds = encoder.encode_prompts(["", "a city at night"], 32)
        image = denoiser.begin(
            embeds, width=64, height=64, num_inference_steps=3, guidance_scale=3.0, seed=1
        )
        while not image.finished:
            denoiser.denoise_step([image])
        latents.append(denoiser.decode(image.latents))
    assert torch.equal(*latents)


@pytest.mark.parametrize("name", ["t5-fp8", "t5-quanto"])
@pytest.mark.parametrize("sixteen_bit", ["bf16", "fp16"])
def test_the_t5_of_a_checkpoint_is_like_one_quantised_at_load(
    fp8_folder: Path, sixteen_bit: Literal["bf16", "fp16"], name: str
) -> None:
    recipe = ENCODER_RECIPES[name].on(sixteen_bit)
    there, made = (PromptEncoder(folder, recipe) for folder in (DEMO_MODEL, fp8_folder))
    counts = []
    for encoder in (there, made):
        assert encoder.t5 is not None
        parameters = list(encoder.t5.parameters())
        assert {(p.dtype, p.device.type) for p in parameters} == {(recipe.dtype, "cpu")}
        counts.append(len(parameters))
    assert counts[0] == counts[1]
    exact = PromptEncoder(DEMO_MODEL).encode_prompts(["a city"], 32).tokens
    errors = [
        (encoder.encode_prompts(["a city"], 32).tokens - exact).abs().max()
        for encoder in (there, made)
    ]
    assert errors[1] <= 1.01 * errors[0]


def test_an_fp8_checkpoint_is_complete_and_smaller(fp8_folder: Path) -> None:
    """The folder has copies and no symbolic links, so it does not need the original folder."""
    assert not [path for path in fp8_folder.rglob("*") if path.is_symlink()]
    for part in ("transformer", "text_encoder_3"):
        assert is_fp8(fp8_folder, part)
        assert not is_fp8(DEMO_MODEL, part)
        sizes = [
            sum(f.stat().st_size for f in (folder / part).iterdir())
            for folder in (fp8_folder, DEMO_MODEL)
        ]
        assert sizes[0] < sizes[1]
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        for file in (DEMO_MODEL / part).iterdir():
            assert (fp8_folder / part / file.name).read_bytes() == file.read_bytes()
    assert (fp8_folder / "example_prompts.json").read_text().startswith("[")


def test_recipes_that_need_16_bit_weights_refuse_an_fp8_checkpoint(fp8_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="bf16 needs the original"):
        Denoiser.load(fp8_folder, RECIPES["bf16"])
    with pytest.raises(CheckpointError, match="fp32 needs the original"):
        PromptEncoder(fp8_folder, ENCODER_RECIPES["fp32"])


def test_8_bit_adaln_is_the_same_if_made_beforehand_or_at_load(
    fp8_folder: Path, tmp_path: Path
) -> None:
    recipe = RECIPES["fp8-adaln8"]
    quantize(DEMO_MODEL, tmp_path / "small", recipe)
    models = [
        load_transformer(folder, recipe, "cpu").state_dict()
        for folder in (DEMO_MODEL, fp8_folder, tmp_path / "small")
    ]
    for state in models[1:]:
        assert state.keys() == models[0].keys()
        assert all(torch.equal(state[k].view(torch.uint8), v.view(torch.uint8))
                   for k, v in models[0].items())  # fmt: skip
    weights = [(f / "transformer" / "fp8.safetensors").stat().st_size
               for f in (fp8_folder, tmp_path / "small")]  # fmt: skip
    assert weights[1] < 0.85 * weights[0]
    with pytest.raises(CheckpointError, match="adaln_8_bit: true"):
        Denoiser.load(tmp_path / "small", RECIPES["fp8"])


def test_diffusers_and_transformers_refuse_an_fp8_checkpoint(fp8_folder: Path) -> None:
    from diffusers import SD3Transformer2DModel
    from transformers import T5EncoderModel

    with pytest.raises(ValueError, match="octet-fp8-rowwise"):
        SD3Transformer2DModel.from_pretrained(fp8_folder / "transformer")
    with pytest.raises(OSError, match="no file named"):
        T5EncoderModel.from_pretrained(fp8_folder / "text_encoder_3")


def test_quantising_refuses_existing_folders_fp8_and_missing_models(
    fp8_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="exists already"):
        quantize(DEMO_MODEL, fp8_folder)
    with pytest.raises(CheckpointError, match="FP8 checkpoint already"):
        quantize(fp8_folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no model here"):
        quantize(tmp_path, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_loading_fp8_never_holds_the_16_bit_weights() -> None:
    """The model has SD3.5 Medium's structure at a quarter of its width.

    Each load runs in a fresh process.
    """
    found = measure(heads=6, repeats=1)
    assert found["fp8"]["file_bytes"] < 0.8 * found["bf16"]["file_bytes"]
    assert found["fp8"]["peak_bytes"] < found["bf16"]["file_bytes"]
    assert found["bf16"]["peak_bytes"] > found["bf16"]["file_bytes"]  # loading bf16 does hold them


# -- digests --------------------------------------------------------------------------------------


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: changed(f / "transformer" / "fp8.safetensors"), "SHA-256"),
        (lambda f: changed(f / "vae" / "config.json"), "SHA-256"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "missing"),
        (lambda f: (f / "vae" / "more.safetensors").write_bytes(b""), "not in the manifest"),
        (lambda f: (f / MANIFEST).write_text("{}"), "not a manifest"),
    ],
)
def test_a_changed_checkpoint_is_not_loaded(
    fp8_folder: Path, tmp_path: Path, harm: object, words: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(fp8_folder, folder)
    source = Source(location=str(folder))
    assert open_checkpoint(source, None, DENOISER_COMPONENTS) == folder
    assert callable(harm)
    harm(folder)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(source, None, DENOISER_COMPONENTS)


def test_only_the_named_components_are_verified(fp8_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(fp8_folder, folder)
    changed(folder / "text_encoder" / "model.safetensors")
    verify(folder, DENOISER_COMPONENTS)
    with pytest.raises(CheckpointError):
        verify(folder, ENCODER_COMPONENTS)


# -- a hub ----------------------------------------------------------------------------------------


class Hub(http.server.ThreadingHTTPServer):
    """A local stand-in for the Hugging Face hub: one repository at one revision.

    The hub's own client downloads from this server. `gated`: whether the files need a login.
    `served`: the names of the downloaded files.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files
        self.gated = False
        self.lie = ""  # a file whose digest the hub states wrongly
        self.served: list[str] = []


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if not path.removeprefix("/api/models").startswith("/org/model"):
            return self._fail(HTTPStatus.UNAUTHORIZED, "RepoNotFound")
        if REVISION not in path:
            return self._fail(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        if path.startswith("/api/models/org/model/tree/"):
            return self._json(
                [{"type": "file", "path": f, **self._blob(f)} for f in self.server.files]
            )
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": f, **self._blob(f)} for f in self.server.files]
            return self._json({"id": "org/model", "sha": REVISION, "siblings": siblings})
        name = path.partition(f"/resolve/{REVISION}/")[2]
        if self.server.gated:
            return self._fail(HTTPStatus.FORBIDDEN, "GatedRepo")
        if name not in self.server.files:
            return self._fail(HTTPStatus.NOT_FOUND, "EntryNotFound")
        if self.command == "GET":
            self.server.served.append(name)
        etag = hashlib.sha256(self.server.files[name]).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION}
        return self._send(HTTPStatus.OK, self.server.files[name], headers)

    do_HEAD = do_GET  # noqa: N815 - the base class looks for this name

    def _blob(self, name: str) -> dict[str, object]:
        content = self.server.files[name]
        blob: dict[str, object] = {"size": len(content), "oid": "0" * 40, "blobId": "0" * 40}
        if name.endswith(".safetensors"):
            digest = hashlib.sha256(b"" if name == self.server.lie else content).hexdigest()
            lfs = {"sha256": digest, "oid": digest, "size": len(content), "pointerSize": 1}
            blob["lfs"] = lfs
        return blob

    def _json(self, data: object) -> None:
        self._send(HTTPStatus.OK, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: HTTPStatus, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code})

    def _send(self, status: HTTPStatus, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    paths = [path for path in DEMO_MODEL.rglob("*") if path.is_file()]
    files = {path.relative_to(DEMO_MODEL).as_posix(): path.read_bytes() for path in paths}
    # Real repositories also hold files like these, which Octet must not download.
    files["model.safetensors"] = files["vae/diffusion_pytorch_model.fp16.safetensors"] = b"x"
    files["text_encoders/clip_g.safetensors"] = files["README.md"] = b"x"
    hub = Hub(files)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    yield hub
    hub.shutdown()
    thread.join()
    hub.server_close()


def octet_pull(hub: Hub, models: Path, what: str = f"org/model@{REVISION}") -> tuple[int, str]:
    file = models.with_suffix(".yaml")
    text = (ROOT / "examples" / "laptop.yaml").read_text()
    source = f"{{ location: org/model, revision: {REVISION} }}"
    text = text.replace("{ location: ../demo/model }", source)
    file.write_text(f"models_folder: {models}\n{text}")
    program = "from serve.cli.__main__ import main; main()"
    done = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-W", "ignore", "-c", program, "pull", what, "--config", str(file)],
        env={
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_pulled_weights_load_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    models = tmp_path / "models"
    code, output = octet_pull(hub, models, "landscapes")
    assert code == 0, output
    source = Source(location="org/model", revision=REVISION)
    folder = open_checkpoint(source, str(models), DENOISER_COMPONENTS)
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    wanted = {p.relative_to(DEMO_MODEL).as_posix() for p in DEMO_MODEL.rglob("*") if p.is_file()}
    assert there == {*wanted, MANIFEST}
    assert Denoiser.load(folder, RECIPES["bf16"])

    served = len(hub.served)
    assert octet_pull(hub, models)[0] == 0  # all files are there: none is fetched again
    assert len(hub.served) == served
    changed(folder / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="SHA-256"):
        open_checkpoint(source, str(models), DENOISER_COMPONENTS)


def test_a_node_without_generators_pulls_the_structure_alone(hub: Hub, tmp_path: Path) -> None:
    models = tmp_path / "models"
    code, output = octet_pull(hub, models, "--structures")
    assert code == 0, output
    assert hub.served == ["transformer/config.json"]
    (model,) = laptop_settings().models
    unknown = model.model_copy(update={"source": Source(location="org/model", revision=REVISION)})
    assert structure_of(unknown, str(models)) == structure_of(model, None)

    # The weights are still pulled as a whole, and the structure is not fetched again.
    assert octet_pull(hub, models)[0] == 0
    assert hub.served.count("vae/diffusion_pytorch_model.safetensors") == 1
    served = len(hub.served)
    assert octet_pull(hub, models, "--structures")[0] == 0
    assert len(hub.served) == served


def test_a_single_file_is_pulled_and_converted_once(hub: Hub, tmp_path: Path) -> None:
    saved(stabilitys_model(tiny_models()), tmp_path)
    hub.files = {
        "sd3.5_tiny.safetensors": (tmp_path / "model.safetensors").read_bytes(),
        "README.md": b"x",
    }
    models, name = tmp_path / "models", "sd3.5_tiny.safetensors"
    code, output = octet_pull(hub, models, f"org/model@{REVISION}/{name}")
    assert code == 0, output
    assert hub.served == [name]
    (folder,) = (each for each in (models / "org--model").iterdir() if each.is_dir())
    assert str(folder) in output.replace("\n", "")
    source = Source(location="org/model", revision=REVISION)
    assert pull_single_file(source, name, str(models)) == folder  # without the hub
    assert Denoiser.load(folder, RECIPES["bf16"])


def test_a_repository_without_a_folder_of_weights_names_its_files(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"sd3.5_tiny.safetensors": b"x", "text_encoders/clip_g.safetensors": b"x"}
    for model in (f"org/model@{REVISION}", f"org/model@{REVISION}/other.safetensors"):
        code, output = octet_pull(hub, tmp_path / "models", model)
        assert code == 1
        assert "sd3.5_tiny.safetensors" in output
        assert "clip_g" not in output
        assert "Traceback" not in output


def test_pulling_a_gated_model_explains_how_to_log_in(hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    code, output = octet_pull(hub, tmp_path / "models")
    assert code == 1
    for words in ("is gated", "https://huggingface.co/org/model", "hf auth login", "HF_TOKEN"):
        assert words in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (f"org/other@{REVISION}", "no such repository, or it is private"),
        (f"org/model@{'f' * 40}", f"org/model has no revision {'f' * 40}"),
        ("org/model@main", "neither a folder nor HUB/ID@REVISION"),
        ("landscape", "neither a folder nor HUB/ID@REVISION"),
    ],
)
def test_a_pull_that_cannot_work_is_explained_without_traceback(
    hub: Hub, tmp_path: Path, model: str, words: str
) -> None:
    code, output = octet_pull(hub, tmp_path / "models", model)
    assert code == (2 if "neither" in words else 1)
    assert words in output
    assert "Traceback" not in output


def test_a_file_with_another_digest_than_the_hubs_is_not_kept(hub: Hub, tmp_path: Path) -> None:
    hub.lie = "vae/diffusion_pytorch_model.safetensors"
    code, output = octet_pull(hub, tmp_path / "models")
    assert code == 1
    assert f"{hub.lie} is not the one that the hub states" in output
    hub.lie = ""
    assert octet_pull(hub, tmp_path / "models")[0] == 0
