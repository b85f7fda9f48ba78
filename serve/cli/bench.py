"""`octet bench`: put load on a running server and report what its clients experience."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import re
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..api.wire.paths import EDITS, GENERATIONS
from ..errors import SettingsError
from .exit_codes import FAULT, INTERRUPTED, UsageError
from .load_client import LoadAnswer, LoadClient, TimedRequest, percentile, poisson
from .operator_client import server_root
from .plots import check_plot
from .terminal import complain, console

SHAPE = re.compile(r"(?:(\d+x\d+)?(?::(\d+))?)(?:=([\d.]+))?")
PROMPTS = ("the sea at dawn", "night over the mountains", "dunes at noon", "a forest in the fog")
QUANTILES = 50, 90, 99
CONNECT_S = 5.0
Body = dict[str, Any]


def bench(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Address of the server: http://HOST:PORT.")
    ],
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=10_000,
            help="Requests per second, at random times (a Poisson process). Default: 1.",
        ),
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10_000,
            help="Number of clients that each keep one request open, instead of --rate.",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, max=86_400, help="Seconds for which requests are sent.")
    ] = 60.0,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            help="Requests to send, as SIZE:STEPS=WEIGHT, for example 512x512:28=3. Each part may "
            "be left out. Repeat the option for several kinds. Default: the model's own size and "
            "steps."
        ),
    ] = None,
    tenant: Annotated[
        list[str] | None,
        typer.Option(
            help="A tenant and its API key, as NAME=KEY. Repeat the option for several tenants; "
            "each sends an equal part of the load."
        ),
    ] = None,
    key: Annotated[
        str,
        typer.Option(
            envvar="OCTET_KEY", help="API key to use without --tenant.", show_default=False
        ),
    ] = "",
    model: Annotated[
        str | None, typer.Option(help="Model to request; default: the server's first.")
    ] = None,
    repeated: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of the requests that repeat one of twenty prompts with its seed.",
        ),
    ] = 0.0,
    edits: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of the requests that edit a picture; half of these have a mask. Needs a "
            "size in each --mix.",
        ),
    ] = 0.0,
    slo_s: Annotated[
        float, typer.Option(min=0.001, help="Seconds within which an answer is in time.")
    ] = 30.0,
    seed: Annotated[
        int, typer.Option(help="Seed of the random load; the same seed sends the same requests.")
    ] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Image file for a plot of latency and answers over time.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, not as a table.")
    ] = False,
) -> None:
    """Put load on a server and report latency, answers in time, and refusals.

    Ctrl-C ends the load early and reports what there is. The exit code is 1 if any request got no
    answer or one with status 500, or if none was answered with images; after Ctrl-C it is 130.
    """
    check_plot(plot)
    if clients and rate:
        raise UsageError("--rate and --clients: give one of them")
    rate = rate or 1.0
    if not re.match(r"https?://[^/]", url):
        raise UsageError(f"'{url}' is no address of a server: expected http://HOST:PORT")
    keys = _tenants(tenant or []) or {"bench": key}
    shapes = [_shape(text) for text in mix or [""]]
    bodies = _bodies(shapes, model, repeated, seed)
    if edits:
        bodies = _with_edits(bodies, shapes, edits, seed)
    _check_listening(url)
    per_tenant = rate / len(keys)
    requests = [
        request._replace(body=bodies())
        for name in keys
        for request in poisson(str(seed), name, per_tenant, seconds, {})
    ]
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("answers", total=None if clients else len(requests))
        server = server_root(url)
        load = LoadClient(
            server + GENERATIONS, keys, lambda _: progress.advance(task), server + EDITS
        )
        interrupted = False
        try:
            if clients:
                per_client = Counter(list(keys)[i % len(keys)] for i in range(clients))
                asyncio.run(load.closed_loop(per_client, bodies, seconds))
            else:
                in_order = sorted(requests, key=lambda request: request.at)
                asyncio.run(load.open_loop(in_order))
        except KeyboardInterrupt:
            interrupted = True
    answers = load.answers
    if not answers:
        why = "it was interrupted" if interrupted else f"--seconds {seconds:g} is too short"
        raise SettingsError(f"no request was answered: {why}")
    found = report(answers, slo_s)
    typer.echo(json.dumps(found, indent=1)) if as_json else Console().print(_table(found))
    _explain_refusals(answers)
    if plot:
        _plot(answers, plot, f"{server}: {len(answers)} requests")
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    served = any(answer.status == 200 for answer in answers)
    if not served or any(answer.status in (0, 500) for answer in answers):
        raise typer.Exit(FAULT)


def _check_listening(url: str) -> None:
    """Raise `SettingsError` if nothing listens at the address, before any load is sent."""
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((str(parts.hostname), port), CONNECT_S).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"{url}: {reason}: is the server running?") from None


def _explain_refusals(answers: Sequence[LoadAnswer]) -> None:
    """Print the number and the first message of each kind of answer that has no images."""
    counts = Counter(answer.code for answer in answers if answer.code)
    for code, count in counts.most_common():
        message = next(answer.message for answer in answers if answer.code == code)
        complain(f"{count} × {code}: {message}")


def report(answers: Sequence[LoadAnswer], slo_s: float) -> dict[str, Any]:
    """Report on all answers, and on those of each tenant, each request shape and each endpoint.

    The groups are `all`, `tenant NAME`, `shape SIZE:STEPS`, `endpoint edits` and `endpoint
    generations`. The groups of a kind are left out if there is only one of them.
    Latencies are in seconds and count only requests that were answered with images. `slo_s`: the
    latency up to which an answer counts as in time.
    """
    groups: dict[str, list[LoadAnswer]] = {"all": list(answers)}
    kinds: tuple[tuple[str, Callable[[TimedRequest], str]], ...] = (
        ("tenant", lambda request: request.tenant),
        ("shape", _shape_name),
        ("endpoint", lambda request: "edits" if "images" in request.body else "generations"),
    )
    for kind, name_of in kinds:
        names = sorted({name_of(answer.request) for answer in answers})
        for name in names if len(names) > 1 else ():
            groups[f"{kind} {name}"] = [a for a in answers if name_of(a.request) == name]
    lasted_s = max(answer.done_at for answer in answers)
    return {name: _row(members, slo_s, lasted_s) for name, members in groups.items()}


def _row(answers: Sequence[LoadAnswer], slo_s: float, lasted_s: float) -> dict[str, Any]:
    served = [answer.latency_s for answer in answers if answer.status == 200]
    in_time = sum(latency_s <= slo_s for latency_s in served)
    return {
        "requests": len(answers),
        "ok": len(served),
        "in_time": in_time,
        "in_time_per_s": round(in_time / lasted_s, 3),
        "codes": dict(Counter(a.code for a in answers if a.code)),
        "cache": dict(Counter(a.cache for a in answers if a.cache)),
        **{f"p{p}_s": round(percentile(served, p / 100), 4) if served else None for p in QUANTILES},
    }


def _table(found: dict[str, Any]) -> Table:
    table = Table()
    for name in ("", "requests", "ok", "in time", "in time/s", "p50 s", "p90 s", "p99 s"):
        table.add_column(name, justify="right" if name else "left")
    for name, row in found.items():
        quantiles = (row[f"p{p}_s"] for p in QUANTILES)
        table.add_row(
            name,
            *(str(row[of]) for of in ("requests", "ok", "in_time", "in_time_per_s")),
            *("–" if value is None else f"{value:.3f}" for value in quantiles),
        )
    if cache := found["all"]["cache"]:
        table.caption = "result cache: " + ", ".join(f"{use} {n}" for use, n in cache.items())
    return table


def _plot(answers: Sequence[LoadAnswer], out: Path, title: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(9, 6), sharex=True, layout="constrained"
    )
    for name in sorted({answer.request.tenant for answer in answers}):
        served = [a for a in answers if a.status == 200 and a.request.tenant == name]
        above.plot(
            [a.request.at for a in served],
            [a.latency_s for a in served],
            ".",
            markersize=3,
            label=name,
        )
    figure.suptitle(title)
    above.set_ylim(bottom=0)
    above.set_ylabel("latency in s,\nby the time of the request")
    above.legend(fontsize=7)
    kinds = sorted({a.code or "ok" for a in answers})
    for kind in kinds:
        times = sorted(a.done_at for a in answers if (a.code or "ok") == kind)
        below.step(times, range(1, len(times) + 1), where="post", label=kind)
    below.set_ylabel("answers so far")
    below.set_xlabel("seconds")
    below.legend(fontsize=7)
    try:
        figure.savefig(out, dpi=100)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--plot {out}: {error}") from None
    finally:
        pyplot.close(figure)
    console.print(f"{out}: plotted", highlight=False)


def _tenants(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in given:
        name, sign, key = text.partition("=")
        if not (name and sign and key):
            raise UsageError(f"--tenant '{name}': expected NAME=KEY")
        found[name] = key
    return found


def _shape(text: str) -> tuple[Body, float]:
    """Parse SIZE:STEPS=WEIGHT into the fields of a request body and their weight.

    Raises `SettingsError` if the text has another form.
    """
    match = SHAPE.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        weight = float(match[3] or 1)
    except ValueError:
        raise UsageError(
            f"--mix '{text}': expected SIZE:STEPS=WEIGHT, such as 512x512:28=3"
        ) from None
    fields: Body = {}
    if match[1]:
        fields["size"] = match[1]
    if match[2]:
        fields["num_inference_steps"] = int(match[2])
    return fields, weight


def _bodies(
    shapes: Sequence[tuple[Body, float]], model: str | None, repeated: float, seed: int
) -> Callable[[], Body]:
    """A function that returns the next request body; the same `seed` gives the same bodies.

    `repeated`: the share of bodies that can be repeats, because they take their prompt and the
    seed of their image from twenty fixed pairs. Raises `SettingsError` if all weights are 0.
    """
    rng = random.Random(seed)  # noqa: S311 - no secrets
    weights = [weight for _, weight in shapes]
    if not sum(weights):
        raise UsageError("--mix: all weights are 0; at least one must be more")
    named: Mapping[str, str] = {"model": model} if model else {}

    def body() -> Body:
        again = rng.random() < repeated
        number = rng.randrange(20)
        fields, _ = rng.choices(shapes, weights)[0]
        prompt = PROMPTS[number % len(PROMPTS)]
        return {**named, **fields, "prompt": prompt, **({"seed": number} if again else {})}

    return body


def _with_edits(
    bodies: Callable[[], Body], shapes: Sequence[tuple[Body, float]], edits: float, seed: int
) -> Callable[[], Body]:
    """A function that returns the next body of `bodies`, sometimes turned into that of an edit.

    `edits`: the share of edits. Raises `SettingsError` if a shape has no size, because then the
    answers of edits and generations would have different sizes.
    """
    if any("size" not in fields for fields, _ in shapes):
        raise UsageError("--edits: each --mix must name a size, such as 512x512:28")
    rng = random.Random(f"edits {seed}")  # noqa: S311 - no secrets
    pictures = {fields["size"]: _picture(fields["size"]) for fields, _ in shapes}

    def body() -> Body:
        found = bodies()
        if rng.random() >= edits:
            return found
        picture, mask = pictures[found["size"]]
        masked = {"mask": {"image_url": mask}} if rng.random() < 0.5 else {}
        return {**found, "images": [{"image_url": picture}], **masked}

    return body


def _picture(size: str) -> tuple[str, str]:
    """The data: URLs of a picture of this size, and of a mask that is transparent above."""
    width, height = map(int, size.split("x"))
    gradient = Image.linear_gradient("L").resize((width, height))
    picture = Image.merge("RGB", (gradient, ImageOps.mirror(gradient), ImageOps.flip(gradient)))
    mask = Image.new("RGBA", (width, height), "black")
    mask.paste((0, 0, 0, 0), (0, 0, width, height // 2))
    return _data_url(picture), _data_url(mask)


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _shape_name(request: TimedRequest) -> str:
    """The request's size and steps, such as `512x512:28`; `default` if it names neither."""
    size, steps = request.body.get("size"), request.body.get("num_inference_steps")
    return ":".join(str(part) for part in (size or "", steps) if part is not None) or "default"
