"""What there is to set of models, and of the replicas that serve them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from cluster.cards import CARDS
from cluster.placement import NodeRequirement

from ..errors import InvalidRequest, did_you_mean
from ..request import SIZE_MULTIPLE_PX, ImageRequest, ModelLimits

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,62}$")]
Size = Annotated[str, Field(pattern=r"^[1-9]\d{1,4}x[1-9]\d{1,4}$")]
Share = Annotated[float, Field(ge=0)]


def refuse_unknown_keys(data: Any, known: Collection[str]) -> Any:
    """The data; raises `ValueError` for an unknown key, with the nearest known one."""
    if isinstance(data, dict):
        for key in data.keys() - set(known):
            raise ValueError(f"unknown key '{key}': {did_you_mean(str(key), known)}")
    return data


def _known_limits(data: Any) -> Any:
    return refuse_unknown_keys(data, [field.name for field in fields(ModelLimits)])


class Frozen(BaseModel):
    """Refuses unknown keys and names the nearest one that exists."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_keys(cls, data: Any) -> Any:
        return refuse_unknown_keys(data, cls.model_fields)


class Source(Frozen):
    """Where weights are: a folder, or a hub id with the commit that was tested.

    A folder's path is absolute by now, and need only exist where replicas load it.
    """

    location: str
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None

    @model_validator(mode="after")
    def _hub_ids_are_pinned(self) -> Source:
        if self.revision is None and not Path(self.location).is_absolute():
            raise ValueError(
                f"'{self.location}' is not a folder; a hub id needs a pinned 'revision' "
                "(40 hexadecimal digits)"
            )
        return self


class Resources(Frozen):
    """What one replica takes of a node, in Ray's units; 0.25 GPU = four replicas a card.

    `replicas`: at most; `min_replicas`: at least, by default as many, so that their number is
    fixed.
    """

    replicas: PositiveInt = 1
    min_replicas: NonNegativeInt | None = None
    num_cpus: Share = 1.0
    num_gpus: Share = 0.0

    @model_validator(mode="after")
    def _least_is_no_more_than_most(self) -> Self:
        if self.least > self.replicas:
            raise ValueError(f"min_replicas {self.least} must be at most replicas {self.replicas}")
        return self

    @property
    def least(self) -> int:
        return self.replicas if self.min_replicas is None else self.min_replicas

    @property
    def ray_actor_options(self) -> dict[str, float]:
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}


class CardResources(Resources):
    """What takes GPUs may be bound to the nodes that have a `card`: an id of `cluster/cards.py`.

    `memory_gib`: what a replica may take of its card, and needs free to start; by default the part
    that `num_gpus` says. `octet plan` computes all three.
    """

    card: str | None = None
    memory_gib: PositiveFloat | None = None

    @model_validator(mode="after")
    def _cards_are_known(self) -> Self:
        if self.card is not None and self.card not in CARDS:
            raise ValueError(f"card '{self.card}': {did_you_mean(self.card, CARDS)}")
        if not self.num_gpus and (self.card or self.memory_gib):
            raise ValueError("card and memory_gib are for what takes GPUs: set num_gpus")
        if self.card and self.memory_gib:
            part_gib = self.num_gpus * CARDS[self.card].memory_gib
            if self.memory_gib > part_gib + 0.01:
                raise ValueError(
                    f"memory_gib {self.memory_gib} is more than num_gpus {self.num_gpus} of a "
                    f"{self.card}: {part_gib:.2f}"
                )
        return self


class Encoder(CardResources):
    """One set of text encoders, shared by the models that name it.

    Encodes `batch_size` prompts at once, always: it rounds by the batch's size. `warm_prompts` are
    encoded at the start and stay; list the negative prompts that your clients use.
    """

    id: Name
    source: Source
    precision: Literal["fp32", "bf16", "t5-quanto"] = "t5-quanto"
    cache_mib: PositiveInt = 512  # of embeddings; one prompt of SD3.5 takes 2.6
    batch_size: Annotated[int, Field(ge=1, le=64)] = 4
    warm_prompts: tuple[str, ...] = ("",)

    @property
    def need(self) -> NodeRequirement:
        """Of a node, for one replica; any precision will do."""
        return NodeRequirement("fp16", self.num_cpus, self.num_gpus, card=self.card)


class Pool(CardResources):
    """Generator replicas of one model in one precision, each drawing `slots` images at a time.

    `source` stands in for the model's own, for weights that `octet quantize` made. A 16-bit pool
    prefers nodes without FP8; `allow_fp8_nodes` lets it use the others too. A pool that takes no
    GPU runs anywhere. `adaln_8_bit` stores more of the weights in 8 bit: 2.5 GiB less for Large.

    `compile`: `auto` is `default` on a card and `off` on a CPU. `warm_sizes`: images that get code
    of their own before the replica is ready, as WIDTHxHEIGHT; by default the model's own size.
    """

    precision: Literal["fp8", "fp16"]
    slots: Annotated[int, Field(ge=1, le=16)] = 4
    source: Source | None = None
    allow_fp8_nodes: bool = True
    adaln_8_bit: bool = False
    compile: Literal["auto", "off", "default", "max-autotune"] = "auto"
    warm_sizes: tuple[Size, ...] = ()

    @property
    def need(self) -> NodeRequirement:
        """Of a node, for one replica."""
        return NodeRequirement(
            self.precision, self.num_cpus, self.num_gpus, self.allow_fp8_nodes, self.card
        )

    @model_validator(mode="after")
    def _fp8_runs_on_fp8(self) -> Pool:
        if self.precision == "fp16" and self.adaln_8_bit:
            raise ValueError("adaln_8_bit is for fp8 pools")
        for size in self.warm_sizes:
            if any(int(side) % SIZE_MULTIPLE_PX for side in size.split("x")):
                raise ValueError(f"warm_sizes '{size}': not multiples of {SIZE_MULTIPLE_PX}")
        if self.precision == "fp8" and not self.allow_fp8_nodes:
            raise ValueError("allow_fp8_nodes is for fp16 pools: an fp8 pool runs nowhere else")
        return self


class Defaults(Frozen):
    """What a request that does not say gets."""

    width: PositiveInt
    height: PositiveInt
    num_inference_steps: PositiveInt
    guidance_scale: float


class LiveModelSettings(Frozen):
    """What requests for a model get and may ask for."""

    defaults: Defaults
    limits: Annotated[ModelLimits, BeforeValidator(_known_limits)] = ModelLimits()

    @model_validator(mode="after")
    def _defaults_are_within_the_limits(self) -> LiveModelSettings:
        try:
            ImageRequest(
                id="", model="this model", prompt="x", seed=0, **self.defaults.model_dump()
            ).check(self.limits)
        except InvalidRequest as error:
            raise ValueError(f"defaults: {error.message}") from None
        return self


class ServedModel(Frozen):
    """A model, the encoders that read its prompts, and its pools, preferred pool first."""

    id: Name
    source: Source
    text_encoder: Name
    max_sequence_length: PositiveInt = 256
    pools: Annotated[tuple[Pool, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _pools_differ(self) -> ServedModel:
        for i, pool in enumerate(self.pools):
            others = [p for p in self.pools[:i] if p.precision == pool.precision]
            if others and not all(p.card for p in (pool, *others)):
                raise ValueError(
                    f"model '{self.id}': two pools have the same precision: give each its card"
                )
            if pool in others:
                raise ValueError(f"model '{self.id}': two pools are equal: raise replicas instead")
        return self

    def pool_name(self, pool: Pool) -> str:
        """Pools of one precision on one card are numbered from the second on."""

        def name(pool: Pool) -> str:
            return "-".join(filter(None, (self.id, pool.precision, pool.card)))

        number = [p for p in self.pools if name(p) == name(pool)].index(pool) + 1
        return name(pool) if number == 1 else f"{name(pool)}-{number}"


class Model(ServedModel, LiveModelSettings):
    """One model in the settings file."""
