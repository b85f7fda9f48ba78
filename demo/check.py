"""A check that images show what their prompts ask for; it knows landscapes and not the model.

    python -m demo.check      # 40 prompts × 2 seeds, generated in FP8; fails under 90 %

The check looks at pixels only. The colour of the sky tells the time of day, edges along both axes
tell a city, level rows under a straight horizon tell the sea, and a bright round blob tells the
moon. All other places are told by the colour of the ground, after the light of the hour has been
taken out. Then the same images are checked against other prompts. Few of these checks may pass:
otherwise the check would accept any image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from .landscapes import LIGHT, Scene

Array = NDArray[np.float64]
MODEL = Path(__file__).parent / "model"
PASS_SHARE = 0.9
TEXT_LENGTH = 32  # tokens; the demo model was trained with it


def scene_prompts() -> list[tuple[str, Scene]]:
    """40 prompts and the scenes that they describe: every place at every hour, and moons."""
    words = {
        "city": "a futuristic cityscape",
        "mountains": "snowy mountain peaks",
        "desert": "sand dunes in the desert",
        "forest": "a pine forest",
        "ocean": "the open sea",
        "hills": "green hills",
        "winter": "a snowy winter landscape",
    }
    hours = {"dawn": "at dawn", "noon": "at noon", "sunset": "at sunset", "night": "at night"}
    prompts = [
        (f"{place} {hour}", Scene(name, time))
        for name, place in words.items()
        for time, hour in hours.items()
    ]
    moon = frozenset({"moon"})
    prompts += [
        (f"night over {place}, full moon", Scene(name, "night", moon))
        for name, place in words.items()
    ]
    prompts += [
        ("golden hour, city skyline with birds", Scene("city", "sunset")),
        ("a calm ocean at sunrise, a sailing boat", Scene("ocean", "dawn")),
        ("midnight in the mountains, the moon", Scene("mountains", "night", moon)),
        ("midday in a meadow, fluffy clouds", Scene("hills", "noon")),
        ("a hot air balloon over the sahara, daybreak", Scene("desert", "dawn")),
    ]
    return prompts


def luminance(image: Array) -> Array:
    """The brightness (height, width) of an image (height, width, 3)."""
    found: Array = image @ np.array([0.299, 0.587, 0.114])
    return found


def band(image: Array, top: float, bottom: float) -> Array:
    """The rows of an image between two heights, given as fractions of its height."""
    height = len(image)
    return image[int(top * height) : int(bottom * height)]


def median_colour(image: Array) -> tuple[float, float, float]:
    """The median of each colour channel: red, green and blue."""
    r, g, b = np.median(image.reshape(-1, 3), axis=0)
    return float(r), float(g), float(b)


def sky_shows(image: Array, time: str) -> bool:
    """Return whether the colour of the sky is that of this time of day."""
    r, g, b = median_colour(band(image, 0.04, 0.26))
    found = (
        "night" if 0.3 * r + 0.59 * g + 0.11 * b < 0.3 and b > r + 0.08 and r < 0.28
        else "sunset" if r > b
        else "noon" if b > r + 0.28
        else "dawn"
    )  # fmt: skip
    return found == time and max(r, g, b) - min(r, g, b) > 0.06  # a sky is never grey


def has_moon(image: Array) -> bool:
    """Return whether the upper part has one bright, round blob of 0.8 to 7 % of a square image."""
    upper = luminance(band(image, 0, 0.42))
    rows, columns = np.nonzero(upper > 0.72)
    share = len(rows) / (len(image) ** 2)
    if not 0.008 < share < 0.07:
        return False
    # Quantiles rather than extremes, so that stars next to the moon do not count.
    tall = np.quantile(rows, 0.95) - np.quantile(rows, 0.05)
    wide = np.quantile(columns, 0.95) - np.quantile(columns, 0.05)
    return bool(0.6 < (tall + 1) / (wide + 1) < 1.7 and wide < 0.3 * len(image))


def axis_edges(image: Array) -> float:
    """The fraction of the lower part's pixels on strong edges, along the axis that has fewer.

    Windows and walls have edges along both axes; trees have vertical edges only, and waves have
    horizontal edges only.
    """
    grey = luminance(band(image, 0.42, 0.9))
    across, down = np.abs(np.diff(grey, axis=1))[:-1], np.abs(np.diff(grey, axis=0))[:, :-1]
    upright = np.mean((across > 0.05) & (across > 2 * down))
    level = np.mean((down > 0.05) & (down > 2 * across))
    return float(min(upright, level))


def is_city(image: Array, light: Array) -> bool:
    """Return whether there are many edges along both axes."""
    return axis_edges(image) > 0.06


def is_ocean(image: Array, light: Array) -> bool:
    """Return whether there is a straight horizon near the middle, and level rows below it."""
    grey = luminance(image)
    middle = band(image, 0.44, 0.66)
    jump = np.abs(np.diff(middle, axis=0)).sum(axis=2)  # (rows, width)
    straight = np.quantile(jump, 0.3, axis=1).max()  # most columns jump in the same row
    below = band(grey[..., None], 0.66, 1.0)[..., 0]
    level = np.median(np.abs(np.diff(below, axis=1)))
    r, _, b = median_colour(band(image, 0.8, 1))
    return bool(straight > 0.02 and level < 0.02 and b > r * 0.8)


def ground(image: Array, light: Array) -> tuple[float, float, float]:
    """The colour of the ground in white light; `light`: the light of the hour."""
    r, g, b = median_colour(band(image, 0.78, 1)) / light
    return float(r), float(g), float(b)


def is_desert(image: Array, light: Array) -> bool:
    """Return whether the ground is sand-coloured."""
    r, g, b = ground(image, light)
    return r > g > b and r - b > 0.22 and r > 0.6


def is_hills(image: Array, light: Array) -> bool:
    """Return whether the ground is of a bright green."""
    r, g, b = ground(image, light)
    return g > r + 0.08 and g > b + 0.08 and g > 0.36


def is_winter(image: Array, light: Array) -> bool:
    """Return whether the ground is nearly white."""
    colour = ground(image, light)
    return min(colour) > 0.58 and max(colour) - min(colour) < 0.3


def has_dark_woods(image: Array, light: Array) -> bool:
    """Return whether the ground is dark green and no city; `light`: the colour of the hour."""
    r, g, b = ground(image, light)
    return g > r and max(r, g, b) < 0.45 and not is_city(image, light)


def treetops(image: Array, light: Array) -> float:
    """The fraction of the middle's pixels on vertical edges, which a row of firs has."""
    grey = luminance(band(image, 0.5, 0.68) / light)
    across, down = np.abs(np.diff(grey, axis=1))[:-1], np.abs(np.diff(grey, axis=0))[:, :-1]
    return float(np.mean((across > 0.05) & (across > 1.5 * down)))


def is_forest(image: Array, light: Array) -> bool:
    """Return whether there are dark woods below and treetops in the middle."""
    return has_dark_woods(image, light) and treetops(image, light) > 0.11


def is_mountains(image: Array, light: Array) -> bool:
    """Return whether there are dark woods below, no treetops in the middle, and peaks above."""
    peaks = luminance(band(image, 0.32, 0.42) / light).std(axis=1).mean()
    return bool(has_dark_woods(image, light) and treetops(image, light) < 0.11 and peaks > 0.05)


PLACE: dict[str, Callable[[Array, Array], bool]] = {
    "city": is_city,
    "mountains": is_mountains,
    "desert": is_desert,
    "forest": is_forest,
    "ocean": is_ocean,
    "hills": is_hills,
    "winter": is_winter,
}


def shows(picture: Image.Image, scene: Scene) -> bool:
    """Return whether an image shows the scene's place, time of day, and moon if it has one."""
    image = np.asarray(picture.convert("RGB"), dtype=np.float64) / 255
    light = np.array(LIGHT[scene.time])
    return (
        sky_shows(image, scene.time)
        and PLACE[scene.place](image, light)
        and ("moon" not in scene.extras or has_moon(image))
    )


def shuffled_share(pictures: Sequence[Image.Image], scenes: Sequence[Scene]) -> float:
    """The fraction of pairs that pass the check.

    A pair is an image and a scene of `scenes` that the image should not show.
    """
    pairs = [(p, s) for i, p in enumerate(pictures) for j, s in enumerate(scenes) if s != scenes[i]]
    return float(np.mean([shows(p, s) for p, s in pairs]))


def main(seeds: int = 2, precision: str = "fp8") -> None:
    """Generate an image for every prompt and seed; exit with code 1 if under 90 % pass."""
    from serve.engine.denoiser import Denoiser
    from serve.engine.precision import RECIPES
    from serve.engine.prompt_encoder import PromptEncoder

    encoder, denoiser = PromptEncoder(MODEL), Denoiser.load(MODEL, RECIPES[precision])
    pictures, scenes, wrong = [], [], []
    for seed in range(seeds):
        for prompt, scene in track(scene_prompts(), description=f"seed {seed}"):
            picture = generate(encoder, denoiser, prompt, seed)
            pictures.append(picture)
            scenes.append(scene)
            if not shows(picture, scene):
                wrong.append(f"{prompt} (seed {seed})")
    share = 1 - len(wrong) / len(pictures)
    for line in wrong:
        print("not shown by its image:", line)
    print(f"{share:.1%} of {len(pictures)} images show what was asked for")
    print(f"{shuffled_share(pictures, scenes):.1%} of the checks against other prompts pass")
    raise typer.Exit(share < PASS_SHARE)


def generate(
    encoder: Any, denoiser: Any, prompt: str, seed: int, size_px: int = 128
) -> Image.Image:
    """Generate one image with the demo's defaults, by the operations that the server uses."""
    from serve.engine.denoiser import to_pixels

    image = denoiser.begin(
        encoder.encode_prompts(["", prompt], TEXT_LENGTH),
        width=size_px,
        height=size_px,
        num_inference_steps=28,
        guidance_scale=3.0,
        seed=seed,
    )
    while not image.finished:
        denoiser.denoise_step([image])
    return Image.fromarray(to_pixels(denoiser.decode(image.latents)[0]))


if __name__ == "__main__":
    typer.run(main)
