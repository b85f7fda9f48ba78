"""The settings of the application, checked once and then frozen; `serve.settings.file` reads them.

The settings file holds four kinds of keys, in one list for the reader's sake. Their class tells
them apart:

- `CatalogueSettings` are the models, pools and text encoders. Each pool and each set of text
  encoders is a Ray Serve application of its own, so a change restarts only its own replicas.
- `FrontSettings` are for Ingresses and the Dispatcher. A change restarts these.
- `LiveSettings` reach running replicas. A change restarts nothing.
- `HttpSettings` are for the process that starts the replicas.

Ingresses and the Dispatcher get all settings as their `user_config`, which Ray Serve hands to
running replicas. So they learn of a new model without a restart.
"""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    IPvAnyNetwork,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from autoscaling.load import PolicyTuning

from .models import Encoder, Frozen, Model, Resources, Share

_TUNING = PolicyTuning()


class S3Settings(Frozen):
    """A bucket for images, in Amazon S3 or anything that speaks its protocol.

    boto3 finds the credentials: in the environment, its files, or the node's or pod's role.
    """

    bucket: Annotated[str, Field(min_length=3)] = Field(description="Name of the bucket.")
    endpoint_url: Annotated[str, Field(pattern=r"^https?://[^\s/?#]+(/\S*)?$")] | None = Field(
        default=None,
        description="URL of an S3-compatible service, such as http://minio:9000; null: Amazon S3.",
    )
    region: str | None = Field(
        default=None, description="Region of the bucket; null: the region that boto3 finds."
    )
    server_side_encryption: Literal["AES256", "aws:kms"] | None = Field(
        default=None,
        description="How the service encrypts images; null: as the bucket is configured.",
    )
    kms_key_id: str | None = Field(
        default=None,
        description="Id of the key for `server_side_encryption: aws:kms`; null: the key that AWS "
        "manages.",
    )
    storage_class: str | None = Field(
        default=None,
        description="S3 storage class of images, such as STANDARD_IA; null: the bucket's default.",
    )
    presigned_s: Annotated[int, Field(gt=0, le=7 * 86400)] = Field(
        default=900,
        description="Seconds for which a link into the bucket works; each reader of an image's "
        "URL is redirected to a new such link.",
    )
    spool_bytes: PositiveInt = Field(
        default=2**30,
        description="Bytes of images that may wait on each node for their upload; beyond them "
        "`response_format: url` is refused.",
    )

    @model_validator(mode="after")
    def _keys_are_for_kms(self) -> S3Settings:
        if self.kms_key_id and self.server_side_encryption != "aws:kms":
            raise ValueError(
                f"kms_key_id is set, but server_side_encryption is {self.server_side_encryption}: "
                "it must be aws:kms"
            )
        return self


class CacheSettings(Frozen):
    """The result cache: images of requests with a seed, so that a repeated request costs no work.

    Without `redis_url` each Ingress keeps images in its own memory. With `redis_url` all Ingresses
    share one index in Redis, and read the images from the store that keeps images for URLs.
    `redis_url` cannot hold a password, because Ray shows the settings of its applications.
    """

    memory_bytes: PositiveInt = Field(
        default=128 * 2**20,
        description="Bytes of images that each Ingress keeps in its memory; unused with "
        "`redis_url`.",
    )
    redis_url: Annotated[str, Field(pattern=r"^rediss?://[^@/?#]+(/\d+)?$")] | None = Field(
        default=None,
        description="Redis that all Ingresses share, as redis://HOST:PORT/DATABASE or rediss://… "
        "with TLS; null: each Ingress has its own cache in memory.",
    )
    redis_password_file: str | None = Field(
        default=None, description="File with the password of Redis; null: no password."
    )

    @model_validator(mode="after")
    def _passwords_are_for_redis(self) -> CacheSettings:
        if self.redis_password_file and not self.redis_url:
            raise ValueError("redis_password_file is set, but redis_url is not: set both or none")
        return self


class StoreSettings(Frozen):
    """The database of tenants, keys and usage records, which several clusters may share.

    `url` cannot hold a password, because Ray shows the settings of its applications.
    """

    url: (
        Annotated[
            str, Field(pattern=r"^(sqlite:////[^?#]+|postgresql://([^@/?#:]+@)?[^@/?#]+/[^/?#]+)$")
        ]
        | None
    ) = Field(
        default=None,
        description="postgresql://USER@HOST:PORT/NAME, or sqlite:////ABSOLUTE/FILE, which only the "
        "processes of one node may use; null: the SQLite file `octet.db` in `data_folder`.",
    )
    password_file: str | None = Field(
        default=None, description="File with the password of PostgreSQL; null: no password."
    )
    answer_s: PositiveFloat = Field(
        default=5.0,
        description="Seconds after which a transaction is given up. Images whose charge is not "
        "written by then are not delivered.",
    )

    @model_validator(mode="after")
    def _passwords_are_for_postgresql(self) -> StoreSettings:
        if self.password_file and not (self.url or "").startswith("postgresql:"):
            raise ValueError("password_file is set, but url names no PostgreSQL")
        return self


def sqlite_url(folder: Path) -> str:
    """The URL of the SQLite database in a data folder."""
    return f"sqlite:///{folder.expanduser().absolute() / 'octet.db'}"


class CatalogueSettings(Frozen):
    """The models with their pools, the text encoders, and what their replicas need of a node."""

    models: Annotated[tuple[Model, ...], Field(min_length=1)] = Field(
        description="Models to serve; the first is the default of requests that name none."
    )
    text_encoders: Annotated[tuple[Encoder, ...], Field(min_length=1)] = Field(
        description="Sets of text encoders, which models name by their `id`."
    )
    emulate_fp8: bool = Field(
        default=False,
        description="Whether an FP8 pool may run without FP8 tensor cores, with emulated "
        "arithmetic; meant for demos on a CPU.",
    )
    models_folder: str | None = Field(
        default=None,
        description="Folder on each node for weights that are pulled from the hub; null: "
        "~/.cache/octet/models.",
    )
    local_models_folder: str | None = Field(
        default=None,
        description="Folder on a disk of each node, to which weights are copied before they are "
        "loaded, so that each is read once from a volume that nodes share; null: no copies.",
    )
    compiled_folder: str | None = Field(
        default=None,
        description="Folder on each node for compiled code, so that later starts find it; null: "
        "~/.cache/octet/compiled.",
    )
    mps_folder: str | None = Field(
        default=None,
        description="Folder on each node for the pipes of NVIDIA's MPS, by which replicas that "
        "share a card run on it at the same time; null: they take turns. With MPS a fault of one "
        "replica can end its neighbours.",
    )

    @model_validator(mode="after")
    def _names_fit(self) -> CatalogueSettings:
        for kind, names in (
            ("model", [m.id for m in self.models]),
            ("text encoder", [e.id for e in self.text_encoders]),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"{kind} '{min(twice)}' is defined twice")
        encoders = {encoder.id for encoder in self.text_encoders}
        for model in self.models:
            if model.text_encoder not in encoders:
                raise ValueError(
                    f"model '{model.id}': text_encoder '{model.text_encoder}' is none of "
                    f"{sorted(encoders)}"
                )
        return self

    @model_validator(mode="after")
    def _fp8_has_hardware(self) -> CatalogueSettings:
        for model in self.models:
            for pool in model.pools:
                if pool.precision == "fp8" and not pool.num_gpus and not self.emulate_fp8:
                    raise ValueError(
                        f"model '{model.id}': its fp8 pool takes no GPU, and a CPU has no FP8 "
                        "tensor cores: set num_gpus, or emulate_fp8 for a demo"
                    )
        return self


class JobRunnerSettings(Frozen):
    """Number and CPU of the processes that run jobs and batches and send webhooks."""

    replicas: PositiveInt = Field(
        default=1, description="Number of processes; more than one needs PostgreSQL."
    )
    num_cpus: Share = Field(
        default=0.1, description="CPU cores that Ray reserves for one of them; may be a fraction."
    )


class FrontSettings(Frozen):
    """The settings of Ingresses and the Dispatcher; a change of any of them restarts these.

    An exception is the number of Ingresses, which changes without a restart.
    """

    ingress: Resources = Field(
        default=Resources(num_cpus=0.5),
        description="Resources and number of the Ingress replicas, which answer HTTP requests.",
    )
    dispatcher_num_cpus: Share = Field(
        default=0.5, description="CPU cores that Ray reserves for the Dispatcher."
    )
    job_runner: JobRunnerSettings = Field(
        default=JobRunnerSettings(),
        description="Number and CPU of the processes that run jobs and batches and send webhooks.",
    )
    data_folder: str | None = Field(
        default=None,
        description="Folder for the database (unless `store` names another), and for images that "
        "are answered as URLs (with `s3`: those that wait for their upload); null: images are "
        "never answered as URLs, and without a `store` usage is counted in memory only.",
    )
    store: StoreSettings = Field(
        default=StoreSettings(),
        description="Database of tenants, their keys, and usage records.",
    )
    s3: S3Settings | None = Field(
        default=None,
        description="Bucket for images that are answered as URLs; null: they are kept in "
        "`data_folder`.",
    )
    signing_key_file: str | None = Field(
        default=None,
        description="File with the key, at least 32 bytes, that signs links to images; null: a "
        "key that is made in `data_folder`.",
    )
    cache: CacheSettings | None = Field(
        default=CacheSettings(),
        description="Result cache for repeated requests with a seed; null: no result cache.",
    )
    auth: Literal["keys", "none", "none-on-any-address"] = Field(
        default="keys",
        description="Who may call: `keys` are tenants with an API key, `none` is anybody on this "
        "machine, `none-on-any-address` is anybody; without keys all callers are one tenant.",
    )
    tenants_folder: str | None = Field(
        default=None,
        description="Folder with `tenants.yaml` and `keys.json`, which are applied to the database "
        "at the start and whenever they change; null: tenants and keys are changed by the admin "
        "API and `octet tenant` alone.",
    )
    autoscaling_policy: Literal["queued-work", "ray-default"] = Field(
        default="queued-work",
        description="What decides on the number of replicas: `queued-work` is Octet's policy, "
        "`ray-default` is Ray Serve's own on the same requests.",
    )

    @property
    def database(self) -> dict[str, Any] | None:
        """The arguments of the `Database`; None if nothing is kept."""
        url = self.store.url or (self.data_folder and sqlite_url(Path(self.data_folder)))
        return self.store.model_dump() | {"url": url} if url else None

    @property
    def runs_jobs(self) -> bool:
        """Return whether jobs can be kept: in a database, and their images in a store."""
        return bool(self.database and self.data_folder)

    @property
    def database_is_of_one_node(self) -> bool:
        """Return whether there is a database that only the processes of one node may use."""
        return bool(self.database and self.database["url"].startswith("sqlite:"))

    @model_validator(mode="after")
    def _an_ingress_runs(self) -> FrontSettings:
        if not self.ingress.least:
            raise ValueError(
                "ingress: min_replicas must be at least 1, because an Ingress receives the requests"
            )
        return self

    @model_validator(mode="after")
    def _one_process_runs_jobs_with_sqlite(self) -> FrontSettings:
        if self.job_runner.replicas > 1 and self.database_is_of_one_node:
            raise ValueError(
                f"job_runner: replicas {self.job_runner.replicas} must be 1 with SQLite; several "
                "need PostgreSQL, which store: url names"
            )
        return self

    @model_validator(mode="after")
    def _usage_is_kept(self) -> FrontSettings:
        if self.auth == "keys" and self.database is None:
            raise ValueError(
                "auth keys: set data_folder, or the url of store, where tenants and usage are kept "
                "(or set auth: none on a laptop)"
            )
        return self

    @model_validator(mode="after")
    def _images_can_wait(self) -> FrontSettings:
        if self.s3 and self.data_folder is None:
            raise ValueError(
                "s3: set data_folder, where images wait while the bucket cannot be reached"
            )
        return self

    @model_validator(mode="after")
    def _repeated_images_are_kept(self) -> FrontSettings:
        if self.cache and self.cache.redis_url and self.data_folder is None:
            raise ValueError(
                "cache: redis_url needs a store for the images: set data_folder, and s3 too if "
                "Ingresses run on several nodes"
            )
        return self


class ResultSettings(Frozen):
    """How long images that are answered as URLs are kept, and how long their links work."""

    link_expires_s: PositiveInt = Field(
        default=3600, description="Seconds for which a link to an image works."
    )
    max_age_s: PositiveInt = Field(
        default=24 * 3600,
        description="Seconds for which an image is kept; a bucket deletes whole days, so an image "
        "may stay a day longer there.",
    )
    max_bytes: PositiveInt = Field(
        default=10 * 2**30,
        description="Bytes of images that `data_folder` keeps before the oldest are deleted; "
        "unused with `s3`.",
    )

    @model_validator(mode="after")
    def _links_last_no_longer_than_images(self) -> ResultSettings:
        if self.link_expires_s > self.max_age_s:
            raise ValueError(
                f"link_expires_s {self.link_expires_s} must be at most max_age_s {self.max_age_s}"
            )
        return self


class AutoscalingSettings(Frozen):
    """The tuning of Octet's autoscaling policy, which docs/autoscaling.md explains.

    The defaults are those of `autoscaling.load.PolicyTuning`.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    target_wait_s: PositiveFloat = Field(
        default=_TUNING.target_wait_s,
        description="Seconds within which a queue must be drained once the replicas that were "
        "ordered for it are ready.",
    )
    utilisation: Annotated[float, Field(gt=0, le=1)] = Field(
        default=_TUNING.utilisation,
        description="Largest part of their time, 0 to 1, that replicas may be busy with the work "
        "that is expected.",
    )
    spare: NonNegativeFloat = Field(
        default=_TUNING.spare,
        description="Spare capacity for chance, in standard deviations of the number of images "
        "that are generated at a time.",
    )
    late_part: Annotated[float, Field(ge=0, le=1)] = Field(
        default=_TUNING.late_part,
        description="Fraction of all work that may come faster than replicas start. Replicas for "
        "the rest stay ready, as earlier jumps of the rate have shown; 1: none do.",
    )
    keep_s: NonNegativeFloat = Field(
        default=_TUNING.keep_s,
        description="Seconds without any work after which no replicas stay ready for jumps, except "
        "in hours of the day in which there were some on earlier days.",
    )
    hold_s: PositiveFloat = Field(
        default=_TUNING.hold_s,
        description="Seconds over which arriving work is averaged, and for which replicas are "
        "kept after they were last needed.",
    )
    idle_s: NonNegativeFloat = Field(
        default=_TUNING.idle_s,
        description="Further seconds without work, after `hold_s`, until a pool with "
        "`min_replicas: 0` loses its last replica.",
    )
    node_wait_s: NonNegativeFloat = Field(
        default=_TUNING.node_wait_s,
        description="Seconds that adding a node for a replica may take; 0: no nodes are added.",
    )
    warm_reserve: NonNegativeInt = Field(
        default=_TUNING.warm_reserve,
        description="Replicas beyond those that are needed, for each model that is not idle.",
    )


class EditSettings(Frozen):
    """Limits of the pictures and masks of edits, in requests and in an Ingress's memory."""

    max_image_bytes: PositiveInt = Field(
        default=25_000_000,
        description="Largest picture to edit, in bytes. A gateway in front of the server must let "
        "bodies pass that hold this and `max_mask_bytes` in base64: 40 MB with the defaults.",
    )
    max_mask_bytes: PositiveInt = Field(default=4_000_000, description="Largest mask, in bytes.")
    max_pixels: PositiveInt = Field(
        default=25_000_000,
        description="Most pixels of a picture or mask as it is sent; reading one takes up to 20 "
        "bytes of memory for each.",
    )
    max_held_bytes: PositiveInt = Field(
        default=256_000_000,
        description="Bytes of bodies, pictures and masks that an Ingress holds for open requests; "
        "beyond them edits are refused with 503 `unavailable`. One tenant alone may use a half of "
        "it, two tenants a third each, and so on.",
    )

    def largest_body_bytes(self, others: int) -> int:
        """The largest body: the files, a third more for base64, and `others` bytes."""
        return (self.max_image_bytes + self.max_mask_bytes) * 4 // 3 + others

    @model_validator(mode="after")
    def _one_body_can_be_held(self) -> EditSettings:
        if self.max_held_bytes < (least := 2 * self.largest_body_bytes(0)):
            raise ValueError(
                f"max_held_bytes {self.max_held_bytes} must be at least {least}, twice a body with "
                "max_image_bytes and max_mask_bytes"
            )
        return self


class JobSettings(Frozen):
    """Jobs and batches: how long they may take and are kept, and what they may use."""

    max_age_s: PositiveFloat = Field(
        default=24 * 3600.0,
        description="Longest `timeout_s` of a job, in seconds, and the deadline of jobs without "
        "one.",
    )
    keep_s: PositiveInt = Field(
        default=7 * 24 * 3600,
        description="Seconds for which an ended job or batch is kept, with its images.",
    )
    max_queued: PositiveInt = Field(
        default=100_000,
        description="Most jobs and lines of batches that a tenant may have waiting; more are "
        "refused with 429 `queue_full`. A tenant's `max_queued_jobs` may be lower.",
    )
    target_wait_s: PositiveFloat = Field(
        default=600.0,
        description="Seconds within which waiting jobs are to be done, for the number of replicas.",
    )
    batch_weight: Annotated[float, Field(ge=0.001, le=1)] = Field(
        default=0.1,
        description="Weight of a tenant's batches, as a part of the tenant's own weight.",
    )
    batch_free_slots: NonNegativeInt = Field(
        default=0,
        description="Free slots of each pool that batches leave to others. A pool with no more "
        "slots than that runs no batches.",
    )
    scale_up_for_batches: bool = Field(
        default=True,
        description="Whether replicas may be added for batches; otherwise batches use only those "
        "that are there for other work.",
    )
    max_file_bytes: PositiveInt = Field(
        default=200_000_000, description="Largest file of a batch, in bytes."
    )
    max_stored_file_bytes: PositiveInt = Field(
        default=2_000_000_000,
        description="Most bytes of all files that a tenant has uploaded and not deleted.",
    )
    max_lines: PositiveInt = Field(default=50_000, description="Most lines of a batch.")
    webhook_networks: tuple[IPvAnyNetwork, ...] = Field(
        default=(),
        description="Private networks to which webhooks may be sent, such as 10.0.0.0/8, also "
        "without TLS; all other webhooks go to public addresses by https.",
    )


class LiveSettings(Frozen):
    """Live settings: they may change while requests are served, and restart nothing."""

    max_queued: PositiveInt = Field(
        default=1000,
        description="Images of all tenants that may wait at a time; more are refused with 503 "
        "`queue_full`.",
    )
    late_slowdown: Annotated[float, Field(gt=1)] | None = Field(
        default=5.0,
        description="An image that can no longer be done within this many times the seconds that "
        "it takes alone, or by its deadline, waits behind its tenant's other images; null: within "
        "a tenant, images are always served in order of arrival.",
    )
    request_timeout_s: PositiveFloat = Field(
        default=300.0,
        description="Longest `timeout_s` that a request may ask for, in seconds, and the deadline "
        "of requests without one.",
    )
    max_body_bytes: PositiveInt = Field(
        default=1_000_000,
        description="Largest request body, in bytes. The body of an edit may have a picture and a "
        "mask in addition.",
    )
    edits: EditSettings = Field(
        default=EditSettings(), description="Limits of the pictures that clients send for edits."
    )
    ignore_unknown_fields: bool = Field(
        default=False,
        description="Whether a request may have unknown fields, which are then ignored and named "
        "in the header `x-octet-ignored`; otherwise it is refused.",
    )
    public_url: Annotated[str, Field(pattern=r"^https?://[^\s?#]+[^\s?#/]$")] | None = Field(
        default=None,
        description="URL under which clients reach this server, for links to images; null: the "
        "URL that the request was sent to.",
    )
    results: ResultSettings = Field(
        default=ResultSettings(),
        description="How long images that are answered as URLs are kept, and how long their links "
        "work.",
    )
    jobs: JobSettings = Field(
        default=JobSettings(),
        description="Jobs and batches: how long they may take and are kept, and what they may use.",
    )
    drain_timeout_s: PositiveFloat = Field(
        default=300.0,
        description="Longest time, in seconds, that a stopping replica or server waits for its "
        "open requests to finish.",
    )
    autoscaling: AutoscalingSettings = Field(
        default=AutoscalingSettings(), description="Tuning of Octet's autoscaling policy."
    )


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is this machine's loopback, as localhost or ::1."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


ORIGIN = r"^(\*|https?://[^\s/?#]+)$"


class HttpSettings(Frozen):
    """The address at which the server listens for HTTP requests, and who may call from browsers."""

    host: str = Field(
        default="127.0.0.1",
        description="Address to listen on: 127.0.0.1 accepts connections from this machine only, "
        "0.0.0.0 from everywhere.",
    )
    port: Annotated[int, Field(ge=1, le=65535)] = Field(
        default=8000, description="TCP port to listen on."
    )
    allowed_origins: tuple[Annotated[str, Field(pattern=ORIGIN)], ...] = Field(
        default=(),
        description="Origins of web pages that may call this server from a browser (CORS), such "
        "as `https://app.example`; `*` allows all.",
    )


class Settings(CatalogueSettings, FrontSettings, LiveSettings):
    """All settings of a settings file."""

    http: HttpSettings = Field(
        default=HttpSettings(), description="Address at which the server listens for requests."
    )

    @model_validator(mode="after")
    def _one_call_fits_into_the_queue(self) -> Settings:
        most = max(model.limits.max_images for model in self.models)
        if self.max_queued < most:
            raise ValueError(f"max_queued {self.max_queued} must be at least max_images {most}")
        return self

    @model_validator(mode="after")
    def _without_keys_only_loopback(self) -> Settings:
        if self.auth == "none" and not is_loopback(self.http.host):
            raise ValueError(
                f"auth none: anybody who reaches {self.http.host} could generate images; use "
                "auth: keys, or auth: none-on-any-address behind a gateway of your own"
            )
        return self
