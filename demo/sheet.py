"""The sample sheet at the top of the README: every place at every hour, generated in FP8.

python -m demo.sheet
"""

from __future__ import annotations

from pathlib import Path

import typer
from PIL import Image
from rich.progress import track

from .check import MODEL, generate, scene_prompts

SHEET = Path(__file__).parent.parent / "docs" / "samples.png"
HOURS, CELL_PX, GAP_PX = 4, 128, 4


def main(out: Path = SHEET, seed: int = 1, model: Path = MODEL) -> None:
    """Write a sheet with one column per place and one row per hour; all images have one seed."""
    from serve.engine.denoiser import Denoiser
    from serve.engine.precision import RECIPES
    from serve.engine.prompt_encoder import PromptEncoder

    encoder, denoiser = PromptEncoder(model), Denoiser.load(model, RECIPES["fp8"])
    prompts = [p for p, scene in scene_prompts() if not scene.extras][: 7 * HOURS]
    pitch = CELL_PX + GAP_PX
    sheet = Image.new("RGB", (7 * pitch - GAP_PX, HOURS * pitch - GAP_PX), "white")
    for i, prompt in enumerate(track(prompts, description="sheet")):
        moon = ", full moon and stars" if "night" in prompt else ""
        picture = generate(encoder, denoiser, prompt + moon, seed)
        sheet.paste(picture, (i // HOURS * pitch, i % HOURS * pitch))
    out.parent.mkdir(exist_ok=True)
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    typer.run(main)
