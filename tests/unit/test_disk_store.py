import os
import stat
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from serve.errors import LinkInvalid, NotFound, StoreFailed
from serve.results.disk import DiskStore

NOW = 1_800_000_000


def follow(store: DiskStore, link: str, now: float = NOW) -> bytes:
    parts = urlsplit(link)
    query = {k: v[0] for k, v in parse_qs(parts.query).items()}
    name = parts.path.removeprefix("/v1/files/")
    return store.read(name, query["expires"], query["signature"], now)


def test_what_is_kept_is_read_through_its_link_until_it_expires(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    link = store.link(store.put(b"picture", "png"), NOW + 10)
    assert follow(store, link) == b"picture"
    assert follow(store, link, NOW + 10) == b"picture"
    with pytest.raises(LinkInvalid, match="expired"):
        follow(store, link, NOW + 11)


def test_links_cannot_be_changed_or_made(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "one")
    one, other = (store.put(b"x", "png") for _ in range(2))
    link = store.link(one, NOW)
    tampered = [
        link.replace(str(NOW), str(NOW + 99)),
        link.replace(one, other),
        link.replace(one, "../signing-key"),
        link[:-1] + ("0" if link[-1] != "0" else "1"),
        DiskStore(tmp_path / "two").link(one, NOW),
    ]
    for bad in tampered:
        with pytest.raises(LinkInvalid, match="signature"):
            follow(store, bad)


@pytest.mark.parametrize("signature", ["", "é", "\udc80", "0" * 64])
def test_any_text_is_a_wrong_signature(tmp_path: Path, signature: str) -> None:
    store = DiskStore(tmp_path)
    with pytest.raises(LinkInvalid):
        store.read(store.put(b"x", "png"), "\udc80", signature, NOW)


def test_even_a_signed_name_leads_nowhere_else(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    for name in ("../signing-key", "x" * 32 + ".png"):
        with pytest.raises(NotFound):
            follow(store, store.link(name, NOW))


def test_two_stores_on_one_folder_share_it(tmp_path: Path) -> None:
    one, two = DiskStore(tmp_path), DiskStore(tmp_path)
    assert follow(two, one.link(one.put(b"x", "webp"), NOW)) == b"x"
    assert stat.S_IMODE((tmp_path / "signing-key").stat().st_mode) == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "signing-key"]


def test_names_are_not_guessed(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    assert len({store.put(b"", "png")[:8] for _ in range(50)}) == 50


def test_old_images_go_first_by_age_then_by_size(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    names = [store.put(b"x" * 10, "png") for _ in range(4)]
    for age, name in enumerate(names):
        os.utime(tmp_path / "images" / name, (NOW - age, NOW - age))

    def left() -> list[str]:
        return [name for name in names if (tmp_path / "images" / name).exists()]

    (tmp_path / "images" / "lost+found").mkdir()
    store.sweep(NOW, max_age_s=100, max_bytes=1000)
    assert left() == names
    store.sweep(NOW, max_age_s=2.5, max_bytes=1000)
    assert left() == names[:3]
    store.sweep(NOW, max_age_s=100, max_bytes=20)
    assert left() == names[:2]
    with pytest.raises(NotFound):
        follow(store, store.link(names[3], NOW))


def test_a_folder_that_is_gone_is_a_store_error(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    (tmp_path / "images").rmdir()
    with pytest.raises(StoreFailed):
        store.put(b"x", "png")
