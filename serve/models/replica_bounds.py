"""The bounds within which the autoscaling policy may choose an application's replicas."""

from __future__ import annotations

from autoscaling.load import Follower, PolicyTuning, PoolBounds, ScalingLimits
from cluster.cards import CARDS
from cluster.cost import CostCoefficients, ImageShape
from cluster.placement import NodeRequirement

from ..deployments import DISPATCHER, INGRESS, JOBS, text_encoder_deployment
from ..settings.application import Settings
from ..settings.models import Pool, ServedModel
from .reference_work import cost_of, units

# The image by which the speeds of pools are compared until their replicas have reported real ones.
USUAL_IMAGE = ImageShape(width_px=1024, height_px=1024, text_tokens=333, rows=2, steps=28)
REQUESTS_PER_INGRESS = 200  # open requests for each Ingress; most of them only wait


def scaling_limits(settings: Settings) -> ScalingLimits:
    """The bounds of every pool and of the deployments that follow the pools, and the tuning.

    The speed of a pool's replicas is computed here. The computed speed holds until the replicas
    report their real one.
    """
    work = units(settings)
    pools = {
        model.pool_name(pool): _pool_bounds(model, pool, work[model.id], settings)
        for model in settings.models
        for pool in model.pools
    }
    used = {model.text_encoder for model in settings.models}
    followers = {
        text_encoder_deployment(encoder.id): Follower(
            encoder.least,
            encoder.replicas,
            pools=tuple(
                model.pool_name(pool)
                for model in settings.models
                if model.text_encoder == encoder.id
                for pool in model.pools
            ),
        )
        for encoder in settings.text_encoders
        if encoder.least < encoder.replicas and encoder.id in used
    }
    ingress = settings.ingress
    if ingress.least < ingress.replicas:
        followers[INGRESS] = Follower(ingress.least, ingress.replicas, each=REQUESTS_PER_INGRESS)
    return ScalingLimits(pools, followers, PolicyTuning(**settings.autoscaling.model_dump()))


def other_needs(settings: Settings) -> dict[str, tuple[NodeRequirement, int]]:
    """Return, for each deployment that is no pool, the needs of one replica and the least number.

    A deployment that follows the pools may have more replicas.
    """

    def on_cpus(num_cpus: float) -> NodeRequirement:
        return NodeRequirement("fp16", num_cpus, 0.0)

    ingress, jobs = settings.ingress, settings.job_runner
    return {
        DISPATCHER: (on_cpus(settings.dispatcher_num_cpus), 1),
        INGRESS: (on_cpus(ingress.num_cpus), ingress.least),
        **({JOBS: (on_cpus(jobs.num_cpus), jobs.replicas)} if settings.runs_jobs else {}),
        **{
            text_encoder_deployment(encoder.id): (encoder.need, encoder.least)
            for encoder in settings.text_encoders
        },
    }


def replicas_per_card(pool: Pool) -> int:
    """How many replicas of a pool share a card; 1 for a pool without a GPU."""
    return max(int(1 / pool.num_gpus + 1e-6), 1) if pool.num_gpus else 1


def _pool_bounds(
    model: ServedModel, pool: Pool, unit: CostCoefficients, settings: Settings
) -> PoolBounds:
    here = cost_of(model, pool, settings.models_folder)
    alone = unit.work_s(USUAL_IMAGE) / here.work_s(USUAL_IMAGE)
    return PoolBounds(
        model.id,
        pool.least,
        pool.replicas,
        pool.slots,
        speed=alone / replicas_per_card(pool),  # as if the card's other replicas were busy
        usd_h=((CARDS[pool.card].on_demand_usd_h or 0.0) * pool.num_gpus) if pool.card else 0.0,
    )
