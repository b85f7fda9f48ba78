"""Calibration: find the fewest steps of each sampler that stay as close to the exact image.

An image is the solution of a differential equation; more steps come closer to it. The *converged*
image of a prompt and a seed is that of `REFERENCE_STEPS` steps of DPM-Solver++ 2M, in the most
exact recipe. Each *way*, a sampler with a number of steps, is measured by the distances of its
images to the converged ones, at several guidance scales. `proposed` chooses presets by rules.

A distance says nothing about beauty, and it holds for one model and the prompts of one suite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..errors import SettingsError
from ..request import ImageRequest, Sampler
from .metrics import Pixels, Spread, distance

REFERENCE_STEPS = 100
# The steps to measure of a model whose default has 28; of other models, the same parts of theirs.
STEPS = {
    Sampler.EULER: (24, 20, 16, 14, 12, 10, 8),
    Sampler.DPMPP_2M: (20, 18, 16, 14, 12, 10, 8, 7, 6),
}
USUAL_STEPS = 28
FEWEST_STEPS = 8  # of a default; SD3.5 Turbo has 4, and is trained for them
ECONOMY_LOSS_DB = 1.0
DRAFT_SPEED_UP = 3.5


class Way(NamedTuple):
    """A sampler with a number of steps."""

    sampler: Sampler
    steps: int

    def of(self, request: ImageRequest) -> ImageRequest:
        """The request, generated in this way."""
        return replace(request, sampler=self.sampler, num_inference_steps=self.steps)


CONVERGED = Way(Sampler.DPMPP_2M, REFERENCE_STEPS)


@dataclass(frozen=True, slots=True)
class Measured:
    """The distances of a way's images to the converged ones, at one guidance scale."""

    way: Way
    guidance_scale: float
    ssim: Spread
    psnr_db: Spread

    def is_near(self, other: Measured, loss_db: float) -> bool:
        """Return whether median and 5th percentile of PSNR are at most `loss_db` lower."""
        mine, others = self.psnr_db, other.psnr_db
        return mine.median >= others.median - loss_db and mine.p5 >= others.p5 - loss_db

    def is_no_worse(self, other: Measured) -> bool:
        """Return whether median and 5th percentile of SSIM and PSNR are at least the other's."""
        alike = self.ssim.median >= other.ssim.median and self.ssim.p5 >= other.ssim.p5
        return alike and self.is_near(other, 0.0)

    def as_json(self) -> dict[str, Any]:
        return {
            "sampler": self.way.sampler.value,
            "num_inference_steps": self.way.steps,
            "guidance_scale": self.guidance_scale,
            "ssim": self.ssim._asdict(),
            "psnr_db": self.psnr_db._asdict(),
        }


def ways(default: Way) -> list[Way]:
    """The ways to measure: the default, then cheaper ones of each sampler, dearest first.

    Raises `SettingsError` for a default with too few steps to save any.
    """
    if default.steps < FEWEST_STEPS:
        raise SettingsError(
            f"calibration needs a default of at least {FEWEST_STEPS} steps, and this model has "
            f"{default.steps}: a model that is distilled to few steps is trained for just these"
        )
    found = {
        Way(sampler, round(n * default.steps / USUAL_STEPS))
        for sampler, steps in STEPS.items()
        for n in steps
    }
    cheaper = [way for way in found if way.steps < default.steps]
    return [default, *sorted(cheaper, key=lambda way: (-way.steps, way.sampler))]


Requests = Sequence[ImageRequest]
Images = Iterable[Pixels]
Generate = Callable[[Requests], Images]


def measure(
    requests: Requests,
    exact: Generate,
    tested: Generate,
    asked: Sequence[Way],
    guidance_scales: Sequence[float],
) -> Iterator[Measured]:
    """Measure ways at each guidance scale, and yield each when it is done.

    `requests`: at least one; their samplers, steps and guidance are replaced. `exact` generates the
    converged images, and `tested` those of the ways.
    """
    for scale in guidance_scales:
        guided = [replace(request, guidance_scale=scale) for request in requests]
        converged = list(exact([CONVERGED.of(request) for request in guided]))
        for way in asked:
            images = tested([way.of(request) for request in guided])
            found = [distance(*pair) for pair in zip(converged, images, strict=True)]
            yield Measured(
                way,
                scale,
                Spread.of([one.ssim for one in found]),
                Spread.of([one.psnr_db for one in found]),
            )


def proposed(measured: Sequence[Measured], default: Way, usual: float) -> dict[str, Way]:
    """The presets that the measurements support, by name, dearest first.

    - `medium`: the fewest steps that are no worse than the default in median and 5th percentile of
      SSIM and PSNR, at every guidance scale.
    - `economy`: the fewest steps whose PSNR is at most `ECONOMY_LOSS_DB` lower at the guidance
      scale `usual`. At others it may lose more.
    - `low`: a draft: the nearest at the guidance scale `usual` of all that are at least
      `DRAFT_SPEED_UP` times cheaper.

    Leaves out a name that has no such way, or that is no cheaper than the one before.
    """
    at = {(one.way, one.guidance_scale): one for one in measured}
    scales = {scale for _, scale in at}
    others = {way for way, _ in at if way != default}

    def psnr_db(way: Way) -> float:
        return at[way, usual].psnr_db.median

    def fewest(good: Callable[[Way], bool]) -> Way | None:
        return min(filter(good, others), key=lambda way: (way.steps, -psnr_db(way)), default=None)

    medium = fewest(lambda way: all(at[way, g].is_no_worse(at[default, g]) for g in scales))
    economy = fewest(lambda way: at[way, usual].is_near(at[default, usual], ECONOMY_LOSS_DB))
    drafts = [way for way in others if way.steps * DRAFT_SPEED_UP <= default.steps]
    low = max(drafts, key=psnr_db, default=None)
    found: dict[str, Way] = {}
    for name, chosen in (("medium", medium), ("economy", economy), ("low", low)):
        if chosen and all(chosen.steps < way.steps for way in found.values()):
            found[name] = chosen
    return found


def settings_fragment(
    measured: Sequence[Measured], presets: dict[str, Way], default: Way, about: str
) -> str:
    """The presets as YAML for a model's settings, with what was measured in comments.

    `about`: one line that says what was measured on.
    """
    lines = [
        f"# {about}",
        "# Distances to the converged image, median / 5th percentile.",
        "presets:" if presets else "presets: {} # no cheaper way was good enough",
    ]
    for name, way in presets.items():
        cost = f"{default.steps / way.steps:.2f} times fewer steps than the default"
        fields = f"sampler: {way.sampler}, num_inference_steps: {way.steps}"
        lines.append(f"  {name}: {{ {fields} }} # {cost}")
        lines += [f"    # {line}" for line in _numbers(measured, way)]
    lines += [f"# The default, {default.sampler} with {default.steps} steps:"]
    lines += [f"    # {line}" for line in _numbers(measured, default)]
    return "\n".join(lines) + "\n"


def _numbers(measured: Sequence[Measured], way: Way) -> list[str]:
    return [
        f"guidance {one.guidance_scale:g}: SSIM {one.ssim.median:.4f} / {one.ssim.p5:.4f}, "
        f"PSNR {one.psnr_db.median:.1f} / {one.psnr_db.p5:.1f} dB"
        for one in measured
        if one.way == way
    ]


def plot(measured: Sequence[Measured], presets: dict[str, Way], title: str, out: Any) -> None:
    """Plot PSNR by steps, one panel for each guidance scale, into the image file `out`.

    Raises `ImportError` if matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    scales = list(dict.fromkeys(one.guidance_scale for one in measured))
    figure, panels = pyplot.subplots(
        1,
        len(scales),
        figsize=(5 * len(scales), 4),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axes, scale in zip(panels[0], scales, strict=True):
        for sampler, colour in zip(Sampler, ("#8d99ae", "#1f6f8b"), strict=True):
            here = [
                one
                for one in sorted(measured, key=lambda one: one.way.steps)
                if one.guidance_scale == scale and one.way.sampler is sampler
            ]
            steps = [one.way.steps for one in here]
            axes.plot(
                steps, [one.psnr_db.median for one in here], "o-", color=colour, label=sampler
            )
            axes.plot(steps, [one.psnr_db.p5 for one in here], ":", color=colour)
            for one in here:
                for name, way in presets.items():
                    if way == one.way:
                        at = one.way.steps, one.psnr_db.median
                        axes.annotate(
                            name, at, xytext=(0, 8), textcoords="offset points", ha="center"
                        )
        axes.set_title(f"guidance {scale:g}")
        axes.set_xlabel("steps: calls of the transformer")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("PSNR to the converged image, dB\n(dotted: 5th percentile)")
    panels[0][0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
