"""A model on this machine that generates images without a server, by the server's engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from cluster.capability import capability, probe

from ..engine.denoiser import DENOISER_COMPONENTS, Denoiser, DenoisingState, to_pixels
from ..engine.denoising_loop import bucket
from ..engine.precision import ENCODER_RECIPES, RECIPES
from ..engine.prompt_embeds import PromptEmbeds
from ..engine.prompt_encoder import ENCODER_COMPONENTS, PromptEncoder
from ..errors import NonFiniteImage
from ..models.checkpoints import open_checkpoint
from ..request import ImageRequest
from ..settings.application import Settings
from ..settings.models import Model, Source
from .metrics import Pixels

# Called after each step of an image, with its latents.
OnStep = Callable[[ImageRequest, DenoisingState], None]


def device_here() -> str:
    """The device on which this process generates: a card if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """The name of the device on which this process generates."""
    return probe(device_here()).name


def sixteen_bit_here() -> str:
    """The recipe that runs on this machine where 16 bit is asked for."""
    return capability(probe(device_here())).sixteen_bit


class Embeddings:
    """The embeddings of prompts, each encoded once; all recipes of a model read the same ones."""

    def __init__(self, settings: Settings, model: Model) -> None:
        """Load the model's text encoders. Raises `CheckpointError` if that fails."""
        (encoder,) = [e for e in settings.text_encoders if e.id == model.text_encoder]
        folder = open_checkpoint(encoder.source, settings.models_folder, ENCODER_COMPONENTS)
        recipe = ENCODER_RECIPES[encoder.precision].on(capability(probe(device_here())).sixteen_bit)
        self._encoder = PromptEncoder(folder, recipe, device_here())
        self._length = model.max_sequence_length
        self._rows: dict[str, PromptEmbeds] = {}

    def of(self, request: ImageRequest) -> PromptEmbeds:
        """One row; with guidance two, of which the negative prompt's is the first."""
        prompts = [request.negative_prompt] if request.guided else []
        rows = [self._row(prompt) for prompt in [*prompts, request.prompt]]
        return PromptEmbeds(
            torch.cat([row.tokens for row in rows]), torch.cat([row.pooled for row in rows])
        )

    def _row(self, prompt: str) -> PromptEmbeds:
        if prompt not in self._rows:
            found = self._encoder.encode_prompts([prompt], self._length)
            self._rows[prompt] = PromptEmbeds(found.tokens.cpu(), found.pooled.cpu())
        return self._rows[prompt]


class LocalModel:
    """The transformer and VAE of a model in one recipe, which generate images."""

    def __init__(self, denoiser: Denoiser, embeddings: Embeddings) -> None:
        self._denoiser, self._embeddings = denoiser, embeddings

    @classmethod
    def load(
        cls, settings: Settings, source: Source, recipe: str, embeddings: Embeddings
    ) -> LocalModel:
        """Load weights in a recipe of `serve.engine.precision`.

        Raises `CheckpointError` if the weights cannot be loaded or do not suit the recipe.
        """
        torch.set_flush_denormal(True)  # as in a replica
        folder = open_checkpoint(source, settings.models_folder, DENOISER_COMPONENTS)
        return cls(Denoiser.load(folder, RECIPES[recipe], device_here()), embeddings)

    def images(
        self,
        requests: Sequence[ImageRequest],
        batch_images: int = 4,
        on_step: OnStep = lambda _request, _state: None,
    ) -> Iterator[tuple[ImageRequest, Pixels]]:
        """Generate an image (height_px, width_px, 3) for each request, in their order.

        Images of a batch should have one size and one number of steps. `batch_images`: the most
        images in a batch. Raises `NonFiniteImage` if an image holds non-finite numbers.
        """
        for begin in range(0, len(requests), batch_images):
            part = requests[begin : begin + batch_images]
            for request, state in zip(part, self._denoised(part, on_step), strict=True):
                image = self._denoiser.decode(state.latents)[0]
                if not image.isfinite().all():
                    name = self._denoiser.recipe.name
                    raise NonFiniteImage(f"the model produced non-finite numbers in {name}")
                yield request, to_pixels(image)

    def _denoised(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[DenoisingState]:
        """Take all steps of images that share their batches."""
        states = [
            self._denoiser.begin_request(request, self._embeddings.of(request))
            for request in requests
        ]
        rows = bucket(sum(state.rows for state in states))
        while batch := [state for state in states if not state.finished]:
            self._denoiser.denoise_step(batch, rows)
            for request, state in zip(requests, states, strict=True):
                on_step(request, state)
        return states
