"""Settings as Ray Serve's declarative config (`serveConfigV2` on KubeRay).

Ray Serve gives all deployments of an application one version, a digest of the application's
`args`: if they change, all its replicas restart. So each pool is an application of its own, with
its own `args`, and a change of one pool restarts only this pool. Each set of text encoders is an
application too. Ingresses and the Dispatcher are the front application, the only one with a route.

Numbers of replicas, and everything else that running replicas can be told, are not in `args` but in
the config of the deployment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import PositiveInt

from ..deployments import (
    APPLICATION,
    DISPATCHER,
    INGRESS,
    JOBS,
    generator_deployment,
    text_encoder_deployment,
)
from .application import FrontSettings, Settings
from .models import Encoder, Frozen, Model, Pool, Resources, ServedModel

BUILD = "serve.app:build"
# For the applications, and for Serve's own processes. Octet's own lines say how each request ended;
# Serve's access log would add two more lines for each, also for probes.
LOGGING = {"encoding": "JSON", "enable_access_log": False}
# Settings as the operator wrote them; what was left out has the same default in the replicas.
AS_WRITTEN: dict[str, Any] = {"mode": "json", "exclude_unset": True}
OF_JOBS = {"data_folder", "store", "s3", "auth", "job_runner"}  # settings that start them anew
NUMBERS = {"replicas", "min_replicas"}  # of replicas: no arguments, because they change live


class PolicyAdapter(NamedTuple):
    """How Ray Serve applies an autoscaling policy: the policy's function, and Serve's delays."""

    function: str
    delays: Mapping[str, float]


ADAPTERS = {  # by the setting `autoscaling_policy`
    # Octet's policy has its own delays: those of Serve would only come on top of them.
    "queued-work": PolicyAdapter(
        "autoscaling.ray_policy:replicas",
        {"upscale_delay_s": 0, "downscale_delay_s": 0, "downscale_to_zero_delay_s": 0},
    ),
    "ray-default": PolicyAdapter("autoscaling.ray_default:replicas", {}),
}


class PoolArguments(Frozen):
    """The arguments with which a replica of a pool starts.

    `model` has no other pool than this one: the others may change without a restart of this one.
    """

    name: str
    model: ServedModel
    emulate_fp8: bool
    models_folder: str | None
    local_models_folder: str | None = None
    compiled_folder: str | None
    mps_folder: str | None

    @property
    def pool(self) -> Pool:
        (pool,) = self.model.pools
        return pool


class EncoderArguments(Frozen):
    """The arguments with which a replica of a set of text encoders starts."""

    encoder: Encoder
    models_folder: str | None
    local_models_folder: str | None = None
    mps_folder: str | None


class ApplicationArguments(Frozen):
    """The arguments of `serve.app.build`: those of the one application that it is to make."""

    front: FrontSettings | None = None
    jobs: FrontSettings | None = None
    pool: PoolArguments | None = None
    text_encoder: EncoderArguments | None = None


class LivePoolSettings(Frozen):
    """The `user_config` of a pool. `reference`: the model's first pool, the unit of its work."""

    reference: Pool


class LiveEncoderSettings(Frozen):
    """The `user_config` of a set of text encoders.

    `max_sequence_lengths`: the numbers of T5 tokens that the models ask for.
    """

    max_sequence_lengths: tuple[PositiveInt, ...]


def serve_config(
    settings: Settings, import_path: str = BUILD, *, pools_start_empty: bool = True
) -> dict[str, Any]:
    """All applications as Ray Serve's declarative config; the front application comes first.

    `import_path`: the function that makes each of them. `pools_start_empty`: whether Ray Serve lets
    each pool begin with no replica. It then waits for none, even if no node can hold one, and the
    autoscaling policy starts the pool's `min_replicas`.
    """
    found = [
        _front(settings),
        *([_jobs(settings)] if settings.runs_jobs else []),
        *(_encoder(settings, encoder) for encoder in settings.text_encoders),
        *(
            _pool(settings, model, pool, 0 if pools_start_empty else pool.least)
            for model in settings.models
            for pool in model.pools
        ),
    ]
    for application in found:
        application["import_path"] = import_path
        application["logging_config"] = LOGGING
        application["autoscaling_policy"] = {
            "policy_function": ADAPTERS[settings.autoscaling_policy].function
        }
    return {"applications": found}


def pool_arguments(settings: Settings) -> list[PoolArguments]:
    """The arguments with which the replicas of each pool start."""
    found = (
        ApplicationArguments.model_validate(application["args"]).pool
        for application in serve_config(settings)["applications"]
    )
    return [arguments for arguments in found if arguments]


def versions(settings: Settings) -> dict[str, Any]:
    """The parts of each application on which its version in Ray Serve depends, by its name.

    An application whose version changes gets new replicas.
    """
    return {
        application["name"]: (application["args"], application["autoscaling_policy"])
        for application in serve_config(settings)["applications"]
    }


def _front(settings: Settings) -> dict[str, Any]:
    arguments = settings.model_dump(
        **AS_WRITTEN,
        include=set(FrontSettings.model_fields) - {"job_runner"},
        exclude={"ingress": NUMBERS},
    )
    live = settings.model_dump(**AS_WRITTEN)
    return {
        "name": APPLICATION,
        "route_prefix": "/",
        "args": {"front": arguments},
        "deployments": [
            {
                "name": INGRESS,
                **_size(settings.ingress, settings.autoscaling_policy),
                "graceful_shutdown_timeout_s": settings.drain_timeout_s,
                "user_config": live,
            },
            {"name": DISPATCHER, "user_config": live},
        ],
    }


def _jobs(settings: Settings) -> dict[str, Any]:
    arguments = settings.model_dump(**AS_WRITTEN, include=OF_JOBS, exclude={"job_runner": NUMBERS})
    return _application(
        JOBS,
        {"jobs": arguments},
        num_replicas=settings.job_runner.replicas,
        user_config=settings.model_dump(**AS_WRITTEN),
    )


def _encoder(settings: Settings, encoder: Encoder) -> dict[str, Any]:
    arguments = {
        "encoder": encoder.model_dump(**AS_WRITTEN, exclude=NUMBERS),
        "models_folder": settings.models_folder,
        "local_models_folder": settings.local_models_folder,
        "mps_folder": settings.mps_folder,
    }
    lengths = {m.max_sequence_length for m in settings.models if m.text_encoder == encoder.id}
    return _application(
        text_encoder_deployment(encoder.id),
        {"text_encoder": arguments},
        **_size(encoder, settings.autoscaling_policy),
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        user_config={"max_sequence_lengths": sorted(lengths)},
    )


def _pool(settings: Settings, model: Model, pool: Pool, least: int) -> dict[str, Any]:
    """The application of a pool, which Ray Serve counts as running with `least` replicas."""
    served = model.model_dump(**AS_WRITTEN, include=set(ServedModel.model_fields))
    arguments = {
        "name": model.pool_name(pool),
        "model": {**served, "pools": [pool.model_dump(**AS_WRITTEN, exclude=NUMBERS)]},
        "emulate_fp8": settings.emulate_fp8,
        "models_folder": settings.models_folder,
        "local_models_folder": settings.local_models_folder,
        "compiled_folder": settings.compiled_folder,
        "mps_folder": settings.mps_folder,
    }
    reference = model.pools[0].model_dump(**AS_WRITTEN, exclude=NUMBERS)
    return _application(
        generator_deployment(model.pool_name(pool)),
        {"pool": arguments},
        # `initial_replicas` is not set: Ray Serve would go back to it with every new version.
        autoscaling_config=_autoscaling(settings.autoscaling_policy, least, pool.replicas),
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        user_config={"reference": reference},
    )


def _application(name: str, arguments: dict[str, Any], **deployment: Any) -> dict[str, Any]:
    """An application without a route, whose only deployment has the same name."""
    return {
        "name": name,
        "route_prefix": None,
        "args": arguments,
        "deployments": [{"name": name, **deployment}],
    }


def _size(resources: Resources, policy: str) -> dict[str, Any]:
    """Ray Serve's option for a number of replicas that is fixed, or that follows the pools.

    `policy`: the setting `autoscaling_policy`.
    """
    if resources.least == resources.replicas:
        return {"num_replicas": resources.replicas}
    return {"autoscaling_config": _autoscaling(policy, resources.least, resources.replicas)}


def _autoscaling(policy: str, least: int, most: int) -> dict[str, float]:
    return {"min_replicas": least, "max_replicas": most, **ADAPTERS[policy].delays}
