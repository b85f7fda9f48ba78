"""The settings of models, of their pools, and of the text encoders that they share."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import re2
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    SerializationInfo,
    model_validator,
)

from cluster.cards import CARDS
from cluster.placement import NodeRequirement

from ..errors import InvalidRequest, did_you_mean
from ..request import SIZE_MULTIPLE_PX, ImageRequest, ModelLimits, Sampler

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,62}$")]
Size = Annotated[str, Field(pattern=r"^[1-9]\d{1,4}x[1-9]\d{1,4}$")]
RuleName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
PresetName = RuleName
Share = Annotated[float, Field(ge=0)]

# Values of a request's `quality` that mean the model's defaults. OpenAI's other two, `medium` and
# `low`, do so for a model that has no presets of these names.
DEFAULT_QUALITIES = "auto", "high", "hd", "standard"
CHEAP_QUALITIES = "medium", "low"


def refuse_unknown_keys(data: Any, known: Collection[str]) -> Any:
    """Return `data`; raise `ValueError` for an unknown key in it, with the nearest known key."""
    if isinstance(data, dict):
        for key in data.keys() - set(known):
            raise ValueError(f"unknown key '{key}': {did_you_mean(str(key), known)}")
    return data


def _known_limits(data: Any) -> Any:
    return refuse_unknown_keys(data, [field.name for field in fields(ModelLimits)])


def _stated_limits(limits: ModelLimits, info: SerializationInfo) -> dict[str, Any]:
    """The limits as plain data.

    If only stated keys are wanted (`exclude_unset`), limits that equal their default are left out.
    """
    usual = asdict(ModelLimits())
    stated = asdict(limits).items()
    return {k: v for k, v in stated if not (info.exclude_unset and v == usual[k])}


Limits = Annotated[
    ModelLimits, BeforeValidator(_known_limits), PlainSerializer(_stated_limits, dict[str, Any])
]


class Frozen(BaseModel):
    """Base class of settings that cannot change.

    Raises `ValueError` for an unknown key; the message names the nearest known key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_keys(cls, data: Any) -> Any:
        return refuse_unknown_keys(data, cls.model_fields)


class Source(Frozen):
    """Where weights are: in a folder, or on the Hugging Face hub at a pinned commit.

    The path of a folder is absolute here, because `serve.settings.file` resolves it. The folder
    must exist only on the nodes whose replicas load it.
    """

    location: str = Field(
        description="Folder with the weights, or id of a repository on the Hugging Face hub, such "
        "as stabilityai/stable-diffusion-3.5-large."
    )
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = Field(
        default=None,
        description="Commit of the hub repository, 40 hexadecimal digits; null: `location` is a "
        "folder.",
    )

    @model_validator(mode="after")
    def _hub_ids_are_pinned(self) -> Source:
        if self.revision is None and not Path(self.location).is_absolute():
            raise ValueError(
                f"'{self.location}' is not a folder; a hub id needs a pinned 'revision' "
                "(40 hexadecimal digits)"
            )
        return self


class Resources(Frozen):
    """How many replicas there are, and what each of them takes of its node."""

    replicas: PositiveInt = Field(default=1, description="Largest number of replicas.")
    min_replicas: NonNegativeInt | None = Field(
        default=None,
        description="Smallest number of replicas; null: as many as `replicas`, so that their "
        "number is fixed.",
    )
    num_cpus: Share = Field(
        default=1.0, description="CPU cores that Ray reserves for one replica; may be a fraction."
    )
    num_gpus: Share = Field(
        default=0.0,
        description="Part of a GPU that Ray reserves for one replica: 0.25 puts four replicas on "
        "one card, 0 runs on the CPU.",
    )

    @model_validator(mode="after")
    def _least_is_no_more_than_most(self) -> Self:
        if self.least > self.replicas:
            raise ValueError(f"min_replicas {self.least} must be at most replicas {self.replicas}")
        return self

    @property
    def least(self) -> int:
        """The smallest number of replicas."""
        return self.replicas if self.min_replicas is None else self.min_replicas

    @property
    def ray_actor_options(self) -> dict[str, float]:
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}


class CardResources(Resources):
    """The resources of replicas that may run on a GPU.

    `octet plan` computes `num_gpus`, `card` and `memory_gib`.
    """

    card: str | None = Field(
        default=None,
        description="GPU model that a replica needs, an id of `cluster/cards.py` such as h100; "
        "null: any.",
    )
    memory_gib: PositiveFloat | None = Field(
        default=None,
        description="GiB of its card's memory that a replica may take and that must be free when "
        "it starts; null: the part that `num_gpus` states.",
    )

    @model_validator(mode="after")
    def _cards_are_known(self) -> Self:
        if self.card is not None and self.card not in CARDS:
            raise ValueError(f"card '{self.card}': {did_you_mean(self.card, CARDS)}")
        if not self.num_gpus and (self.card or self.memory_gib):
            raise ValueError("card and memory_gib are for what takes GPUs: set num_gpus above 0")
        if self.card and self.memory_gib:
            part_gib = self.num_gpus * CARDS[self.card].memory_gib
            if self.memory_gib > part_gib + 0.01:
                raise ValueError(
                    f"memory_gib {self.memory_gib} is more than num_gpus {self.num_gpus} of a "
                    f"{self.card}: {part_gib:.2f}"
                )
        return self


class Encoder(CardResources):
    """One set of text encoders, shared by the models that name it."""

    id: Name = Field(description="Name of this set, which models give as their `text_encoder`.")
    source: Source = Field(description="Where the weights of the text encoders are.")
    precision: Literal["fp32", "bf16", "t5-fp8", "t5-quanto"] = Field(
        default="t5-fp8",
        description="Number format of the text encoders; `t5-fp8` and `t5-quanto` are bf16 with "
        "the weights of T5 stored in FP8, by Octet or by optimum-quanto.",
    )
    cache_mib: PositiveInt = Field(
        default=512,
        description="MiB of embeddings that each replica keeps; one prompt of SD3.5 takes 2.6 MiB.",
    )
    batch_size: Annotated[int, Field(ge=1, le=64)] = Field(
        default=4,
        description="Prompts that are encoded together; fewer are padded to this number, because "
        "results are rounded differently at another batch size.",
    )
    warm_prompts: tuple[str, ...] = Field(
        default=("",),
        description="Prompts that are encoded at the start and stay in memory; list the negative "
        "prompts that your clients use.",
    )

    @property
    def need(self) -> NodeRequirement:
        """The node that one replica needs; the node's precision does not matter."""
        return NodeRequirement("fp16", self.num_cpus, self.num_gpus, card=self.card)


class Pool(CardResources):
    """Generator replicas of one model in one precision.

    An FP8 pool runs on nodes that have FP8. A 16-bit pool prefers the other nodes. A pool that
    takes no GPU runs anywhere.
    """

    precision: Literal["fp8", "fp16"] = Field(
        description="Precision of the transformer: `fp8`, or `fp16` for a 16-bit format that fits "
        "the card (bfloat16 where it has that, else float16)."
    )
    slots: Annotated[int, Field(ge=1, le=16)] = Field(
        default=4, description="Images that one replica generates at a time."
    )
    source: Source | None = Field(
        default=None,
        description="Weights of this pool instead of the model's own, such as those that `octet "
        "quantize` made; null: the model's `source`.",
    )
    allow_fp8_nodes: bool = Field(
        default=True,
        description="Whether a 16-bit pool may also use nodes that have FP8; it prefers the "
        "others.",
    )
    adaln_8_bit: bool = Field(
        default=False,
        description="Whether an FP8 pool stores the weights of AdaLN in 8 bit too, which saves "
        "2.5 GiB for SD3.5 Large.",
    )
    compile: Literal["auto", "off", "default", "max-autotune"] = Field(
        default="auto",
        description="How torch compiles the transformer; `auto` is `default` on a GPU and `off` on "
        "a CPU.",
    )
    warm_sizes: tuple[Size, ...] = Field(
        default=(),
        description="Image sizes, WIDTHxHEIGHT in pixels, that get compiled code of their own "
        "before a replica is ready; empty: the model's native size.",
    )

    @property
    def need(self) -> NodeRequirement:
        """The node that one replica needs."""
        return NodeRequirement(
            self.precision, self.num_cpus, self.num_gpus, self.allow_fp8_nodes, self.card
        )

    @model_validator(mode="after")
    def _fp8_runs_on_fp8(self) -> Pool:
        if self.precision == "fp16" and self.adaln_8_bit:
            raise ValueError("adaln_8_bit is for fp8 pools")
        for size in self.warm_sizes:
            if any(int(side) % SIZE_MULTIPLE_PX for side in size.split("x")):
                raise ValueError(
                    f"warm_sizes '{size}': width and height must be multiples of {SIZE_MULTIPLE_PX}"
                )
        if self.precision == "fp8" and not self.allow_fp8_nodes:
            raise ValueError(
                "allow_fp8_nodes is for fp16 pools: an fp8 pool runs only on nodes with FP8"
            )
        return self


class Defaults(Frozen):
    """The values of a model's requests that do not state their own."""

    width: PositiveInt = Field(description="Width of the image in pixels.")
    height: PositiveInt = Field(description="Height of the image in pixels.")
    num_inference_steps: PositiveInt = Field(description="Number of denoising steps.")
    guidance_scale: float = Field(
        description="Strength of classifier-free guidance; 1 or less turns it off."
    )
    sampler: Sampler = Field(
        default=Sampler.EULER,
        description="Solver that denoises: `euler`, as in SD3.5's own code, or `dpmpp_2m`, which "
        "needs fewer steps.",
    )


class Preset(Frozen):
    """The sampler and the steps of requests that name this preset as their `quality`."""

    sampler: Sampler = Field(description="Solver that denoises: `euler` or `dpmpp_2m`.")
    num_inference_steps: PositiveInt = Field(
        description="Number of denoising steps, fewer than the default's."
    )


class RoutingRule(Frozen):
    """A rule that sends requests to the model's 16-bit pools, because of their prompt.

    Requests that ask for a precision themselves are not routed.
    """

    name: RuleName = Field(description="Name of the rule in answers and metrics.")
    prompt: str = Field(
        min_length=1,
        description="Regular expression that is searched for in the prompt, in RE2's syntax; the "
        "case of letters does not matter.",
    )

    @model_validator(mode="after")
    def _prompt_is_a_regular_expression(self) -> RoutingRule:
        try:
            self._pattern  # noqa: B018 - compiles it
        except re2.error as error:
            detail = error.args[0].decode() if error.args else ""
            raise ValueError(f"prompt '{self.prompt}' is no regular expression: {detail}") from None
        return self

    @cached_property
    def _pattern(self) -> Any:
        options = re2.Options()
        options.case_sensitive = options.log_errors = False
        return re2.compile(self.prompt, options)

    def fits(self, prompt: str) -> bool:
        """Return whether the rule sends requests with this prompt to the 16-bit pools."""
        return self._pattern.search(prompt) is not None


class LiveModelSettings(Frozen):
    """The live settings of one model: defaults, presets, routing and limits of its requests."""

    defaults: Defaults = Field(description="Values of requests that do not state their own.")
    presets: dict[PresetName, Preset] = Field(
        default={},
        description="Cheaper ways to generate, by the value of `quality` that chooses them; "
        "`octet calibrate` proposes them.",
    )
    routing: tuple[RoutingRule, ...] = Field(
        default=(),
        description="Rules that send requests to the 16-bit pools; the first that fits counts. "
        "`octet compare` proposes them.",
    )
    shadow_percent: Annotated[float, Field(ge=0, le=100)] = Field(
        default=0.0,
        description="Percentage of FP8 images that are generated again in 16 bit to compare both, "
        "only while that pool is idle and without a charge.",
    )
    limits: Limits = Field(
        default=ModelLimits(), description="Largest and smallest values that requests may ask for."
    )

    @model_validator(mode="after")
    def _defaults_are_within_the_limits(self) -> LiveModelSettings:
        try:
            ImageRequest(
                id="", model="this model", prompt="x", seed=0, **self.defaults.model_dump()
            ).check(self.limits)
        except InvalidRequest as error:
            raise ValueError(f"defaults: {error.message}") from None
        return self

    @model_validator(mode="after")
    def _presets_cost_less_than_the_default(self) -> LiveModelSettings:
        for name, preset in self.presets.items():
            if name in DEFAULT_QUALITIES:
                raise ValueError(f"presets.{name}: quality '{name}' is the model's default")
            if preset.num_inference_steps >= self.defaults.num_inference_steps:
                raise ValueError(
                    f"presets.{name}: {preset.num_inference_steps} steps are not fewer than the "
                    f"default's {self.defaults.num_inference_steps}"
                )
        return self

    @property
    def qualities(self) -> tuple[str, ...]:
        """The values of `quality` that requests for this model may have."""
        return tuple(dict.fromkeys((*DEFAULT_QUALITIES, *CHEAP_QUALITIES, *self.presets)))

    def routed_by(self, prompt: str) -> str:
        """The name of the rule that sends a prompt to the 16-bit pools; "" if none does."""
        allowed = prompt[: self.limits.max_prompt_chars]
        return next((rule.name for rule in self.routing if rule.fits(allowed)), "")


class ServedModel(Frozen):
    """The settings of a model that its replicas need; a change of any of them restarts replicas."""

    id: Name = Field(description="Name by which requests ask for the model.")
    source: Source = Field(description="Where the weights of the model are.")
    text_encoder: Name = Field(
        description="The `id` of the text encoders that read the model's prompts."
    )
    max_sequence_length: int = Field(
        default=256,
        ge=1,
        le=512,
        description="Number of T5 tokens that a prompt is padded or cut to.",
    )
    pools: Annotated[tuple[Pool, ...], Field(min_length=1)] = Field(
        description="Pools of replicas that serve the model, preferred pool first."
    )

    @model_validator(mode="after")
    def _pools_differ(self) -> ServedModel:
        for i, pool in enumerate(self.pools):
            others = [p for p in self.pools[:i] if p.precision == pool.precision]
            if others and not all(p.card for p in (pool, *others)):
                raise ValueError(
                    f"model '{self.id}': two pools have the same precision: give each of them a "
                    "card"
                )
            if pool in others:
                raise ValueError(
                    f"model '{self.id}': two pools are equal: raise the replicas of one instead"
                )
        return self

    def pool_name(self, pool: Pool) -> str:
        """The name of one of the model's pools: MODEL-PRECISION, with -CARD if it has a card.

        The second pool of the same precision and card ends in -2, and so on.
        """

        def name(pool: Pool) -> str:
            return "-".join(filter(None, (self.id, pool.precision, pool.card)))

        number = [p for p in self.pools if name(p) == name(pool)].index(pool) + 1
        return name(pool) if number == 1 else f"{name(pool)}-{number}"


class Model(ServedModel, LiveModelSettings):
    """All settings of one model, as the settings file has them."""

    @model_validator(mode="after")
    def _there_is_16_bit_where_it_is_needed(self) -> Model:
        if not any(pool.precision == "fp16" for pool in self.pools):
            for name in ("routing", "shadow_percent"):
                if getattr(self, name):
                    raise ValueError(f"model '{self.id}': {name} needs a pool with precision fp16")
        return self
