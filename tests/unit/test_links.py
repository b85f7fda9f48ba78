"""Signed links to images, and the key that signs them."""

import stat
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from serve.errors import LinkInvalid
from serve.results.links import Links, read_key, shared_key

NOW = 1_800_000_000
ONE, OTHER = "t/a/2026/11/23/" + "0" * 32 + ".png", "t/b/2026/11/23/" + "1" * 32 + ".png"
LINKS = Links(b"k" * 32)


def check(link: str, now: float = NOW) -> None:
    parts = urlsplit(link)
    query = {k: v[0] for k, v in parse_qs(parts.query).items()}
    name = parts.path.removeprefix("/v1/files/")
    LINKS.check(name, query["expires"], query["signature"], now)


def test_a_link_works_until_it_expires() -> None:
    link = LINKS.link(ONE, NOW + 10)
    check(link)
    check(link, NOW + 10)
    with pytest.raises(LinkInvalid, match="expired"):
        check(link, NOW + 11)


def test_links_cannot_be_changed_or_made() -> None:
    link = LINKS.link(ONE, NOW)
    tampered = [
        link.replace(str(NOW), str(NOW + 99)),
        link.replace(ONE, OTHER),
        link.replace(ONE, "../signing-key"),
        link[:-1] + ("0" if link[-1] != "0" else "1"),
        Links(b"l" * 32).link(ONE, NOW),
    ]
    for bad in tampered:
        with pytest.raises(LinkInvalid, match="signature"):
            check(bad)


@pytest.mark.parametrize("signature", ["", "é", "\udc80", "0" * 64])
def test_any_text_is_a_wrong_signature(signature: str) -> None:
    with pytest.raises(LinkInvalid):
        LINKS.check(ONE, "\udc80", signature, NOW)


def test_a_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    file = tmp_path / "signing-key"
    assert shared_key(file) == shared_key(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["signing-key"]


def test_a_given_key_is_read_from_a_read_only_folder(tmp_path: Path) -> None:
    file = tmp_path / "mounted" / "key"
    file.parent.mkdir()
    file.write_bytes(b"s" * 40)
    file.parent.chmod(0o500)
    assert read_key(file) == b"s" * 40
    file.parent.chmod(0o700)
    file.write_bytes(b"short")
    with pytest.raises(ValueError, match="at least 32"):
        read_key(file)
