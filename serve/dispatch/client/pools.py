"""Which pools an image may be generated in, preferred pool first."""

from __future__ import annotations

from collections.abc import Iterable

from ...errors import InvalidRequest, ModelNotFound, NonFiniteImage, OctetError
from ...request import ImageRequest, Precision
from ...settings.models import ServedModel
from ..protocol import Pools


class PoolChoice:
    """The pools of all served models, which may change while images are generated."""

    def __init__(self) -> None:
        self._models: dict[str, ServedModel] = {}
        self._precisions: dict[str, str] = {}  # also of pools that are gone

    def set_models(self, models: Iterable[ServedModel]) -> None:
        """Choose among the pools of these models from now on."""
        self._models = {model.id: model for model in models}
        for model in self._models.values():
            self._precisions |= {model.pool_name(p): p.precision for p in model.pools}

    def allowed(self, request: ImageRequest) -> Pools:
        """The pools of the request's model and precision.

        A request that a rule has sent to 16 bit may use any pool once its model has none of these,
        because its client left the choice to Octet. Raises `InvalidRequest` if the model
        is not served in that precision, and `ModelNotFound` if it is not served any more.
        """
        try:
            return self._with_precision(request.model, request.precision)
        except InvalidRequest:
            if not request.routed_by:
                raise
            return self._with_precision(request.model, Precision.AUTO)

    def after_failure(self, error: OctetError, request: ImageRequest) -> Pools:
        """The pools in which an image may be tried again after a Generator has raised `error`.

        After `NonFiniteImage` these are the model's 16-bit pools, if it has any. After every other
        error there are none.
        """
        if not isinstance(error, NonFiniteImage):
            return ()
        try:
            return self._with_precision(request.model, Precision.FP16)
        except (InvalidRequest, ModelNotFound):
            return ()

    def precision_of(self, pool: str) -> str:
        """The precision of a pool: `fp8` or `fp16`."""
        return self._precisions[pool]

    def _with_precision(self, model_id: str, precision: Precision) -> Pools:
        if (model := self._models.get(model_id)) is None:
            raise ModelNotFound(f"model '{model_id}' is not served any more", param="model")
        pools = tuple(
            model.pool_name(pool)
            for pool in model.pools
            if precision in (Precision.AUTO, pool.precision)
        )
        if not pools:
            served = ", ".join(dict.fromkeys(pool.precision for pool in model.pools))
            raise InvalidRequest(
                f"precision '{precision}': {model.id} is served in {served}", param="precision"
            )
        return pools


def moved_last(pool: str, pools: Pools) -> Pools:
    """Return the pools with `pool` last, to be tried last because its replicas may be gone."""
    return (*(p for p in pools if p != pool), pool)
