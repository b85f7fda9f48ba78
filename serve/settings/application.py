"""What there is to set, checked once and then frozen; `settings_file` reads it.

The file has three parts, mixed for the reader's sake and told apart by type. `ApplicationSettings` is what
`serve.app.build` takes: changing it restarts replicas. `IngressSettings` reaches running replicas as
`user_config`: changing it restarts nothing. `HttpSettings` belongs to the process that starts them.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from autoscaling.load import PolicyTuning

from .models import Encoder, Frozen, LiveModelSettings, Model, Name, Resources, ServedModel, Share

_TUNING = PolicyTuning()


class S3Settings(Frozen):
    """A bucket for images; credentials are found as boto3 does.

    `presigned_s`: how long a link into it works, made when an image is asked for; `spool_bytes`:
    how much may wait on each node while it is away.
    """

    bucket: Annotated[str, Field(min_length=3)]
    endpoint_url: str | None = None
    region: str | None = None
    server_side_encryption: Literal["AES256", "aws:kms"] | None = None
    kms_key_id: str | None = None
    storage_class: str | None = None
    presigned_s: Annotated[int, Field(gt=0, le=7 * 86400)] = 900
    spool_bytes: PositiveInt = 2**30

    @model_validator(mode="after")
    def _keys_are_for_kms(self) -> S3Settings:
        if self.kms_key_id and self.server_side_encryption != "aws:kms":
            raise ValueError("kms_key_id: server_side_encryption is not aws:kms")
        return self


class CacheSettings(Frozen):
    """Images of repeated requests that have a seed, so that they need not be drawn again.

    In the memory of each Ingress, `memory_bytes` at most; or, if there is a `redis_url`, found
    through Redis by all of them and read from where images for URLs are kept. A URL holds no
    password, because settings are shown where Ray shows its applications.
    """

    memory_bytes: PositiveInt = 128 * 2**20
    redis_url: Annotated[str, Field(pattern=r"^rediss?://[^@/?#]+(/\d+)?$")] | None = None
    redis_password_file: str | None = None

    @model_validator(mode="after")
    def _passwords_are_for_redis(self) -> CacheSettings:
        if self.redis_password_file and not self.redis_url:
            raise ValueError("redis_password_file: there is no redis_url")
        return self


class ApplicationSettings(Frozen):
    """The arguments of `serve.app.build`.

    `models_folder`: where a node keeps what it pulls from the hub; `compiled_folder`: and what it
    has compiled; `data_folder`: where usage is kept, and images for URLs unless `s3` has a bucket
    for them; `signing_key_file`: what links are signed with, else a key in `data_folder`;
    `tenants_folder`: who may call, and the digests of their keys. With `auth: none` everybody may,
    as one tenant; but on no other address than this machine's own, unless it is
    `none-on-any-address`. `autoscaling_policy`: ours, or Ray Serve's own on the same requests.
    """

    models: Annotated[tuple[ServedModel, ...], Field(min_length=1)]
    text_encoders: Annotated[tuple[Encoder, ...], Field(min_length=1)]
    emulate_fp8: bool = False
    ingress: Resources = Resources(num_cpus=0.5)
    dispatcher_num_cpus: Share = 0.5
    models_folder: str | None = None
    compiled_folder: str | None = None
    data_folder: str | None = None
    s3: S3Settings | None = None
    signing_key_file: str | None = None
    cache: CacheSettings | None = CacheSettings()
    auth: Literal["keys", "none", "none-on-any-address"] = "keys"
    tenants_folder: str = "tenants"
    drain_timeout_s: PositiveFloat = 300.0
    autoscaling_policy: Literal["queued-work", "ray-default"] = "queued-work"

    @model_validator(mode="after")
    def _names_fit(self) -> ApplicationSettings:
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
    def _somebody_answers(self) -> ApplicationSettings:
        if not self.ingress.least:
            raise ValueError("ingress: min_replicas must be at least 1: it takes the requests")
        return self

    @model_validator(mode="after")
    def _usage_is_kept(self) -> ApplicationSettings:
        if self.auth == "keys" and self.data_folder is None:
            raise ValueError(
                "auth keys: set data_folder, where the tenants' usage is kept "
                "(or auth: none on a laptop)"
            )
        return self

    @model_validator(mode="after")
    def _images_can_wait(self) -> ApplicationSettings:
        if self.s3 and self.data_folder is None:
            raise ValueError("s3: set data_folder, where images wait while the bucket is away")
        return self

    @model_validator(mode="after")
    def _repeated_images_are_kept(self) -> ApplicationSettings:
        if self.cache and self.cache.redis_url and self.data_folder is None:
            raise ValueError("cache: redis_url: set data_folder, and s3 for images of many nodes")
        return self

    @model_validator(mode="after")
    def _fp8_has_hardware(self) -> ApplicationSettings:
        for model in self.models:
            for pool in model.pools:
                if pool.precision == "fp8" and not pool.num_gpus and not self.emulate_fp8:
                    raise ValueError(
                        f"model '{model.id}': its fp8 pool takes no GPU, and a CPU has no FP8: "
                        "set num_gpus, or emulate_fp8 for a demo"
                    )
        return self


class ResultSettings(Frozen):
    """Images that are answered as URLs: how long a link works, how long and how many are kept."""

    link_expires_s: PositiveInt = 3600
    max_age_s: PositiveInt = 24 * 3600
    max_bytes: PositiveInt = 10 * 2**30

    @model_validator(mode="after")
    def _links_last_no_longer_than_images(self) -> ResultSettings:
        if self.link_expires_s > self.max_age_s:
            raise ValueError(
                f"link_expires_s {self.link_expires_s} must be at most max_age_s {self.max_age_s}"
            )
        return self


class AutoscalingSettings(Frozen):
    """How replicas follow the load: see `autoscaling.load.Tuning` and docs/autoscaling.md."""

    model_config = ConfigDict(allow_inf_nan=False)

    target_wait_s: PositiveFloat = _TUNING.target_wait_s
    utilisation: Annotated[float, Field(gt=0, le=1)] = _TUNING.utilisation
    spare: NonNegativeFloat = _TUNING.spare
    hold_s: PositiveFloat = _TUNING.hold_s
    idle_s: NonNegativeFloat = _TUNING.idle_s
    node_wait_s: NonNegativeFloat = _TUNING.node_wait_s
    warm_reserve: NonNegativeInt = _TUNING.warm_reserve


class LiveSettings(Frozen):
    """What may change while requests are served."""

    max_queued: PositiveInt = 1000
    request_timeout_s: PositiveFloat = 300.0
    max_body_bytes: PositiveInt = 1_000_000
    ignore_unknown_fields: bool = False
    public_url: Annotated[str, Field(pattern=r"^https?://[^\s?#]+[^\s?#/]$")] | None = None
    results: ResultSettings = ResultSettings()
    autoscaling: AutoscalingSettings = AutoscalingSettings()


class IngressSettings(LiveSettings):
    """The `user_config` of the Ingress."""

    models: dict[Name, LiveModelSettings]


def is_loopback(host: str) -> bool:
    """Of this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class HttpSettings(Frozen):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000


class Settings(ApplicationSettings, LiveSettings):
    """The whole settings file."""

    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    http: HttpSettings = HttpSettings()

    @model_validator(mode="after")
    def _one_call_fits_into_the_queue(self) -> Settings:
        most = max(model.limits.max_images for model in self.models)
        if self.max_queued < most:
            raise ValueError(f"max_queued {self.max_queued} must be at least max_images {most}")
        return self

    @model_validator(mode="after")
    def _strangers_need_keys(self) -> Settings:
        if self.auth == "none" and not is_loopback(self.http.host):
            raise ValueError(
                f"auth none: whoever reaches {self.http.host} could draw; use keys, or "
                "none-on-any-address behind a gateway of your own"
            )
        return self

    def application_settings(self) -> ApplicationSettings:
        return ApplicationSettings.model_validate(self._part(ApplicationSettings, ServedModel))

    def ingress_settings(self) -> IngressSettings:
        parts = self._part(LiveSettings, LiveModelSettings)
        models = {m.id: part for m, part in zip(self.models, parts.pop("models"), strict=True)}
        return IngressSettings(models=models, **parts)

    def _part(self, cls: type[Frozen], of_model: type[Frozen]) -> dict[str, Any]:
        """The keys of one part, with that part's keys of each model."""
        part = self.model_dump(mode="json", include=set(cls.model_fields))
        models = [
            m.model_dump(mode="json", include=set(of_model.model_fields)) for m in self.models
        ]
        return {**part, "models": models}
