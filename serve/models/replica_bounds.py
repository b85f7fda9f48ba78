"""What the autoscaling policy has to know of an application's deployments."""

from __future__ import annotations

from autoscaling.load import Follower, ScalingLimits
from autoscaling.load import PoolBounds as PoolLimits
from cluster.cards import CARDS
from cluster.cost import CostCoefficients, ImageShape

from ..settings.application import ApplicationSettings
from ..settings.models import Pool, ServedModel
from .reference_work import cost_of, units

# What the policy decides is done at once: delays would only blur it.
AT_ONCE = {"upscale_delay_s": 0, "downscale_delay_s": 0, "downscale_to_zero_delay_s": 0}
USUAL = ImageShape(width_px=1024, height_px=1024, text_tokens=333, rows=2, steps=28)
REQUESTS_PER_INGRESS = 200  # open ones; most of them only wait


def limits_of(application: ApplicationSettings) -> ScalingLimits:
    """Of every pool by its name, and of the deployments that follow them.

    What a replica can do and costs is arithmetic until replicas say how fast they are.
    """
    work = units(application)
    pools = {
        model.pool_name(pool): _limits(model, pool, work[model.id], application)
        for model in application.models
        for pool in model.pools
    }
    used = {model.text_encoder for model in application.models}
    followers = {
        f"TextEncoder-{encoder.id}": Follower(
            encoder.least,
            encoder.replicas,
            pools=tuple(
                model.pool_name(pool)
                for model in application.models
                if model.text_encoder == encoder.id
                for pool in model.pools
            ),
        )
        for encoder in application.text_encoders
        if encoder.least < encoder.replicas and encoder.id in used
    }
    ingress = application.ingress
    if ingress.least < ingress.replicas:
        followers["Ingress"] = Follower(ingress.least, ingress.replicas, each=REQUESTS_PER_INGRESS)
    return ScalingLimits(pools, followers)


def bounds(least: int, most: int, *, ours: bool) -> dict[str, int]:
    """Between which numbers Ray Serve scales a deployment, by our policy or its own."""
    return {"min_replicas": least, "max_replicas": most, **(AT_ONCE if ours else {})}


def replicas_per_card(pool: Pool) -> int:
    return max(int(1 / pool.num_gpus + 1e-6), 1) if pool.num_gpus else 1


def _limits(
    model: ServedModel, pool: Pool, unit: CostCoefficients, application: ApplicationSettings
) -> PoolLimits:
    here = cost_of(model, pool, application.models_folder)
    alone = unit.work_s(USUAL) / here.work_s(USUAL)
    return PoolLimits(
        model.id,
        pool.least,
        pool.replicas,
        pool.slots,
        speed=alone / replicas_per_card(pool),  # as if the others were busy
        usd_h=((CARDS[pool.card].on_demand_usd_h or 0.0) * pool.num_gpus) if pool.card else 0.0,
    )
