"""Bodies of edits: forms and JSON, their pictures and masks, and damaged ones."""

from __future__ import annotations

import base64
import functools
import io
import json
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from serve.api.wire.edit import fitted, parse_edit
from serve.api.wire.multipart import form_parts
from serve.api.wire.picture import Picture, Size
from serve.api.wire.request import GenerationRequest
from serve.edit_pixels import EditPixels
from serve.errors import BodyTooLarge, InvalidRequest, ModelNotFound
from serve.request import ModelLimits

from ..builders import laptop_settings

EDITS = Path(__file__).parents[1] / "edits"
CASES: dict[str, Any] = json.loads((EDITS / "expected.json").read_text())["cases"]
LIVE = laptop_settings()
MOST = 25_000_000  # pixels

Files = list[tuple[str, tuple[str, bytes]]]


def file(name: str) -> bytes:
    return (EDITS / name).read_bytes()


PLAIN, MASK = file("plain.png"), file("mask_alpha.png")


def form(files: Files, **texts: str) -> tuple[bytes, str]:
    """The body and the content type of a form, with the text of `prompt` first."""
    parts = [
        *((f'name="{name}"', text.encode()) for name, text in {"prompt": "x", **texts}.items()),
        *((f'name="{name}"; filename="{of}"', data) for name, (of, data) in files),
    ]
    body = b"".join(
        f"--b\r\nContent-Disposition: form-data; {header}\r\n\r\n".encode() + data + b"\r\n"
        for header, data in parts
    )
    return body + b"--b--\r\n", "multipart/form-data; boundary=b"


def read(
    image: bytes, mask: bytes | None = None, **texts: str
) -> tuple[GenerationRequest, EditPixels]:
    files = [("image", ("a.bin", image)), *([("mask", ("b", mask))] if mask is not None else [])]
    return parse_edit(*form(files, **texts), LIVE)


def edited(image: bytes, mask: bytes | None = None, **texts: str) -> GenerationRequest:
    return read(image, mask, **texts)[0]


def refused(files: Files, **texts: str) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_edit(*form(files, **texts), LIVE)
    return caught.value


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def as_json(**fields: object) -> GenerationRequest:
    body = json.dumps({"prompt": "x", **fields}).encode()
    return parse_edit(body, "application/json", LIVE)[0]


def saved(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def colours(data: bytes) -> Any:
    picture = Picture(data, "image", MOST)
    return picture.colours(picture.size)


@pytest.mark.parametrize("name", CASES)
def test_every_file_is_read_as_its_case_says(name: str) -> None:
    case = CASES[name]
    image, mask = file(name), None
    if case["sent_as"] == "mask":
        image, mask = file(case["with"]), file(name)
    if case["status"] != 200:
        with pytest.raises(InvalidRequest) as caught:
            edited(image, mask)
        assert caught.value.code == "invalid_value"
        assert caught.value.param == case["sent_as"]
        return
    parsed, pixels = read(image, mask)
    assert pixels.image.shape == (*reversed(case["size"]), 3)
    assert [parsed.images[0].width, parsed.images[0].height] == case["size"]
    for x, y, colour, tolerance in case.get("pixels", []):
        assert np.abs(pixels.image[y, x].astype(int) - colour).max() <= tolerance
    if mask:
        repainted = pixels.repainted
        assert repainted is not None
        cells = repainted.reshape(8, 8, 12, 8).any(axis=(1, 3))
        assert cells.sum() == case["latent_cells"]


def test_the_defaults_of_strength_depend_on_the_mask() -> None:
    assert [edited(PLAIN, mask).images[0].edit.strength for mask in (None, MASK)] == [0.6, 1.0]  # type: ignore[union-attr]  # they are edits
    (image,) = edited(PLAIN, strength="0.25", num_inference_steps="8").images
    assert (image.edit and image.edit.strength, image.steps) == (0.25, 2)


def test_form_and_json_say_the_same() -> None:
    by_form = edited(
        PLAIN, MASK, seed="7", n="2", guidance_scale="1.5", deterministic="true", model="landscapes"
    )
    by_json = as_json(
        images=[{"image_url": data_url(PLAIN)}],
        mask={"image_url": data_url(MASK)},
        seed=7,
        n=2,
        guidance_scale=1.5,
        deterministic=True,
        model="landscapes",
    )
    assert by_form.images == by_json.images
    assert [image.seed for image in by_form.images] == [7, 8]


def test_other_bytes_with_equal_pixels_are_the_same_request() -> None:
    again = saved(Image.open(io.BytesIO(PLAIN)), compress_level=9)
    assert again != PLAIN
    assert edited(again, seed="1").images == edited(PLAIN, seed="1").images
    other = Image.open(io.BytesIO(PLAIN)).convert("RGB")
    other.putpixel((0, 0), (1, 2, 3))
    assert edited(saved(other), seed="1").images != edited(PLAIN, seed="1").images


@pytest.mark.parametrize("name", ["image", "image[]", "image[0]"])
@pytest.mark.parametrize("mask", ["mask", "mask[]", "mask[0]"])
def test_all_spellings_of_files_are_accepted(name: str, mask: str) -> None:
    files = [(mask, ("m", MASK)), (name, ("upload", PLAIN))]
    _, pixels = parse_edit(*form(files, size="auto"), LIVE)
    assert pixels.kept is not None


@pytest.mark.parametrize(
    ("files", "texts", "param", "says"),
    [
        ([], {}, "image", "image is required"),
        ([("image", ("", b""))], {}, "image", "image is required"),  # an empty field of a browser
        ([("image", ("a", PLAIN))] * 2, {}, "image", "image: found 2, but this model takes one"),
        ([("image", ("a", PLAIN)), ("image[]", ("b", PLAIN))], {}, "image", "image: found 2"),
        ([("mask", ("a", MASK))] * 2, {}, "mask", "mask: found 2"),
        ([("image[٣]", ("a", PLAIN))], {}, "image[٣]", "unknown field"),
        ([("photo", ("a", PLAIN))], {}, "photo", "unknown field 'photo'"),
        ([("mask_image", ("a", PLAIN))], {}, "mask_image", "unknown field 'mask_image'"),
        ([("markup", ("a", PLAIN))], {}, "markup", "markup is not supported"),
        ([], {"image": "https://example.com/a.png"}, "image", "image must be sent as a file"),
        ([], {"url": "https://example.com/a.png"}, "url", "unknown field 'url'"),
        ([("image", ("a", PLAIN))], {"n": "many"}, "n", "valid integer"),
        ([("image", ("a", PLAIN))], {"n": "5"}, "n", "between 1 and 4"),
        ([("image", ("a", PLAIN))], {"strength": "0"}, "strength", "greater than 0"),
        ([("image", ("a", PLAIN))], {"strength": "1e-17"}, "strength", "too small"),
        ([("image", ("a", PLAIN))], {"stream": "maybe"}, "stream", "boolean"),
        ([("image", ("a", PLAIN))], {"size": "99999x99999"}, "size", "from 64 to 256 px"),
        ([("image", ("a", PLAIN))], {"background": "transparent"}, "background", "opaque"),
        ([("image", ("a", PLAIN))], {"input_fidelity": "high"}, "input_fidelity", "no high"),
        ([("image", ("a", PLAIN))], {"steps": "4"}, "steps", "unknown field 'steps'"),
    ],
)
def test_a_form_that_cannot_be_served_says_why(
    files: Files, texts: dict[str, str], param: str, says: str
) -> None:
    found = refused(files, **texts)
    assert found.param == param
    assert says in found.message


def test_unknown_fields_are_ignored_and_named_if_the_settings_allow_it() -> None:
    live = LIVE.model_copy(update={"ignore_unknown_fields": True})
    files = [("image", ("a", PLAIN)), ("reference_image", ("b", PLAIN))]
    parsed, _ = parse_edit(*form(files, true_cfg_scale="4"), live)
    assert parsed.ignored == ("true_cfg_scale", "reference_image")
    image = {"image_url": data_url(PLAIN), "detail": "high"}
    body = json.dumps({"prompt": "x", "images": [image], "more": 1}).encode()
    assert parse_edit(body, "application/json", live)[0].ignored == ("more", "detail")


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({}, "images", "images is required"),
        ({"images": []}, "images", "images: found 0"),
        ({"images": [{"image_url": data_url(PLAIN)}] * 2}, "images", "this model takes one"),
        ({"images": [{"image_url": data_url(PLAIN), "detail": "high"}]}, "detail", "unknown"),
        (
            {
                "images": [{"image_url": data_url(PLAIN)}],
                "mask": {"image_url": data_url(MASK), "polarity": "white"},
            },
            "polarity",
            "unknown field",
        ),
        ({"images": [{"image_url": "https://example.com/a"}]}, "images", "must be a data: URL"),
        ({"images": [{"image_url": "file:///etc/passwd"}]}, "images", "must be a data: URL"),
        ({"images": [{"image_url": "data:image/png,abc"}]}, "images", "must be a data: URL"),
        ({"images": [{"image_url": "data:;base64,%%%"}]}, "images", "no valid base64"),
        ({"images": [{"file_id": "file-1"}]}, "images.0.image_url", "is required"),
        ({"images": [{"image_url": data_url(b"abc")}]}, "image", "can be read"),
        ({"images": [{"image_url": data_url(PLAIN)}], "n": "1"}, "n", "valid integer"),
        ({"image": data_url(PLAIN)}, "image", "did you mean 'images'?"),
    ],
)
def test_a_json_body_that_cannot_be_served_says_why(
    fields: dict[str, object], param: str, says: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        as_json(**fields)
    assert caught.value.param == param
    assert says in caught.value.message


def test_other_content_types_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="'text/plain' must be multipart/form-data or"):
        parse_edit(b"{}", "Text/Plain; charset=utf-8", LIVE)


def test_an_unknown_model_and_large_files_have_their_own_errors() -> None:
    with pytest.raises(ModelNotFound):
        edited(PLAIN, model="sd4")
    with pytest.raises(BodyTooLarge, match="everything but image and mask is larger than 1000000"):
        edited(PLAIN, user="x" * 1_000_000)
    with pytest.raises(BodyTooLarge, match="everything but image and mask"):
        as_json(images=[{"image_url": data_url(PLAIN)}], user="x" * 1_000_000)
    small = LIVE.edits.model_copy(update={"max_mask_bytes": len(MASK) - 1})
    with pytest.raises(BodyTooLarge, match="mask is larger than"):
        parse_edit(
            *form([("image", ("a", PLAIN)), ("mask", ("b", MASK))]),
            LIVE.model_copy(update={"edits": small}),
        )


# -- the body of a form ----------------------------------------------------------------------------


def test_a_body_that_was_cut_off_is_refused_wherever_it_ends() -> None:
    body, kind = form([("image", ("a", PLAIN))])
    assert len(list(form_parts(body, kind))) == 2
    for end in range(0, len(body) - 2, 7):  # after the last boundary there may be a new line
        with pytest.raises(InvalidRequest):
            list(form_parts(body[:end], kind))


def test_a_part_is_a_file_if_it_has_a_file_name() -> None:
    def part(disposition: str) -> tuple[str, bool]:
        body = f"--b\r\nContent-Disposition: form-data; {disposition}\r\n\r\nx\r\n--b--\r\n"
        (found,) = form_parts(body.encode(), "multipart/form-data; boundary=b")
        return found.name, found.is_file

    assert part('name="a"') == ("a", False)
    assert part('name="a"; filename="../../etc/passwd"') == ("a", True)
    assert part("name=\"a\"; filename*=UTF-8''%e2%82%ac") == ("a", True)
    assert part('filename="b"; name=a') == ("a", True)


@pytest.mark.parametrize(
    "header",
    [
        "Content-Transfer-Encoding: base64",
        "Content-Transfer-Encoding: quoted-printable",
        "Content-Type: text/plain; charset=iso-8859-1",
        'Content-Disposition: form-data; name="negative_prompt"',
    ],
)
def test_headers_that_change_what_a_part_means_are_refused(header: str) -> None:
    part = f'--b\r\nContent-Disposition: form-data; name="prompt"\r\n{header}\r\n\r\nx\r\n--b--\r\n'
    kind = "multipart/form-data; boundary=b"
    with pytest.raises(InvalidRequest):
        list(form_parts(part.encode(), kind))
    plain = part.replace(header, "Content-Type: text/plain; charset=UTF-8")
    assert len(list(form_parts(plain.encode(), kind))) == 1


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "multipart/form-data"),
        (b"", "multipart/form-data; boundary="),
        (b"", f"multipart/form-data; boundary={'b' * 300}"),
        (b"--c\r\n", "multipart/form-data; boundary=b"),
        (b"--b\r\n\r\nx\r\n--b--\r\n", "multipart/form-data; boundary=b"),  # without a name
        (b"--b\r\n" + b"a: b\r\n" * 50 + b"\r\nx\r\n--b--", "multipart/form-data; boundary=b"),
        (b"--b\r\na: " + b"b" * 10**6 + b"\r\n\r\n--b--", "multipart/form-data; boundary=b"),
        (b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n' * 101 + b"--b--", "b"),
    ],
)
def test_what_is_no_form_is_refused(body: bytes, kind: str) -> None:
    kind = "multipart/form-data; boundary=b" if kind == "b" else kind
    with pytest.raises(InvalidRequest):
        list(form_parts(body, kind))


# -- pictures --------------------------------------------------------------------------------------


def test_every_orientation_is_turned_upright() -> None:
    upright = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
    stored = {  # the same picture as each value of the note would have it stored
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = saved(Image.fromarray(np.ascontiguousarray(pixels)), exif=exif)
        assert np.array_equal(colours(data), upright), orientation


def test_a_mask_is_no_jpeg() -> None:
    """It has no transparency."""
    with pytest.raises(InvalidRequest, match="mask is no PNG or WebP picture"):
        Picture(saved(Image.new("RGB", (8, 8)), "jpeg"), "mask", MOST)


def test_a_broken_orientation_is_ignored() -> None:
    image = Image.new("RGB", (64, 64), "red")
    assert (colours(saved(image, "jpeg", quality=100, exif=b"Exif\0\0broken"))[0, 0] > 200)[0]


def test_grey_with_16_bits_keeps_its_levels() -> None:
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    found = colours(saved(Image.fromarray(levels)))
    assert np.array_equal(found[..., 0], levels >> 8)
    assert np.array_equal(found[..., 0], found[..., 2])


@pytest.mark.parametrize(
    ("depth", "kind", "level", "other", "pixel"),
    [  # a PNG's bits and type of colour, its transparent level, another level, and that as a pixel
        (1, 0, (1,), (0,), 0),
        (2, 0, (1,), (2,), 170),
        (4, 0, (15,), (3,), 51),
        (8, 0, (200,), (100,), 100),
        (16, 0, (1000,), (30000,), 117),
        (8, 2, (200, 0, 0), (100, 100, 100), 100),
        (16, 2, (51200, 7, 7), (25600, 25600, 25600), 100),
    ],
)
def test_the_transparent_level_of_every_depth_is_laid_on_white(
    depth: int, kind: int, level: tuple[int, ...], other: tuple[int, ...], pixel: int
) -> None:
    """Two rows of eight pixels: transparent ones, and others."""

    def row(levels: tuple[int, ...]) -> bytes:
        bits = "".join(f"{value:0{depth}b}" for _ in range(8) for value in levels)
        return b"\0" + int(bits, 2).to_bytes(len(bits) // 8)

    data = a_png(
        8,
        2,
        (b"tRNS", b"".join(struct.pack(">H", value) for value in level)),
        (b"IDAT", zlib.compress(row(level) + row(other))),
        depth=depth,
        kind=kind,
    )
    found = colours(data)
    assert found[0].tolist() == [[255] * 3] * 8
    assert found[1].tolist() == [[pixel] * 3] * 8
    assert Picture(data, "mask", MOST).alpha(Size(8, 2)).tolist() == [[0] * 8, [255] * 8]


def test_cmyk_is_not_inverted() -> None:
    found = colours(saved(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "jpeg", quality=95))
    assert found[0, 0, 0] > 200  # red
    assert found[0, 0, 1] < 60


def test_a_colour_profile_is_applied_and_a_broken_one_ignored() -> None:
    image = Image.new("RGB", (64, 64), (200, 100, 50))
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # The curve of green becomes that of a display with gamma 1.0.
    linear = bytearray(srgb)
    place = linear.index(b"curv") if b"curv" in linear else linear.index(b"para")
    linear[place : place + 12] = b"curv\0\0\0\0\0\0\0\0"
    plain = colours(saved(image))[0, 0].astype(int)
    for profile in (b"nonsense", lab):
        assert np.array_equal(colours(saved(image, icc_profile=profile))[0, 0], plain)
    assert np.abs(colours(saved(image, icc_profile=srgb))[0, 0] - plain).max() <= 1
    assert (colours(saved(image, icc_profile=bytes(linear)))[0, 0] - plain).max() > 20


def test_the_first_picture_of_a_phones_jpeg_is_taken() -> None:
    data = io.BytesIO()
    first, second = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    first.save(data, "mpo", save_all=True, append_images=[second])
    assert colours(data.getvalue())[0, 0].tolist()[0] > 250


def test_a_picture_of_another_shape_is_cropped_and_not_stretched() -> None:
    """A circle stays a circle, in the middle."""
    y, x = np.mgrid[:75, :100]
    circle = ((x - 50) ** 2 + (y - 37) ** 2 < 30**2).astype(np.uint8) * 255
    _, pixels = read(saved(Image.fromarray(circle).convert("RGB")), size="160x160")
    inside = pixels.image[..., 0] > 127
    wide, high = (np.flatnonzero(inside.any(axis=axis)) for axis in (0, 1))
    assert len(wide) == pytest.approx(60 * 160 / 75, abs=2)
    assert len(high) == pytest.approx(len(wide), abs=1)


def test_a_mask_is_cropped_like_its_picture() -> None:
    kept = read(PLAIN, MASK, size="64x64")[1].kept  # the right half of 96 × 64 may change
    assert kept is not None
    assert (kept[:, :32] == 255).all()
    assert (kept[:, 32:] == 0).all()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((100, 75), (100, 75)),
        ((2048, 2048), (2048, 2048)),
        ((4000, 3000), (2048, 1536)),
        ((3000, 4000), (1536, 2048)),
        ((2047, 1025), (2047, 1025)),
        ((2050, 200), (2048, 192)),
        ((2215, 1661), (2048, 1520)),
        ((2049, 2049), (2048, 2048)),
    ],
)
def test_a_picture_that_is_too_large_is_scaled_down(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert fitted(Size(*size), ModelLimits(), "m") == expected


@given(st.integers(64, 9999), st.integers(64, 9999))
def test_a_size_that_is_chosen_is_within_the_limits(width: int, height: int) -> None:
    limits = ModelLimits(max_size_px=1000, max_pixels=600_000)
    try:
        found = fitted(Size(width, height), limits, "m")
    except InvalidRequest:
        assert max(width, height) / min(width, height) > 9
        return
    canvas = [-(-side // 16) * 16 for side in found]
    assert max(canvas) <= limits.max_size_px
    assert canvas[0] * canvas[1] <= limits.max_pixels
    assert width / height == pytest.approx(found.width / found.height, rel=0.26)


# -- damaged pictures ------------------------------------------------------------------------------


def a_png(
    width: int, height: int, *chunks: tuple[bytes, bytes], depth: int = 8, kind: int = 2
) -> bytes:
    """A PNG with a header that may lie, and any chunks."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = b"".join(chunk(*c) for c in ((b"IHDR", header), *chunks, (b"IEND", b"")))
    return b"\x89PNG\r\n\x1a\n" + body


def with_scans(scans: int) -> bytes:
    """A progressive JPEG of 25 million pixels with further scans, each a few bytes long."""
    data = saved(Image.new("L", (5000, 5000)), "jpeg", progressive=True)
    scan = bytes.fromhex("ffda0008 0101 00 3f 3f 10") + b"\x00"  # the lowest bit of one frequency
    return data[:-2] + scan * scans + data[-2:]


@functools.cache
def bombs() -> dict[str, bytes]:
    text = zlib.compress(bytes(80 * 2**20), 9)
    info = PngInfo()
    for i in range(100):
        info.add_text(f"k{i}", "x" * 900_000, zip=True)
    webp = bytearray(saved(Image.new("RGB", (64, 64)), "webp", lossless=True))
    webp[21:25] = ((16382) | (16382 << 14)).to_bytes(4, "little")  # VP8L: 14 bits for each side
    return {
        "header": a_png(2**31 - 1, 2**31 - 1),
        "pixels": a_png(60_000, 60_000, (b"IDAT", zlib.compress(bytes(10**7), 9))),
        "text": a_png(64, 64, (b"zTXt", b"a\0\0" + text)),
        "texts": saved(Image.new("RGB", (64, 64)), pnginfo=info),
        "profile": a_png(64, 64, (b"iCCP", b"a\0\0" + text)),
        "webp": bytes(webp),
        "scans": with_scans(10_000),
        "segments": b"\xff\xd8" + b"\xff\xe5\0\2" * 500_000,
        "chunks": a_png(64, 64, *[(b"prIv", b"")] * 200_000),
        "empty pixels": a_png(64, 64, *[(b"IDAT", b"")] * 200_000),
    }


def test_photos_with_many_scans_and_large_metadata_are_read() -> None:
    image = Image.effect_noise((640, 480), 60).convert("RGB")
    assert colours(saved(image, "jpeg", progressive=True, exif=b"Exif\0\0" + bytes(60_000))).any()
    film = saved(image, "jpeg") + np.random.default_rng(0).bytes(3_000_000)  # after the picture
    assert film.count(b"\xff\xda") > 10
    assert colours(film).any()
    assert colours(PLAIN + bytes(1_000_000)).any()
    assert with_scans(3) != with_scans(0)
    assert not colours(with_scans(50)).any()


def test_a_palette_that_does_not_fit_is_refused() -> None:
    pixels = (b"IDAT", zlib.compress(b"\0\0\0" * 2))
    for chunks in ([(b"PLTE", bytes(6)), (b"tRNS", bytes(300)), pixels], [pixels]):
        with pytest.raises(InvalidRequest, match="can be read"):
            colours(a_png(2, 2, *chunks, kind=3))


@pytest.mark.parametrize("name", bombs())
def test_a_bomb_is_refused_soon_and_takes_no_memory(name: str) -> None:
    usual_s = time.process_time()
    Picture(with_scans(0), "image", MOST)  # as many pixels as there may be
    usual_s = time.process_time() - usual_s
    data, process = bombs()[name], psutil.Process()
    before, peak, done = process.memory_info().rss, [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.process_time()
    try:
        with pytest.raises(InvalidRequest):
            Picture(data, "image", MOST)
    finally:
        used_s = time.process_time() - began
        done.set()
        watcher.join()
    assert used_s < 20 * usual_s  # 60,000 × 60,000 pixels are 144 times as many
    assert peak[0] - before < 150e6


def picture_bytes() -> st.SearchStrategy[bytes]:
    """Pictures that were damaged in some places, cut, or have other beginnings."""
    image = Image.effect_noise((80, 64), 60)
    whole = [
        saved(image.convert("RGB")),
        saved(image.convert("RGBA")),
        saved(image.convert("P")),
        saved(image.convert("RGB"), "jpeg", progressive=True),
        saved(image.convert("CMYK"), "jpeg"),
        saved(image.convert("RGB"), "webp"),
        saved(image.convert("RGBA"), "webp", lossless=True),
        *(file(name) for name in CASES),
    ]
    beginnings = (
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"RIFF\xff\xff\xff\x7fWEBPVP8X",
        b"GIF89a",
    )

    @st.composite
    def damaged(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(st.sampled_from(whole)))
        for _ in range(draw(st.integers(0, 8)) if data else 0):
            place = draw(st.integers(0, min(len(data), 400) - 1))
            data[place] = draw(st.integers(0, 255))
        return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)

    other = st.builds(lambda a, b: a + b, st.sampled_from(beginnings), st.binary(max_size=200))
    return damaged() | other


@settings(
    max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(picture_bytes())
def test_a_damaged_picture_is_read_or_refused(data: bytes) -> None:
    """No other error is raised than those that the API answers with a 400."""
    for param in ("image", "mask"):
        try:
            picture = Picture(data, param, 1_000_000)
            size = Size(48, 32)
            found = picture.colours(size) if param == "image" else picture.alpha(size)
        except InvalidRequest:
            pass
        else:
            assert found.shape[:2] == (32, 48)
            assert found.dtype == np.uint8
