"""The composition root: makes Ray Serve applications from their arguments.

Only this file connects the deployments with each other. Ray Serve's declarative config names the
function `serve.app:build` for every application; the demo, the tests and KubeRay all start them in
this way. `serve.settings.serve_config` says which applications there are, and writes their
arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from cluster.cost import CostCoefficients
from cluster.placement import Selector, card_selectors, selectors

from .api.ingress import Ingress
from .api.job_requests import parse_images
from .deployments import (
    APPLICATION,
    DISPATCHER,
    INGRESS,
    JOBS,
    generator_deployment,
    text_encoder_deployment,
)
from .dispatch.dispatcher import Dispatcher
from .models.reference_work import units
from .settings.application import CatalogueSettings, FrontSettings
from .settings.serve_config import ApplicationArguments, EncoderArguments, PoolArguments

# Requests wait only in the Dispatcher's queue: no deployment may queue them a second time.
UNBOUNDED = 10_000
# The default back-off of Ray Serve's router would leave a replica idle between two images.
PROMPT_ROUTER = RequestRouterConfig(
    initial_backoff_s=0.005,
    max_backoff_s=0.02,
    request_router_class="serve.engine.routing:NamedReplica",
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
    units: Callable[[CatalogueSettings], Mapping[str, CostCoefficients]] = units
    jobs: str | type[Any] = "serve.jobs.deployment.Jobs"


def build(args: dict[str, Any]) -> serve.Application:
    """Make an application from `args`, which are `ApplicationArguments` as plain data."""
    return application(args, Parts())


def application(args: dict[str, Any], parts: Parts) -> serve.Application:
    """Make the application that `args` describes, out of `parts`.

    Its deployments also need the options that `serve.settings.serve_config` writes for them, such
    as `user_config`.
    """
    found = ApplicationArguments.model_validate(args)
    if found.pool:
        return _pool(found.pool, parts)
    if found.text_encoder:
        return _text_encoder(found.text_encoder, parts)
    if found.jobs:
        return _jobs(found.jobs, parts)
    if found.front:
        return _front(found.front, parts)
    raise ValueError("args: give one of front, jobs, pool and text_encoder")


def pool_handle(pool: str) -> DeploymentHandle:
    """A handle of a pool's Generators, whether or not the pool is deployed already."""
    name = generator_deployment(pool)
    return DeploymentHandle(name, name)


def _front(settings: FrontSettings, parts: Parts) -> serve.Application:
    """Ingresses and the Dispatcher; each Ingress calls the Dispatcher and the Generators."""
    dispatcher = serve.deployment(Dispatcher, name=DISPATCHER).options(
        max_ongoing_requests=UNBOUNDED,
        # Waiting at the end would be useless: the Dispatcher's streams never end by themselves,
        # and the Ingresses' sessions outlive it.
        graceful_shutdown_timeout_s=0.5,
        health_check_period_s=1,  # no image starts until its death is noticed
        ray_actor_options={"num_cpus": settings.dispatcher_num_cpus},
        # Ray Serve calls `record_autoscaling_stats` only on deployments that it autoscales.
        autoscaling_config={"min_replicas": 1, "max_replicas": 1, **REPORTING},
    ).bind(
        settings.autoscaling_policy,
        settings.database,
        settings.data_folder,
        settings.tenants_folder,
        settings.auth == "keys",
    )  # fmt: skip
    ingress = serve.deployment(serve.ingress()(parts.ingress), name=INGRESS).options(
        max_ongoing_requests=UNBOUNDED,
        ray_actor_options=settings.ingress.ray_actor_options,
    )
    bound: serve.Application = ingress.bind(
        settings.model_dump(mode="json"), dispatcher, pool_handle, parts.units
    )
    return bound


def _jobs(settings: FrontSettings, parts: Parts) -> serve.Application:
    """The processes that run jobs; each calls the Dispatcher and the Generators."""
    bound: serve.Application = (
        _deployment(parts.jobs, JOBS)
        .options(
            ray_actor_options={"num_cpus": settings.job_runner.num_cpus},
            health_check_period_s=1,  # its jobs wait until its death is noticed
        )
        .bind(
            settings.model_dump(mode="json"),
            DeploymentHandle(DISPATCHER, APPLICATION),
            pool_handle,
            parts.units,
            parse_images,
        )
    )
    return bound


def _pool(arguments: PoolArguments, parts: Parts) -> serve.Application:
    """A pool's Generators, which call the Dispatcher and the text encoders of their model."""
    pool = arguments.pool
    encoder = text_encoder_deployment(arguments.model.text_encoder)
    bound: serve.Application = _deployment(
        parts.generator, generator_deployment(arguments.name)
    ).options(
        max_ongoing_requests=pool.slots,
        ray_actor_options={**pool.ray_actor_options, **_placed(selectors(pool.need))},
        request_router_config=PROMPT_ROUTER,
    ).bind(
        arguments.model_dump(mode="json"),
        DeploymentHandle(encoder, encoder),
        DeploymentHandle(DISPATCHER, APPLICATION),
    )  # fmt: skip
    return bound


def _text_encoder(arguments: EncoderArguments, parts: Parts) -> serve.Application:
    """A set of text encoders."""
    encoder = arguments.encoder
    bound: serve.Application = _deployment(
        parts.text_encoder, text_encoder_deployment(encoder.id)
    ).options(
        max_ongoing_requests=UNBOUNDED,
        ray_actor_options={
            **encoder.ray_actor_options,
            **_placed(card_selectors(encoder.card) if encoder.card else []),
        },
    ).bind(arguments.model_dump(mode="json"))  # fmt: skip
    return bound


def _deployment(part: str | type[Any], name: str) -> Any:
    """A deployment of a class, or of a class that only its replicas import."""
    decorate = serve.deployment(name=name)
    return decorate(part)


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
