"""`octet calibrate`: measure how few steps a model needs, and propose presets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..errors import did_you_mean
from ..settings.application import Settings
from ..settings.file import load_settings
from ..settings.models import Model
from .exit_codes import UsageError
from .plots import check_plot
from .terminal import AsJson, ConfigOption, console, counting

if TYPE_CHECKING:
    from ..quality.calibration import Measured, Way


def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model's id in --config.")],
    config: ConfigOption = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Prompts to measure with: the name of a suite that comes with Octet, or a file. "
            "Default: the model's suite, or else sd35."
        ),
    ] = None,
    images: Annotated[
        int, typer.Option(min=1, help="Images for each sampler and number of steps.")
    ] = 24,
    guidance: Annotated[
        list[float] | None,
        typer.Option(
            help="A further guidance scale to measure besides the model's; may be repeated. "
            "economy and low are chosen at the model's."
        ),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="Recipe of the measured images: fp32, bf16, fp16, fp8 or fp8-adaln8. Default: "
            "that of the converged images, fp32 on a CPU and 16 bit on a card."
        ),
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image.")] = 0,
    batch: Annotated[int, typer.Option(min=1, max=16, help="Images in a batch.")] = 4,
    out: Annotated[
        Path | None,
        typer.Option("--settings", help="File for the proposed presets, to copy into settings."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Image file for a plot of the trade-off.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how close few steps come to the exact images of MODEL, and propose presets.

    Generates on this machine, without a server. Every image is compared with its converged one,
    that of very many steps. Nothing in the settings changes before you copy the presets into them.
    """
    check_plot(plot)
    settings, served = _served(config, model)
    from ..engine.precision import RECIPES  # loads torch
    from ..quality import calibration
    from ..quality.local_model import Embeddings, LocalModel, device_here, sixteen_bit_here
    from ..quality.suites import image_requests, load_suite, suite_of

    exact = "fp32" if device_here() == "cpu" else sixteen_bit_here()
    recipe = recipe or exact
    if recipe not in RECIPES:
        raise UsageError(f"--recipe '{recipe}': {did_you_mean(recipe, RECIPES)}")
    default = calibration.Way(served.defaults.sampler, served.defaults.num_inference_steps)
    asked, usual = calibration.ways(default), served.defaults.guidance_scale
    scales = list(dict.fromkeys([usual, *(guidance or ())]))
    chosen = load_suite(suite or suite_of(model))
    defaults, limits = served.defaults.model_dump(), served.limits
    requests = image_requests(chosen.spread(images), model, defaults, limits, seed)
    embeddings = Embeddings(settings, served)
    models = {
        name: LocalModel.load(settings, served.source, name, embeddings)
        for name in dict.fromkeys((exact, recipe))
    }
    with counting(f"calibrating {model}", len(scales) * (1 + len(asked)) * images) as count:

        def generate(name: str) -> calibration.Generate:
            def run(asked: calibration.Requests) -> calibration.Images:
                for _, pixels in models[name].images(asked, batch):
                    count()
                    yield pixels

            return run

        both = generate(exact), generate(recipe)
        measured = list(calibration.measure(requests, *both, asked, scales))
    presets = calibration.proposed(measured, default, usual)
    size = f"{served.defaults.width}x{served.defaults.height}"
    about = f"{model}, {images} images of {size}, suite {chosen.name}, {recipe} against {exact}"
    if as_json:
        found = {
            "about": about,
            "presets": {name: way._asdict() for name, way in presets.items()},
            "measured": [one.as_json() for one in measured],
        }
        typer.echo(json.dumps(found, indent=1))
    else:
        Console().print(_table(measured, presets, default, about))
    if out:
        out.write_text(calibration.settings_fragment(measured, presets, default, about))
        console.print(f"{out}: presets to copy into the settings of {model}", highlight=False)
    if plot:
        calibration.plot(measured, presets, about, plot)
        console.print(f"{plot}: plotted", highlight=False)


def _served(config: Path | None, model: str) -> tuple[Settings, Model]:
    """The settings and the model in them. Raises `UsageError` if there is no such model."""
    if config is None:
        raise UsageError("name a settings file: octet calibrate MODEL --config octet.yaml")
    settings = load_settings(config)
    models = {one.id: one for one in settings.models}
    if model not in models:
        raise UsageError(f"'{model}': {did_you_mean(model, models)}")
    return settings, models[model]


def _table(measured: list[Measured], presets: dict[str, Way], default: Way, about: str) -> Table:
    scales = list(dict.fromkeys(one.guidance_scale for one in measured))
    names = {way: name for name, way in presets.items()} | {default: "default"}
    at = {(one.way, one.guidance_scale): one for one in measured}
    table = Table("sampler", title=about, title_justify="left", caption_justify="left")
    table.caption = "distances to the converged images: median / 5th percentile"
    table.add_column("steps", justify="right")
    table.add_column("fewer steps", justify="right")
    for scale in scales:
        table.add_column(f"guidance {scale:g}: SSIM", justify="right")
        table.add_column("PSNR dB", justify="right")
    table.add_column("preset")
    for way in dict.fromkeys(one.way for one in measured):
        cells = []
        for scale in scales:
            one = at[way, scale]
            cells.append(f"{one.ssim.median:.4f} / {one.ssim.p5:.4f}")
            cells.append(f"{one.psnr_db.median:.1f} / {one.psnr_db.p5:.1f}")
        fewer = f"{default.steps / way.steps:.2f} ×"
        table.add_row(way.sampler, str(way.steps), fewer, *cells, names.get(way, ""))
    return table
