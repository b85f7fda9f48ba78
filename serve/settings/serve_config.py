"""Settings as Ray Serve's declarative config (`serveConfigV2` on KubeRay)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..deployments import APPLICATION, DISPATCHER, INGRESS
from .application import Settings

BUILD = "serve.app:build"
# For the application, and for Serve's own processes. Octet's own lines say how each request ended;
# Serve's access log would add two more lines for each, also for probes.
LOGGING = {"encoding": "JSON", "enable_access_log": False}


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


def serve_config(settings: Settings, import_path: str = BUILD) -> dict[str, Any]:
    """The application as Ray Serve's declarative config.

    A change of `args` restarts every replica; a change of a `user_config` restarts none.
    """
    live = settings.ingress_settings()
    application = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": import_path,
        "args": settings.application_settings().model_dump(mode="json"),
        "deployments": [
            {"name": INGRESS, "user_config": live.model_dump(mode="json")},
            {
                "name": DISPATCHER,
                "user_config": live.model_dump(mode="json", include={"max_queued", "autoscaling"}),
            },
        ],
        "logging_config": LOGGING,
        "autoscaling_policy": {"policy_function": ADAPTERS[settings.autoscaling_policy].function},
    }
    return {"applications": [application]}


def autoscaling_config(policy: str, least: int, most: int) -> dict[str, float]:
    """Ray Serve's `autoscaling_config` of a deployment with `least` to `most` replicas.

    `policy`: the setting `autoscaling_policy`.
    """
    return {"min_replicas": least, "max_replicas": most, **ADAPTERS[policy].delays}
