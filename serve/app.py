"""The composition root: makes a Ray Serve application from settings.

Only this file connects the deployments with each other. Ray Serve's declarative config names the
function `serve.app:build`; the demo, the tests and KubeRay all start the application in this way.
Ray Serve hashes the arguments of `build` into every deployment's version, so a changed argument
restarts all replicas. The arguments therefore hold only settings that replicas need to restart for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ray import serve
from ray.serve.config import RequestRouterConfig

from cluster.cost import CostCoefficients
from cluster.placement import Selector, card_selectors, selectors

from .api.ingress import Ingress
from .deployments import DISPATCHER, INGRESS, generator_deployment, text_encoder_deployment
from .dispatch.dispatcher import Dispatcher
from .models.reference_work import units
from .models.replica_bounds import scaling_limits
from .settings.application import ApplicationSettings
from .settings.models import Pool, Resources
from .settings.serve_config import autoscaling_config

# Requests wait only in the Dispatcher's queue: no deployment may queue them a second time.
UNBOUNDED = 10_000
# The default back-off of Ray Serve's router would leave a replica idle between two images.
PROMPT_ROUTER = RequestRouterConfig(
    initial_backoff_s=0.005,
    max_backoff_s=0.02,
    request_router_class="serve.engine.routing:StayingReplicas",
    request_routing_stats_period_s=2,
)
REPORTING = {"metrics_interval_s": 1, "look_back_period_s": 30}


class Parts(NamedTuple):
    """The classes of the deployments, and the function that returns the models' reference work.

    Measurements and tests put others in their place. Ray Serve imports the classes that are given
    as MODULE.CLASS only in their replicas: they load torch and diffusers, which takes seconds.
    """

    generator: str | type[Any] = "serve.engine.generator.Generator"
    text_encoder: str | type[Any] = "serve.engine.text_encoder.TextEncoder"
    ingress: type[Ingress] = Ingress
    units: Callable[[ApplicationSettings], Mapping[str, CostCoefficients]] = units


def build(args: dict[str, Any]) -> serve.Application:
    """Make the application from `args`, which are `ApplicationSettings` as plain data."""
    return application(args, Parts())


def application(args: dict[str, Any], parts: Parts) -> serve.Application:
    """Connect `parts` with each other, as `args` says.

    The Ingress calls the Dispatcher and the Generators. Each pool has a deployment of Generators of
    its own. A Generator calls the Dispatcher and the TextEncoder of its model. The Ingress and the
    Dispatcher also need a `user_config`, which `serve.settings.serve_config` writes.
    """
    settings = ApplicationSettings.model_validate(args)
    needs = {model.pool_name(pool): pool.need for model in settings.models for pool in model.pools}
    work = {model: list(unit) for model, unit in parts.units(settings).items()}
    dispatcher = serve.deployment(Dispatcher, name=DISPATCHER).options(
        max_ongoing_requests=UNBOUNDED,
        # Waiting at the end would be useless: the Dispatcher's streams never end by themselves,
        # and the Ingresses' sessions outlive it.
        graceful_shutdown_timeout_s=0.5,
        ray_actor_options={"num_cpus": settings.dispatcher_num_cpus},
        # Ray Serve calls `record_autoscaling_stats` only on deployments that it autoscales.
        autoscaling_config={"min_replicas": 1, "max_replicas": 1, **REPORTING},
    ).bind(
        needs,
        scaling_limits(settings),
        settings.autoscaling_policy,
        settings.tenants_folder if settings.auth == "keys" else None,
        settings.usage_path,
    )  # fmt: skip
    text_encoders = {
        encoder.id: _deployment(parts.text_encoder, text_encoder_deployment(encoder.id)).options(
            **_size(encoder, settings.autoscaling_policy),
            max_ongoing_requests=UNBOUNDED,
            graceful_shutdown_timeout_s=settings.drain_timeout_s,
            ray_actor_options={
                **encoder.ray_actor_options,
                **_placed(card_selectors(encoder.card) if encoder.card else []),
            },
        ).bind(
            encoder.model_dump(mode="json"),
            settings.models_folder,
            settings.mps_folder,
            sorted(
                {m.max_sequence_length for m in settings.models if m.text_encoder == encoder.id}
            ),
        )
        for encoder in settings.text_encoders
    }  # fmt: skip
    generators = {
        model.pool_name(pool): _deployment(
            parts.generator, generator_deployment(model.pool_name(pool))
        ).options(
            **_pool_size(pool, settings.autoscaling_policy),
            max_ongoing_requests=pool.slots,
            ray_actor_options={
                **pool.ray_actor_options,
                **_placed(selectors(needs[model.pool_name(pool)])),
            },
            request_router_config=PROMPT_ROUTER,
            graceful_shutdown_timeout_s=settings.drain_timeout_s,
        ).bind(
            model.model_dump(mode="json"),
            pool.model_dump(mode="json"),
            settings.emulate_fp8,
            work[model.id],
            settings.models_folder,
            settings.compiled_folder,
            settings.mps_folder,
            text_encoders[model.text_encoder],
            dispatcher,
        )
        for model in settings.models
        for pool in model.pools
    }  # fmt: skip
    ingress = serve.deployment(serve.ingress()(parts.ingress), name=INGRESS).options(
        **_size(settings.ingress, settings.autoscaling_policy),
        max_ongoing_requests=UNBOUNDED,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        ray_actor_options=settings.ingress.ray_actor_options,
    )
    bound: serve.Application = ingress.bind(
        settings.model_dump(mode="json"), work, dispatcher, generators
    )
    return bound


def _deployment(part: str | type[Any], name: str) -> Any:
    """A deployment of a class, or of a class that only its replicas import."""
    decorate = serve.deployment(name=name)
    return decorate(part)


def _size(resources: Resources, policy: str) -> dict[str, Any]:
    """Ray Serve's option for the number of replicas.

    The number is fixed, or it follows the pools within the bounds of `resources`. `policy`: the
    setting `autoscaling_policy`.
    """
    if resources.least == resources.replicas:
        return {"num_replicas": resources.replicas}
    return {"autoscaling_config": autoscaling_config(policy, resources.least, resources.replicas)}


def _pool_size(pool: Pool, policy: str) -> dict[str, Any]:
    """Ray Serve's option for a pool's number of replicas, which begins at zero.

    With a larger smallest number, a start would wait for replicas even if no node can hold them.
    The autoscaling policy starts the pool's `min_replicas` instead. `initial_replicas` is not set,
    because Ray Serve would go back to that number with every new version.
    """
    return {"autoscaling_config": autoscaling_config(policy, 0, pool.replicas)}


def _placed(selectors: list[Selector]) -> dict[str, Any]:
    """Ray's options for the nodes that a replica may use, preferred nodes first.

    Without selectors a replica may use any node.
    """
    if not selectors:
        return {}
    first, *others = selectors
    return {
        "label_selector": first,
        "fallback_strategy": [{"label_selector": selector} for selector in others],
    }
