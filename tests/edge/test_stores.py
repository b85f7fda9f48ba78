"""Stores of images: a folder, a bucket and a bucket behind a spool give the same guarantees."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import boto3
import httpx
import pytest

from serve.errors import NotFound, StoreFailed
from serve.results.disk import DiskStore
from serve.results.s3 import ATTEMPTS, CONNECT_S, READ_S, S3Store
from serve.results.spool import Spool
from serve.results.store import NAME, ResultStore, new_name
from serve.settings.application import S3Settings

from ..ports import free_port
from ..s3 import ENDPOINT, Fault, FaultProxy, a_bucket, s3_server
from ..wait import wait_for

NOW = time.time()
DAY_S = 86400.0


@pytest.fixture(scope="module", autouse=True)
def _credentials() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    if not ENDPOINT:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def server(_credentials: None) -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture(params=["disk", "s3", "spooled"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ResultStore]:
    if request.param == "disk":
        yield DiskStore(tmp_path)
        return
    bucket = S3Store(a_bucket(request.getfixturevalue("server")))
    if request.param == "s3":
        yield bucket
        return
    spool = Spool(bucket, tmp_path / "spool", 10**6)
    yield spool
    spool.close()


def read(store: ResultStore, name: str) -> bytes:
    found = store.get(name)
    return found if isinstance(found, bytes) else httpx.get(found).raise_for_status().content


def past_the_proxy(proxy: FaultProxy, bucket: S3Settings) -> S3Settings:
    """The settings of the same bucket without the proxy."""
    return bucket.model_copy(update={"endpoint_url": proxy.upstream})


def keys(bucket: S3Settings) -> list[str]:
    client = boto3.client("s3", endpoint_url=bucket.endpoint_url, region_name=bucket.region)
    return [o["Key"] for o in client.list_objects_v2(Bucket=bucket.bucket).get("Contents", ())]


def test_names_hold_tenant_and_date_and_cannot_be_guessed() -> None:
    names = {new_name("a-b", "webp", 1_800_000_000) for _ in range(50)}
    assert len(names) == 50
    assert all(NAME.fullmatch(name) for name in names)
    assert next(iter(names)).startswith("t/a-b/2027/01/15/")


def test_a_stored_image_is_read_and_storing_it_again_changes_nothing(store: ResultStore) -> None:
    one, other = new_name("t", "png", NOW), new_name("t", "png", NOW)
    for _ in range(2):
        store.put(one, b"picture", "r1")
    assert read(store, one) == b"picture"
    for name in (other, "../signing-key", "t/t/2026/11/23/x.png"):
        with pytest.raises(NotFound):
            store.get(name)


def test_a_tenants_images_are_erased_and_no_others(store: ResultStore) -> None:
    mine = [new_name("mine", "png", NOW - days * DAY_S) for days in range(3)]
    other = new_name("mine-too", "png", NOW)
    for name in (*mine, other):
        store.put(name, b"x", "r")
    assert store.erase("mine") == 3
    assert store.erase("mine") == 0
    for name in mine:
        with pytest.raises(NotFound):
            store.get(name)
    assert read(store, other) == b"x"


@pytest.mark.parametrize("tenant", ["", "../..", "/etc", "Acme", "a/b"])
def test_only_a_tenant_can_be_erased(store: ResultStore, tenant: str) -> None:
    name = new_name("other", "png", NOW)
    store.put(name, b"x", "r")
    with pytest.raises(ValueError, match="no tenant's id"):
        store.erase(tenant)
    assert read(store, name) == b"x"


def test_old_images_are_deleted(store: ResultStore, tmp_path: Path) -> None:
    old, new = new_name("t", "png", NOW - 9 * DAY_S), new_name("t", "png", NOW)
    for name, age_s in ((old, 9 * DAY_S), (new, 0.0)):
        store.put(name, b"x", "r")
        if (file := tmp_path / "images" / name).exists():
            os.utime(file, (NOW - age_s, NOW - age_s))
    store.sweep(NOW, max_age_s=7 * DAY_S, max_bytes=10**6, max_job_age_s=DAY_S)
    assert read(store, new) == b"x"
    with pytest.raises(NotFound):
        store.get(old)


# -- a folder -------------------------------------------------------------------------------------


def test_in_a_folder_the_oldest_go_beyond_a_number_of_bytes(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    names = [new_name("t", "png", NOW) for _ in range(4)]
    for age, name in enumerate(names):
        store.put(name, b"x" * 10, "r")
        os.utime(tmp_path / "images" / name, (NOW - age, NOW - age))
    (tmp_path / "images" / "lost+found").mkdir()
    store.sweep(NOW, max_age_s=100, max_bytes=20, max_job_age_s=DAY_S)
    assert [(tmp_path / "images" / name).exists() for name in names] == [True, True, False, False]


def test_a_folder_that_is_gone_is_a_store_error(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    (tmp_path / "images").rmdir()
    with pytest.raises(StoreFailed):
        store.put(new_name("t", "png", NOW), b"x", "r")
    with pytest.raises(OSError, match="images"):
        store.sweep(NOW, max_age_s=1, max_bytes=1, max_job_age_s=DAY_S)


def test_when_all_images_of_an_older_layout_have_gone_their_folder_stays(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    (tmp_path / "images" / "abc.png").write_bytes(b"x")
    store.sweep(time.time() + 10, max_age_s=1, max_bytes=10, max_job_age_s=DAY_S)
    assert not list((tmp_path / "images").iterdir())
    store.put(new_name("t", "png", NOW), b"x", "r")


# -- a bucket -------------------------------------------------------------------------------------


def test_an_object_has_its_type_metadata_and_storage_options(server: str) -> None:
    bucket = a_bucket(server, server_side_encryption="AES256", storage_class="STANDARD_IA")
    name = new_name("t", "webp", NOW)
    S3Store(bucket).put(name, b"picture", "request-7")
    client = boto3.client("s3", endpoint_url=server, region_name="us-east-1")
    head = client.head_object(Bucket=bucket.bucket, Key=name)
    assert head["ContentType"] == "image/webp"
    assert head["Metadata"]["request-id"] == "request-7"
    assert len(head["Metadata"]["sha256"]) == 64
    assert (head["ServerSideEncryption"], head["StorageClass"]) == ("AES256", "STANDARD_IA")


def test_a_link_into_the_bucket_is_short_lived(server: str) -> None:
    store = S3Store(a_bucket(server, presigned_s=77))
    name = new_name("t", "png", NOW)
    store.put(name, b"x", "r")
    assert httpx.URL(store.get(name)).params["X-Amz-Expires"] == "77"


def test_a_day_is_deleted_when_all_of_it_is_too_old_and_a_failed_sweep_is_repeated(
    proxied: tuple[FaultProxy, S3Settings],
) -> None:
    proxy, bucket = proxied
    store, noon = S3Store(bucket, read_s=0.5), 1_800_014_400.0  # 2027-01-15
    days = [new_name("t", "png", noon - days * DAY_S) for days in range(4)]
    for name in days:
        store.put(name, b"x", "r")
    proxy.fault = "refuse"
    with pytest.raises(StoreFailed):
        store.sweep(noon, max_age_s=DAY_S, max_bytes=1, max_job_age_s=DAY_S)
    proxy.fault = "none"
    store.sweep(noon + 10, max_age_s=DAY_S, max_bytes=1, max_job_age_s=DAY_S)
    assert sorted(keys(bucket)) == sorted(days[:2])


def test_a_dead_endpoint_is_given_up_in_seconds(server: str) -> None:
    bucket = a_bucket(server).model_copy(update={"endpoint_url": "http://127.0.0.1:9"})
    began = time.monotonic()
    with pytest.raises(StoreFailed):
        S3Store(bucket).put(new_name("t", "png", NOW), b"x", "r")
    # With its defaults boto3 would try for minutes.
    assert time.monotonic() - began < 3 * ATTEMPTS * (CONNECT_S + READ_S)


# -- the spool ------------------------------------------------------------------------------------


def test_a_disk_that_is_nearly_full_takes_no_images(tmp_path: Path) -> None:
    full = [True]
    store = DiskStore(tmp_path, lambda _: full[0])
    name = new_name("t", "png", NOW)
    assert store.full
    assert store.fault
    assert (store.fault.place, store.fault.cause) == (f"folder {tmp_path}/images", "ENOSPC")
    with pytest.raises(StoreFailed, match="disk that keeps images is full"):
        store.put(name, b"picture", "r")
    full[0] = False
    store.sweep(NOW, max_age_s=1, max_bytes=1, max_job_age_s=DAY_S)
    assert not store.full
    assert store.fault is None
    store.put(name, b"picture", "r")
    assert store.get(name) == b"picture"
    full[0] = True
    store.sweep(NOW, max_age_s=DAY_S, max_bytes=10**6, max_job_age_s=DAY_S)
    assert store.fault


def test_a_folder_that_cannot_be_written_to_has_a_fault_until_it_can(tmp_path: Path) -> None:
    store, images = DiskStore(tmp_path), tmp_path / "images"
    (images / "t").write_text("a file where the folder of tenants should be")
    name = new_name("t", "png", NOW)
    with pytest.raises(StoreFailed, match="could not be stored"):
        store.put(name, b"picture", "r")
    assert store.fault
    assert store.fault.cause == "ENOTDIR"
    (images / "t").unlink()
    store.sweep(NOW, max_age_s=DAY_S, max_bytes=10**6, max_job_age_s=DAY_S)
    assert store.fault is None
    assert not list(images.iterdir())  # what the sweep has tried is gone


def test_beside_a_disk_that_is_nearly_full_images_go_to_the_bucket_at_once(
    server: str, tmp_path: Path
) -> None:
    bucket = a_bucket(server)
    spool = Spool(S3Store(bucket), tmp_path, 10**6, is_nearly_full=lambda _: True)
    name = new_name("t", "png", NOW)
    spool.put(name, b"picture", "r")
    assert not list(tmp_path.iterdir())
    assert keys(bucket) == [name]
    spool.close()


def test_a_probe_writes_reads_and_deletes(server: str) -> None:
    bucket = a_bucket(server)
    store = S3Store(bucket)
    store.probe()
    assert not keys(bucket)
    store.close()


def test_a_bucket_that_cannot_be_used_says_why(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = a_bucket(server)

    def fault(settings: S3Settings) -> str:
        store = S3Store(settings, read_s=0.5)
        with pytest.raises(StoreFailed) as caught:
            store.probe()
        store.close()
        return caught.value.message

    gone = bucket.model_copy(update={"bucket": "gone"})
    assert fault(gone).startswith("bucket gone: cannot write: ")
    assert "NoSuchBucket" in fault(gone)
    nowhere = bucket.model_copy(update={"endpoint_url": f"http://127.0.0.1:{free_port()}"})
    assert "Could not connect to the endpoint URL" in fault(nowhere)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps the credentials
    assert "Unable to locate credentials" in fault(bucket)


@pytest.fixture
def proxied(server: str) -> Iterator[tuple[FaultProxy, S3Settings]]:
    proxy = FaultProxy(server)
    bucket = a_bucket(server)
    yield proxy, bucket.model_copy(update={"endpoint_url": proxy.url})
    proxy.close()


@pytest.mark.parametrize("fault", ["refuse", "error", "slow"])
def test_while_the_bucket_is_away_images_wait_in_the_spool_and_are_read_from_it(
    proxied: tuple[FaultProxy, S3Settings], tmp_path: Path, fault: Fault
) -> None:
    proxy, bucket = proxied
    spool = Spool(S3Store(bucket, read_s=0.5), tmp_path, 10**6)
    proxy.fault = fault
    names = [new_name("t", "png", NOW) for _ in range(3)]
    for name in names:  # none of them raises: clients are served
        spool.put(name, name.encode(), "r")
    assert [spool.get(name) for name in names] == [name.encode() for name in names]
    assert not keys(past_the_proxy(proxy, bucket))
    proxy.fault = "none"
    wait_for(lambda: not list(tmp_path.iterdir()))
    assert sorted(keys(bucket)) == sorted(names)
    assert [read(spool, name) for name in names] == [name.encode() for name in names]
    spool.close()


def test_an_answer_that_was_lost_leaves_one_object(
    proxied: tuple[FaultProxy, S3Settings], tmp_path: Path
) -> None:
    proxy, bucket = proxied
    spool = Spool(S3Store(bucket, read_s=0.5), tmp_path, 10**6)
    proxy.fault = "lose_answers"
    name = new_name("t", "png", NOW)
    spool.put(name, b"picture", "r")
    assert spool.get(name) == b"picture"
    # The object is stored, but the answer was lost.
    wait_for(lambda: keys(past_the_proxy(proxy, bucket)) == [name])
    proxy.fault = "none"
    wait_for(lambda: not list(tmp_path.iterdir()))
    assert keys(bucket) == [name]
    assert read(spool, name) == b"picture"
    spool.close()


def test_images_left_by_a_process_are_uploaded_by_its_successor(
    proxied: tuple[FaultProxy, S3Settings], tmp_path: Path
) -> None:
    _, bucket = proxied
    nowhere = bucket.model_copy(update={"endpoint_url": "http://127.0.0.1:9"})
    first = Spool(S3Store(nowhere), tmp_path, 10**6)
    name = new_name("t", "png", NOW)
    first.put(name, b"picture", "r")
    first.close()
    watching = Spool(S3Store(bucket, read_s=0.5), tmp_path, 10**6, drain=False)
    time.sleep(1.5)
    assert watching.get(name) == b"picture"
    second = Spool(S3Store(bucket, read_s=0.5), tmp_path, 10**6)
    wait_for(lambda: not list(tmp_path.iterdir()))
    assert keys(bucket) == [name]
    watching.close()
    second.close()


def test_two_processes_on_one_spool_lose_nothing(
    proxied: tuple[FaultProxy, S3Settings], tmp_path: Path
) -> None:
    proxy, bucket = proxied
    proxy.fault = "refuse"
    spools = [Spool(S3Store(bucket, read_s=0.5), tmp_path, 10**6) for _ in range(2)]
    names = [new_name("t", "png", NOW) for _ in range(6)]
    for i, name in enumerate(names):
        spools[i % 2].put(name, b"x", "r")
    assert [spools[0].get(name) for name in names] == [b"x"] * 6
    proxy.fault = "none"
    wait_for(lambda: not list(tmp_path.iterdir()))
    assert sorted(keys(bucket)) == sorted(names)
    for spool in spools:
        spool.close()


def test_an_unreadable_file_blocks_no_other(
    proxied: tuple[FaultProxy, S3Settings], tmp_path: Path
) -> None:
    _, bucket = proxied
    for content in (b"", b"no json\nx"):
        bad = tmp_path / quote(new_name("t", "png", NOW), safe="")
        bad.write_bytes(content)
        os.utime(bad, (NOW - 100, NOW - 100))
    spool = Spool(S3Store(bucket, read_s=0.5), tmp_path, 10**6)
    name = new_name("t", "png", NOW)
    spool.put(name, b"x", "r")
    wait_for(lambda: all(file.name.startswith("bad-") for file in tmp_path.iterdir()))
    assert keys(bucket) == [name]
    assert len(list(tmp_path.iterdir())) == 2
    spool.check()
    wait_for(lambda: spool.bytes == 0)
    spool.close()


def test_a_spool_beyond_its_bound_is_full_until_it_drains(
    proxied: tuple[FaultProxy, S3Settings], tmp_path: Path
) -> None:
    proxy, bucket = proxied
    proxy.fault = "refuse"
    spool = Spool(S3Store(bucket, read_s=0.5), tmp_path, 1000)
    spool.put(new_name("t", "png", NOW), b"x" * 600, "r")
    assert not spool.full
    spool.put(new_name("t", "png", NOW), b"x" * 600, "r")
    assert spool.full
    proxy.fault = "none"
    wait_for(lambda: not spool.full)
    spool.close()


def test_without_a_disk_an_image_goes_straight_to_the_bucket(
    proxied: tuple[FaultProxy, S3Settings], tmp_path: Path
) -> None:
    proxy, bucket = proxied
    spool = Spool(S3Store(bucket, read_s=0.5), tmp_path / "spool", 10**6)
    (tmp_path / "spool").rmdir()
    name = new_name("t", "png", NOW)
    spool.put(name, b"x", "r")
    assert keys(bucket) == [name]
    proxy.fault = "refuse"
    with pytest.raises(StoreFailed):
        spool.put(new_name("t", "png", NOW), b"x", "r")
    spool.close()
