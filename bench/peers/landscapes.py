"""The demo model in diffusers' pipeline, as every peer serves it."""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline

Request = Mapping[str, Any]


class Landscapes:
    """A pipeline that generates the images of several requests.

    `request` has the keys `prompt`, `size` (such as `128x128`), `num_inference_steps`,
    `guidance_scale` and `seed`. Load and call it in one thread: OpenMP keeps workers for every
    thread that computes, and more workers than cores slow each other down.
    """

    def __init__(self) -> None:
        self._pipeline = StableDiffusion3Pipeline.from_pretrained(
            os.environ["PEER_MODEL"], torch_dtype=getattr(torch, os.environ["PEER_DTYPE"])
        )
        self._pipeline.set_progress_bar_config(disable=True)

    def images(self, requests: Sequence[Request]) -> list[str]:
        """PNG files in base64, in the requests' order.

        One call of the pipeline takes only requests of equal size, steps and guidance, so requests
        that differ in them run one after the other.
        """
        groups: dict[Any, list[int]] = {}
        for i, request in enumerate(requests):
            alike = request["size"], request["num_inference_steps"], request["guidance_scale"]
            groups.setdefault(alike, []).append(i)
        found = [""] * len(requests)
        for (size, steps, guidance), members in groups.items():
            width, height = map(int, size.split("x"))
            seeds = [requests[i]["seed"] for i in members]
            images = self._pipeline(
                [requests[i]["prompt"] for i in members],
                width=width,
                height=height,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                max_sequence_length=32,
            ).images
            for i, image in zip(members, images, strict=True):
                file = io.BytesIO()
                image.save(file, "PNG")
                found[i] = base64.b64encode(file.getvalue()).decode()
        return found
