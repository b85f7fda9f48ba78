"""`octet compare`: compare the pictures of two recipes, presets, checkpoints or pools."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import SettingsError, did_you_mean
from ..settings.file import load_settings
from .exit_codes import FAULT, UsageError
from .terminal import AsJson, ConfigOption, complain, console, counting, working

if TYPE_CHECKING:
    from .compare_sides import Served

RESULTS, REPORT, ROUTING, PICTURES = "results.json", "report.html", "routing.yaml", "pictures"
SIDE = (
    "A side on this machine, such as recipe=bf16 or recipe=fp8,quality=medium (also: sampler, "
    "steps, weights); one of a running server, such as url=http://HOST:PORT,precision=fp16; or a "
    "results.json of an earlier comparison."
)


def compare(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help=SIDE)],
    tested: Annotated[str, typer.Argument(metavar="TESTED", help="The same for the other side.")],
    config: ConfigOption = None,
    model: Annotated[
        str | None, typer.Option(help="Model to generate with; default: the first.")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Prompts: the name of a suite that comes with Octet, or a file. Default: the "
            "model's suite, or else sd35."
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="Images of each side; default: one for each prompt of the suite."),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT in pixels; default: the model's.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance scale; default: the model's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image.")] = 0,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for report, results and pictures; pictures that are there already are "
            "not generated again."
        ),
    ] = Path("comparison"),
    min_ssim: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least median of SSIM to pass.")
    ] = None,
    min_ssim_p5: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least 5th percentile of SSIM to pass.")
    ] = None,
    category_min: Annotated[
        list[str] | None,
        typer.Option(
            help="Least median of SSIM of a category to pass, as NAME=NUMBER; may be repeated."
        ),
    ] = None,
    rounding: Annotated[
        bool,
        typer.Option(help="Beside FP8 on this machine, also compare bf16 with fp32."),
    ] = True,
    clip: Annotated[
        Path | None, typer.Option(help="Folder of a CLIP model, for the CLIP score.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=16, help="Images in a batch.")] = 4,
    key: Annotated[
        str,
        typer.Option(
            envvar="OCTET_KEY",
            help="API key for servers, which charge the images to its tenant.",
            show_default=False,
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Generate the same prompts and seeds in two ways, and compare the pictures by category.

    Writes report.html and results.json. With a gate (--min-ssim, --min-ssim-p5, --category-min) the
    exit code is 1 if TESTED does not pass; routing.yaml then holds rules that send the categories
    which failed to the 16-bit pool. An interrupted comparison goes on where it was.
    """
    categories = _minima(category_min or [])
    with working("loading"):
        from ..quality.comparison import Comparison, Gate, Shot
        from ..quality.local_model import device_name
        from ..quality.optional_metrics import OptionalMetrics
        from ..quality.pictures import PictureFolder
        from ..quality.report import report
        from ..quality.suites import image_requests, load_suite, suite_of
        from .compare_sides import Sides, fields_of
    gate = Gate(min_ssim, min_ssim_p5, categories)
    if reference.endswith(".json") and tested.endswith(".json"):
        before, after = _results(reference), _results(tested)
        _check_categories(categories, after["categories"])
        _compare_results(before, after, as_json)
        _end(gate.failures(after["images"]))
        return
    fields = [fields_of(text) for text in (reference, tested)]
    served = _served(fields, config, model, key)
    chosen = load_suite(suite or suite_of(served.id))
    prompts = chosen.spread(images or len(chosen.prompts))
    _check_categories(categories, {one.category for one in prompts})
    defaults = dict(served.defaults)
    if size:
        defaults["width"], defaults["height"] = _size(size)
    if guidance is not None:
        defaults["guidance_scale"] = guidance
    requests = image_requests(prompts, served.id, defaults, served.limits, seed)
    shots = [Shot(one.category, request) for one, request in zip(prompts, requests, strict=True)]
    sides = Sides(served, key, batch)
    a, b = (sides.side(one) for one in fields)
    exact: Any = "--no-rounding was given"
    if rounding:
        found_exact = sides.rounding(fields[1]) or sides.rounding(fields[0])
        exact = found_exact or "no side on this machine is in FP8"
    comparison = Comparison(a, b, shots, PictureFolder(out / PICTURES), exact)
    with counting("images", comparison.missing) as count:
        comparison.generate(count)
    with working("comparing"):
        found = comparison.results(gate, OptionalMetrics(clip))
        found["about"] = {
            "model": served.id,
            "suite": chosen.name,
            "size": requests[0].size,
            "device": device_name() if served.settings else "on servers",
            "version": version("octet-serve"),
            "date": time.strftime("%Y-%m-%d"),
        }
        text = json.dumps(found, indent=1, ensure_ascii=False)
        (out / RESULTS).write_text(text, "utf-8")
        (out / REPORT).write_text(report(found, comparison.pictures), "utf-8")
    if as_json:
        typer.echo(text)
    else:
        Console().print(_table(found))
        _say(f"{out / REPORT}: the report")
    (out / ROUTING).unlink(missing_ok=True)
    failing = gate.failing_categories(found["images"])
    rules = {name: chosen.rules[name] for name in failing if name in chosen.rules}
    if rules and _is_fp8(fields[1]) and not _is_fp8(fields[0]):
        (out / ROUTING).write_text(_routing(rules), "utf-8")
        _say(
            f"{out / ROUTING}: rules for the settings of {served.id}, which send prompts of "
            f"{', '.join(rules)} to the 16-bit pool"
        )
    _end(found["gate"]["failures"])


def _end(failures: list[str]) -> None:
    """End the command, with an error if the gate has failed."""
    for failure in failures:
        complain(failure)
    if failures:
        raise typer.Exit(FAULT)


def _check_categories(given: Iterable[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise UsageError(f"--category-min {name}: {did_you_mean(name, sorted(known))}")


def _is_fp8(side: Mapping[str, str]) -> bool:
    """Return whether a side is in FP8, here or on a server."""
    return (side.get("recipe") or side.get("precision", "")).startswith("fp8")


def _say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _served(
    fields: list[dict[str, str]], config: Path | None, model: str | None, key: str
) -> Served:
    """The model to compare: of the settings, or without them of a server that a side names."""
    from .compare_sides import Served, served_by

    if config:
        settings = load_settings(config)
        models = {one.id: one for one in settings.models}
        name = model or next(iter(models))
        if name not in models:
            raise UsageError(f"--model '{name}': {did_you_mean(name, models)}")
        one = models[name]
        return Served(name, one.defaults.model_dump(), one.limits, settings, one)
    urls = [side["url"] for side in fields if "url" in side]
    if len(urls) < len(fields):
        raise UsageError("a side on this machine needs the settings of its model: --config FILE")
    return served_by(urls[0], key, model)


def _minima(given: list[str]) -> dict[str, float]:
    found = {}
    for text in given:
        name, _, number = text.rpartition("=")
        try:
            found[name] = float(number)
            if not name or not 0 <= found[name] <= 1:
                raise ValueError
        except ValueError:
            raise UsageError(
                f"--category-min '{text}': expected NAME=NUMBER with a number from 0 to 1"
            ) from None
    return found


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise UsageError(f"--size '{text}': expected WIDTHxHEIGHT in pixels")
    return int(width), int(height)


def _routing(rules: Mapping[str, str]) -> str:
    lines = ["# Categories whose median SSIM was too low in FP8.", "routing:"]
    for number, (category, rule) in enumerate(rules.items(), 1):
        words = re.findall(r"[a-z0-9]+", category.lower())
        name = "-".join(words)[:32].strip("-")
        if not name[:1].isalpha():
            name = f"rule-{number}"
        lines.append(f"  - {{ name: {name}, prompt: {json.dumps(rule, ensure_ascii=False)} }}")
    return "\n".join(lines) + "\n"


def _table(found: Mapping[str, Any]) -> Table:
    title = f"{found['tested']['label']} compared with {found['reference']['label']}"
    table = Table("category", title=title, title_justify="left", caption_justify="left")
    table.caption = "median / 5th percentile"
    exact = found["rounding"] if isinstance(found["rounding"], dict) else None
    for name in ("images", "SSIM", "PSNR dB", *(["SSIM of bf16 to fp32"] if exact else [])):
        table.add_column(name, justify="right")
    for name, one in {"all": found["all"], **found["categories"]}.items():
        cells = [str(one["images"]), _two(one["ssim"], 4), _two(one["psnr_db"], 1)]
        if exact:
            beside = exact["all"] if name == "all" else exact["categories"][name]
            cells.append(_two(beside["ssim"], 4))
        table.add_row(name, *cells)
    return table


def _two(spread: Mapping[str, float], digits: int) -> str:
    return f"{spread['median']:.{digits}f} / {spread['p5']:.{digits}f}"


def _results(file: str) -> dict[str, Any]:
    """The results of an earlier comparison. Raises `SettingsError` if the file holds none."""
    try:
        found: dict[str, Any] = json.loads(Path(file).read_text("utf-8"))
        found["all"]["ssim"]["median"], found["categories"], found["images"][0]["ssim"]
    except (ValueError, KeyError, TypeError, IndexError):
        raise SettingsError(f"{file} holds no results of octet compare") from None
    return found


def _compare_results(before: dict[str, Any], after: dict[str, Any], as_json: bool) -> None:
    from ..quality.comparison import changes

    found = changes(before, after)
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    title = f"{before['tested']['label']}, then {after['tested']['label']}"
    table = Table("category", title=title, title_justify="left", caption_justify="left")
    table.caption = "SSIM: median / 5th percentile"
    for name in ("before", "after", "change of the median"):
        table.add_column(name, justify="right")
    for name, one in found.items():
        change = one["after"]["median"] - one["before"]["median"]
        table.add_row(name, _two(one["before"], 4), _two(one["after"], 4), f"{change:+.4f}")
    Console().print(table)
