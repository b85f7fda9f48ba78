import json
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.api.openai_images import parse
from serve.engine.image_file import encode_image
from serve.errors import InvalidRequest, ModelNotFound
from serve.request import OutputFormat, Precision
from serve.settings import load_settings

SETTINGS = load_settings(Path(__file__).parents[2] / "examples" / "laptop.yaml", {})
MODELS = {model.id: model for model in SETTINGS.models}


def body(**fields: object) -> bytes:
    return json.dumps({"prompt": "a city", **fields}).encode()


def test_defaults_come_from_the_model() -> None:
    (request,) = parse(body(), MODELS)
    assert request.model == "landscapes"
    assert request.size == "128x128"
    assert request.num_inference_steps == 28
    assert request.guidance_scale == 3.0
    assert request.precision is Precision.AUTO
    assert request.output_format is OutputFormat.PNG


def test_image_i_has_seed_plus_i() -> None:
    requests = parse(body(n=3, seed=10), MODELS)
    assert [r.seed for r in requests] == [10, 11, 12]
    assert len({r.id for r in requests}) == 3


def test_seeds_are_drawn_when_none_is_given() -> None:
    assert len({parse(body(), MODELS)[0].seed for _ in range(8)}) == 8


def test_null_is_not_given() -> None:
    (request,) = parse(body(size=None, n=None, seed=None, user=None), MODELS)
    assert request.size == "128x128"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"n": "2"}, "n"),
        ({"size": "big"}, "size"),
        ({"size": "100x100"}, "size"),
        ({"size": "1024x1024"}, "size"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63 - 1, "n": 2}, "seed"),
        ({"num_inference_steps": 1.5}, "num_inference_steps"),
        ({"num_inference_steps": 1000}, "num_inference_steps"),
        ({"guidance_scale": "high"}, "guidance_scale"),
        ({"precision": "fp4"}, "precision"),
        ({"output_format": "gif"}, "output_format"),
        ({"response_format": "url"}, "response_format"),
        ({"sampler": "ddim"}, "sampler"),
    ],
)
def test_wrong_fields_are_named(fields: dict, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(body(**fields), MODELS)
    assert caught.value.param == param
    assert caught.value.status == 400


def test_an_unknown_model_is_404() -> None:
    with pytest.raises(ModelNotFound, match="landscapes"):
        parse(body(model="sdxl"), MODELS)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"prompt": "\\ud800"}', b"[" * 100_000]
)
def test_what_is_no_json_object_is_400(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(raw, MODELS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["prompt", "model", "n", "size", "seed", "guidance_scale", "precision", "extra"]


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_any_json_is_a_request_or_a_400(fields: dict) -> None:
    with suppress(InvalidRequest):
        assert parse(json.dumps(fields).encode(), MODELS)


def text_chunks(png: bytes) -> dict[str, str]:
    """The texts of a PNG file, read without the library that wrote them."""
    texts, at = {}, 8
    while at < len(png):
        (length,), kind = struct.unpack(">I", png[at : at + 4]), png[at + 4 : at + 8]
        data = png[at + 8 : at + 8 + length]
        if kind == b"tEXt":
            key, value = data.split(b"\x00", 1)
            texts[key.decode()] = value.decode("latin-1")
        elif kind == b"iTXt":
            key, rest = data.split(b"\x00", 1)
            compressed, value = rest[0], rest[2:].split(b"\x00", 2)[2]
            texts[key.decode()] = (zlib.decompress(value) if compressed else value).decode()
        at += 12 + length
    return texts


def test_a_png_tells_how_to_make_it_again() -> None:
    (request,) = parse(body(prompt="夜 🌕", negative_prompt="fog", seed=5, size="96x96"), MODELS)
    pixels = np.zeros((96, 96, 3), np.uint8)
    texts = text_chunks(encode_image(pixels, request, "bf16"))
    (again,) = parse(texts["parameters"].encode(), MODELS)
    assert again.precision is Precision.FP16
    for field in ("model", "prompt", "negative_prompt", "size", "seed", "guidance_scale"):
        assert getattr(again, field) == getattr(request, field)


@pytest.mark.parametrize(
    ("output_format", "magic"), [("jpeg", b"\xff\xd8\xff"), ("webp", b"RIFF"), ("png", b"\x89PNG")]
)
def test_files_are_of_the_format_asked_for(output_format: str, magic: bytes) -> None:
    (request,) = parse(body(output_format=output_format), MODELS)
    assert encode_image(np.zeros((8, 8, 3), np.uint8), request, "fp8").startswith(magic)
