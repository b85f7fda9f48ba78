"""Settings as Ray Serve's declarative config (`serveConfigV2` on KubeRay)."""

from __future__ import annotations

from typing import Any

from .application import Settings

APPLICATION = "octet"


LOGGING = {"encoding": "JSON"}  # of the application, and of Serve's own processes


def serve_config(settings: Settings) -> dict[str, Any]:
    """The application as Ray Serve's declarative config (`serveConfigV2` on KubeRay).

    A change of `args` restarts every replica; a change of a `user_config` restarts none.
    """
    tuning = settings.tuning()
    application = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": "serve.app:build",
        "args": settings.application().model_dump(mode="json"),
        "deployments": [
            {"name": "Ingress", "user_config": tuning.model_dump(mode="json")},
            {
                "name": "Dispatcher",
                "user_config": tuning.model_dump(
                    mode="json", include={"max_queued", "autoscaling"}
                ),
            },
        ],
        "logging_config": LOGGING,
        "autoscaling_policy": {"policy_function": "autoscaling.ray_policy:replicas"},
    }
    return {"applications": [application]}
