"""The sides that `octet compare` compares, from their text on the command line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import urllib3

from ..engine.fp8_format import TRANSFORMER, is_fp8
from ..engine.pixel_digest import code_digest, libraries, weights_of
from ..engine.precision import RECIPES
from ..errors import SettingsError, did_you_mean
from ..quality.local_model import Embeddings, LocalModel, device_name
from ..quality.sides import AT_ONCE, LocalSide, ServerSide, Side
from ..request import ModelLimits, Precision, Sampler
from ..settings.application import Settings
from ..settings.models import Model, Source
from .exit_codes import UsageError
from .operator_client import call, server_root
from .weights import source_of

LOCAL = ("recipe", "quality", "sampler", "steps", "weights")
SERVER = ("url", "precision", "quality", "sampler", "steps")
ANSWER_S = 600.0  # in which a server must generate an image
# A server that is busy, or whose tenant has reached a limit, says when to try again.
BUSY = urllib3.Retry(
    total=None,
    connect=0,
    read=0,
    status=100,
    status_forcelist=(429, 503),
    allowed_methods=None,
    backoff_factor=0.5,
    backoff_max=10,
    raise_on_status=False,
)
HTTP = urllib3.PoolManager(maxsize=AT_ONCE)


class Served(NamedTuple):
    """A model to compare, its defaults and limits; on a server without `settings` and `model`."""

    id: str
    defaults: Mapping[str, Any]
    limits: ModelLimits
    settings: Settings | None = None
    model: Model | None = None


def fields_of(text: str) -> dict[str, str]:
    """Parse the text of a side, such as "recipe=fp8,quality=medium".

    Raises `UsageError` for an unknown field.
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        name, given, value = part.partition("=")
        known = SERVER if "url=" in text else LOCAL
        if not given or name not in known:
            raise UsageError(
                f"'{part}' in '{text}': expected NAME=VALUE; {did_you_mean(name, known)}"
            )
        found[name] = value
    if "quality" in found and {"sampler", "steps"} & found.keys():
        raise UsageError(f"'{text}': a side has a quality, or a sampler and steps of its own")
    if not {"recipe", "url"} & found.keys():
        raise UsageError(f"'{text}' needs recipe=… (a side on this machine) or url=… (a server)")
    return found


def served_by(url: str, key: str, name: str | None) -> Served:
    """A model of a running server; `name`: its id, by default that of the first.

    Raises `SettingsError` if the server does not answer or has no such model.
    """
    models = {one["id"]: one for one in call(url, key, "/v1/models")["data"]}
    name = next(iter(models), "") if name is None else name
    if name not in models:
        raise SettingsError(f"{url}: model '{name}': {did_you_mean(name, models)}")
    one = models[name]
    return Served(name, one["defaults"], ModelLimits(**one["limits"]))


class Sides:
    """Makes the sides of a comparison; those on this machine share the embeddings of prompts."""

    def __init__(self, served: Served, key: str, batch_images: int) -> None:
        """`key`: the API key for servers, which may be empty."""
        self._served, self._key, self._batch_images = served, key, batch_images
        self._embeddings: Embeddings | None = None

    def side(self, fields: Mapping[str, str]) -> Side:
        """The side of parsed fields. Raises `UsageError` for a value that does not exist."""
        return self._server(fields) if "url" in fields else self._local(fields)

    def rounding(self, fields: Mapping[str, str]) -> tuple[Side, Side] | None:
        """float32 and bfloat16 in place of a side's FP8; None if the side has no FP8 here.

        Weights that the side names are kept, unless they are in FP8 already.
        """
        if not fields.get("recipe", "").startswith("fp8"):
            return None
        others = {name: value for name, value in fields.items() if name != "recipe"}
        if "weights" in others and is_fp8(Path(others["weights"]), TRANSFORMER):
            del others["weights"]
        exact, rounded = (self._local({"recipe": name, **others}) for name in ("fp32", "bf16"))
        return exact, rounded

    def _sampling(self, fields: Mapping[str, str]) -> dict[str, Any]:
        """The sampler and steps of a side on this machine."""
        served, model = self._served, self._served.model
        assert model is not None  # noqa: S101 - sides on this machine come with settings
        quality = fields.get("quality", "auto")
        if quality not in model.qualities:
            raise UsageError(f"quality={quality}: {did_you_mean(quality, model.qualities)}")
        way = model.presets.get(quality) or model.defaults
        sampler = fields.get("sampler", way.sampler)
        if sampler not in list(Sampler):
            raise UsageError(f"sampler={sampler}: {did_you_mean(sampler, list(Sampler))}")
        steps = fields.get("steps", str(way.num_inference_steps))
        if not steps.isdecimal() or not 1 <= int(steps) <= served.limits.max_steps:
            raise UsageError(f"steps={steps} must be between 1 and {served.limits.max_steps}")
        return {"sampler": Sampler(sampler), "num_inference_steps": int(steps)}

    def _local(self, fields: Mapping[str, str]) -> Side:
        settings, model = self._served.settings, self._served.model
        if settings is None or model is None:
            raise UsageError(
                "a side on this machine needs the settings of its model: --config FILE"
            )
        recipe = fields["recipe"]
        if recipe not in RECIPES:
            raise UsageError(f"recipe={recipe}: {did_you_mean(recipe, RECIPES)}")
        source = source_of(fields["weights"]) if "weights" in fields else model.source

        def load() -> LocalModel:
            if self._embeddings is None:
                self._embeddings = Embeddings(settings, model)
            return LocalModel.load(settings, source, recipe, self._embeddings)

        return LocalSide(
            label=_label(fields),
            identity={
                "recipe": recipe,
                "weights": source.location,
                "revision": source.revision,
                "pixels": _pixels(source, settings, model),
            },
            changes=self._sampling(fields),
            load=load,
            batch_images=self._batch_images,
        )

    def _server(self, fields: Mapping[str, str]) -> Side:
        body: dict[str, Any] = {name: fields[name] for name in fields if name != "url"}
        if (precision := body.get("precision")) and precision not in list(Precision):
            raise UsageError(f"precision={precision}: {did_you_mean(precision, list(Precision))}")
        if steps := body.pop("steps", None):
            if not steps.isdecimal():
                raise UsageError(f"steps={steps} must be a whole number")
            body["num_inference_steps"] = int(steps)
        identity = {"url": fields["url"], **body, "served": self._served.defaults}
        post = partial(_generated, fields["url"], self._key)
        return ServerSide(_label(fields), identity, body, post)


def _pixels(source: Source, settings: Settings, model: Model) -> str:
    """A digest of code, libraries, text encoders and weights that decide pixels here."""
    (encoder,) = [e for e in settings.text_encoders if e.id == model.text_encoder]
    found = [
        *(code_digest(), libraries(), device_name(), model.max_sequence_length),
        *(encoder.precision, weights_of(encoder.source), encoder.source.revision),
        weights_of(source),
    ]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def _generated(url: str, key: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer of a server to a request for an image, which is sent again while it is busy.

    Raises `SettingsError` if the server does not answer, or refuses the request.
    """
    try:
        answer = HTTP.request(
            "POST",
            f"{server_root(url)}/v1/images/generations",
            json=body,
            headers={"authorization": f"Bearer {key.strip()}"} if key else {},
            timeout=ANSWER_S,
            retries=BUSY,
            redirect=False,
        )
        found: dict[str, Any] = answer.json()
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        raise SettingsError(f"{url}: {type(error).__name__}: {error}") from None
    if answer.status != 200:
        message = found.get("error", {}).get("message", answer.reason)
        raise SettingsError(f"{url}: {message}")
    return found


def _label(fields: Mapping[str, str]) -> str:
    """A side's name for people, such as "fp8 medium" or "fp16 of http://127.0.0.1:8000"."""
    names = [value for name, value in fields.items() if name not in ("url", "weights")]
    if weights := fields.get("weights"):
        names.append(f"of {weights}")
    if url := fields.get("url"):
        names.append(f"of {url}" if names else url)
    return " ".join(names)
