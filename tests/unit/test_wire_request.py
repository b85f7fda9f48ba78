"""Request bodies: parsed fields, refused ones, and the files of their answers."""

import inspect
import json
import statistics
import struct
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.api.wire.request import ImageGeneration, check_request_id, ignored_header, parse
from serve.engine.image_file import encode_image
from serve.errors import InvalidRequest, ModelNotFound
from serve.request import Edit, OutputFormat, Precision, Sampler, StreamOptions
from serve.settings.application import Settings
from serve.settings.models import Preset, RoutingRule

from ..builders import laptop_settings

SETTINGS = laptop_settings()
LIVE = SETTINGS


def body(**fields: object) -> bytes:
    return json.dumps({"prompt": "a city", **fields}).encode()


def test_defaults_come_from_the_model() -> None:
    (request,) = parse(body(), LIVE).images
    assert request.model == "landscapes"
    assert request.size == "128x128"
    assert request.num_inference_steps == 28
    assert request.guidance_scale == 3.0
    assert request.precision is Precision.AUTO
    assert request.output_format is OutputFormat.PNG


def test_image_i_has_seed_plus_i() -> None:
    requests = parse(body(n=3, seed=10), LIVE, "call").images
    assert [r.seed for r in requests] == [10, 11, 12]
    assert [r.id for r in requests] == ["call/0", "call/1", "call/2"]


def test_a_random_seed_is_chosen_when_none_is_given() -> None:
    assert len({parse(body(), LIVE).images[0].seed for _ in range(8)}) == 8


def test_null_means_not_given() -> None:
    (request,) = parse(body(size=None, n=None, seed=None, user=None), LIVE).images
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
        ({"response_format": "link"}, "response_format"),
        ({"output_compression": 101, "output_format": "jpeg"}, "output_compression"),
        ({"output_compression": 50}, "output_compression"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": 1e9}, "timeout_s"),
        ({"timeout_s": float("inf")}, "timeout_s"),
        ({"background": "transparent"}, "background"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "n": 2}, "n"),
        ({"stream": True, "response_format": "url"}, "response_format"),
        ({"stream": True, "partial_images": 4}, "partial_images"),
        ({"partial_images": 2}, "partial_images"),
        ({"progress": True}, "progress"),
        ({"frame_count": 3}, "frame_count"),
        ({"svg": {"model": "x"}}, "svg"),
        ({"prompt": "a\x00b"}, "prompt"),
        ({"prompt": "x" * 32_001}, "prompt"),
        ({"negative_prompt": "x" * 32_001}, "negative_prompt"),
        ({"sampler": "ddim"}, "sampler"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(body(**fields), LIVE)
    assert caught.value.param == param
    assert caught.value.status == 400


def test_every_parameter_of_the_openai_client_is_known() -> None:
    known = set(inspect.signature(openai.resources.Images.generate).parameters)
    of_client = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    assert known - of_client <= ImageGeneration.model_fields.keys()


def test_fields_that_cannot_change_the_image_are_accepted() -> None:
    plain = parse(body(seed=1), LIVE)
    fields = {
        "user": "u",
        "safety_identifier": "s",
        "style": "vivid",
        "moderation": "low",
        "quality": "hd",
        "sampler": None,
        "complexity": "high",
        "background": "opaque",
        "stream": False,
        "partial_images": 0,
        "size": "auto",
        "output_compression": 100,
    }
    (request,) = parse(body(seed=1, **fields), LIVE).images
    assert replace(request, output_compression=None) == plain.images[0]


def with_presets() -> Settings:
    """The laptop's settings, with two presets of its model."""
    (model,) = LIVE.models
    presets = {
        "medium": Preset(sampler=Sampler.DPMPP_2M, num_inference_steps=16),
        "draft": Preset(sampler=Sampler.EULER, num_inference_steps=6),
    }
    return LIVE.model_copy(update={"models": (model.model_copy(update={"presets": presets}),)})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ("", "euler", 28)),
        ({"quality": None}, ("", "euler", 28)),
        *(({"quality": name}, ("", "euler", 28)) for name in ("auto", "high", "hd", "standard")),
        ({"quality": "medium"}, ("medium", "dpmpp_2m", 16)),
        ({"quality": "draft"}, ("draft", "euler", 6)),
        # The model has no such preset, so the image is never worse than the client expects.
        ({"quality": "low"}, ("", "euler", 28)),
        ({"sampler": "dpmpp_2m"}, ("", "dpmpp_2m", 28)),
        ({"num_inference_steps": 20}, ("", "euler", 20)),
        # What a request states itself wins, so it generates what it did before there were presets.
        ({"quality": "medium", "num_inference_steps": 20}, ("", "euler", 20)),
        ({"quality": "medium", "sampler": "euler"}, ("", "euler", 28)),
        ({"quality": "low", "sampler": "dpmpp_2m", "num_inference_steps": 9}, ("", "dpmpp_2m", 9)),
    ],
)
def test_quality_chooses_a_preset(fields: dict[str, Any], expected: tuple[str, str, int]) -> None:
    (request,) = parse(body(**fields), with_presets()).images
    assert (request.preset, request.sampler, request.num_inference_steps) == expected


@pytest.mark.parametrize(
    ("prompt", "precision", "expected"),
    [
        ('a shop sign: "BREAD"', None, ("fp16", "text")),
        ("A SHOP SIGN", "auto", ("fp16", "text")),
        ("two hands", None, ("fp16", "hands")),
        ("two hands hold a sign", None, ("fp16", "text")),  # the first rule counts
        ("a design", None, ("auto", "")),
        ("a sign", "fp8", ("fp8", "")),  # the client has decided
        ("a sign", "fp16", ("fp16", "")),
        ("x" * 25_000 + " sign", None, ("fp16", "text")),
    ],
)
def test_rules_send_prompts_to_16_bit(
    prompt: str, precision: str | None, expected: tuple[str, str]
) -> None:
    rules = (
        RoutingRule(name="text", prompt=r"\bsigns?\b"),
        RoutingRule(name="hands", prompt=r"\bhands?\b"),
    )
    (model,) = LIVE.models
    routed = LIVE.model_copy(update={"models": (model.model_copy(update={"routing": rules}),)})
    (request,) = parse(body(prompt=prompt, precision=precision), routed).images
    assert (request.precision, request.routed_by) == expected


def test_a_quality_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'draft'") as caught:
        parse(body(quality="daft"), with_presets())
    assert caught.value.param == "quality"
    with pytest.raises(InvalidRequest, match="quality 'draft' does not exist"):
        parse(body(quality="draft"), LIVE)


@pytest.mark.parametrize("prompt", ["雪山上的月亮", "🌇🌊", "منظر جبلي", "x" * 32_000])
def test_any_language_is_a_prompt(prompt: str) -> None:
    assert parse(body(prompt=prompt), LIVE).images[0].prompt == prompt


@pytest.mark.parametrize(
    ("field", "nearest"),
    [("promt", "prompt"), ("steps", "num_inference_steps"), ("guidance", "guidance_scale")],
)
def test_an_unknown_field_names_the_nearest(field: str, nearest: str) -> None:
    # The unknown field is reported first, not the missing prompt.
    raw = json.dumps({field: 1}).encode()
    with pytest.raises(InvalidRequest, match=f"did you mean '{nearest}'") as caught:
        parse(raw, LIVE)
    assert caught.value.param == field


def test_settings_may_allow_unknown_fields_and_their_names_are_returned() -> None:
    lenient = LIVE.model_copy(update={"ignore_unknown_fields": True})
    request = parse(body(scheduler="ddim", n=1, **{"ä\n": 1}), lenient)
    assert request.ignored == ("scheduler", "ä\n")
    assert ignored_header(request.ignored) == {"x-octet-ignored": "scheduler, %C3%A4%0A"}
    assert ignored_header(()) == {}
    with pytest.raises(InvalidRequest, match="partial_images"):
        parse(body(partial_images=1), lenient)


def test_stream_options_are_parsed() -> None:
    request = parse(body(stream=True, partial_images=3, progress=True), LIVE)
    assert (request.stream, request.options) == (
        True,
        StreamOptions(progress=True, partial_images=3),
    )
    request = parse(body(progress=False), LIVE)
    assert (request.stream, request.options) == (False, StreamOptions())


def test_a_deadline_is_the_settings_or_shorter() -> None:
    assert parse(body(), LIVE).timeout_s == LIVE.request_timeout_s
    assert parse(body(timeout_s=2.5), LIVE).timeout_s == 2.5


@pytest.mark.parametrize("given", ["a", "A-z_0.9:x", "x" * 64])
def test_safe_request_ids_pass(given: str) -> None:
    check_request_id(given)


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "a/b", "é", "a\n"])
def test_other_request_ids_do_not(given: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_request_id(given)
    assert caught.value.param == "x-request-id"


def test_an_unknown_model_is_404() -> None:
    with pytest.raises(ModelNotFound, match="landscapes"):
        parse(body(model="sdxl"), LIVE)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"prompt": "\\ud800"}', b"[" * 100_000]
)
def test_a_body_that_is_no_json_object_is_400(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(raw, LIVE)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["prompt", "model", "n", "size", "seed", "guidance_scale", "precision", "extra"]


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_any_json_is_a_request_or_a_400(fields: dict[str, Any]) -> None:
    with suppress(InvalidRequest):
        assert parse(json.dumps(fields).encode(), LIVE).images


def text_chunks(png: bytes) -> dict[str, str]:
    """The text chunks of a PNG file, read without the library that wrote them."""
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


def test_a_png_holds_the_parameters_to_generate_it_again() -> None:
    (request,) = parse(
        body(prompt="夜 🌕", negative_prompt="fog", seed=5, size="96x96"), LIVE
    ).images
    pixels = np.zeros((96, 96, 3), np.uint8)
    texts = text_chunks(encode_image(pixels, request, "bf16"))
    (again,) = parse(texts["parameters"].encode(), LIVE).images
    assert again.precision is Precision.FP16
    for field in ("model", "prompt", "negative_prompt", "size", "seed", "guidance_scale"):
        assert getattr(again, field) == getattr(request, field)


def test_a_png_of_a_preset_generates_the_same_image_without_it() -> None:
    (request,) = parse(body(seed=5, quality="medium"), with_presets()).images
    texts = text_chunks(encode_image(np.zeros((128, 128, 3), np.uint8), request, "fp32"))
    (again,) = parse(texts["parameters"].encode(), LIVE).images
    assert again.preset == ""
    assert (again.sampler, again.num_inference_steps) == (Sampler.DPMPP_2M, 16)


def test_a_png_of_an_edit_says_how_it_was_edited_and_is_no_generation() -> None:
    edit = Edit(strength=0.25, image_sha256="digest", mask_sha256="digest")
    (request,) = parse(body(seed=5, size="96x96"), LIVE).images
    file = encode_image(np.zeros((75, 100, 3), np.uint8), replace(request, edit=edit), "bf16")
    texts = text_chunks(file)
    assert texts.keys() == {"Software", "edit_parameters"}
    assert json.loads(texts["edit_parameters"])["strength"] == 0.25
    assert b"digest" not in file
    with pytest.raises(InvalidRequest, match="unknown field 'strength'"):
        parse(texts["edit_parameters"].encode(), LIVE)


@pytest.mark.parametrize(
    ("output_format", "magic"), [("jpeg", b"\xff\xd8\xff"), ("webp", b"RIFF"), ("png", b"\x89PNG")]
)
def test_files_are_of_the_format_asked_for(output_format: str, magic: bytes) -> None:
    (request,) = parse(body(output_format=output_format), LIVE).images
    assert encode_image(np.zeros((8, 8, 3), np.uint8), request, "fp8").startswith(magic)


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_compression_makes_files_smaller(output_format: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    sizes = [
        len(encode_image(pixels, parse(body(**fields), LIVE).images[0], "fp8"))
        for fields in (
            {"output_format": output_format, "output_compression": 10},
            {"output_format": output_format},
            {"output_format": output_format, "output_compression": 100},
        )
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1] < sizes[2]


def test_a_megabyte_of_unknown_fields_costs_little_more_than_reading_it() -> None:
    """The event loop waits while a body is parsed.

    Parsing takes about 3 times as long as `json.loads`. Reporting every field by pydantic takes 7
    times as long, and a suggestion for each of them 270 times. CPU times of the thread are compared
    in turns, so other processes do not matter.
    """
    text = json.dumps({"prompt": "x", **{f"field{i}": 1 for i in range(55_000)}}).encode()
    assert len(text) > 900_000

    def refuse() -> None:
        with pytest.raises(InvalidRequest, match="unknown field 'field0'"):
            parse(text, LIVE)

    def cpu_s(work: Callable[[], object]) -> float:
        began = time.thread_time()
        work()
        return time.thread_time() - began

    pairs = [(cpu_s(lambda: json.loads(text)), cpu_s(refuse)) for _ in range(7)]
    reading_s = statistics.median(reading for reading, _ in pairs)
    refusing_s = statistics.median(refusing for _, refusing in pairs)
    assert refusing_s < 5 * reading_s
