"""The noise schedules of the samplers, as tables that are known before an image begins.

A schedule consists of plain numbers instead of a scheduler object's state, so every row of a batch
can be at its own step. It does not look at the image, so its cost is known at admission: one call
of the transformer for each step.

Euler's method takes the levels of diffusers' `FlowMatchEulerDiscreteScheduler` with a static shift
(Esser et al. 2024, section 5.3.2), to within 6e-8. DPM-Solver++ 2M (Lu et al. 2022) adds a
correction from the step before, and needs other levels: on Euler's, its last steps are too long.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from ..request import Sampler

TRAIN_STEPS = 1000
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
# Part of the first interval that the first step of DPM-Solver++ covers: see docs/decisions.md.
FIRST_PART = 1 / 3
# Fields that have no effect without `use_dynamic_shifting`.
UNUSED = {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"}


def shift_of(scheduler: Mapping[str, Any]) -> float:
    """The shift of a scheduler's configuration, as diffusers writes it.

    Raises `ValueError` if the configuration asks for another schedule than the one of this file.
    """
    kind = scheduler.get("_class_name", SCHEDULER)
    if kind != SCHEDULER:
        raise ValueError(f"_class_name '{kind}' must be {SCHEDULER}")
    for name, value in scheduler.items():
        if name.startswith("_") or name in UNUSED or name == "shift":
            continue
        if name == "num_train_timesteps":
            if value != TRAIN_STEPS:
                raise ValueError(f"num_train_timesteps {value} must be {TRAIN_STEPS}")
        elif value:
            raise ValueError(f"{name}: {value} is not supported")
    return float(scheduler["shift"])


def shifted(sigma: float, shift: float) -> float:
    """Shift a noise level (0 to 1) towards 1; the levels 0 and 1 stay.

    Larger images need a larger shift.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


class Schedule(NamedTuple):
    """The table of a denoising run of n steps.

    `levels`: the n + 1 noise levels, from 1 down to 0. The transformer's timestep is 1000 · level.
    `corrections`: n numbers, one for each step. A step goes from the level σ to σ' by

        x += (σ' − σ) · v + c · (D − D_before)

    with the velocity v, the correction c, and the predicted finished latents D = x − σ · v of this
    step and of the one before.
    """

    levels: tuple[float, ...]
    corrections: tuple[float, ...]


def schedule(sampler: Sampler, num_inference_steps: int, shift: float = 3.0) -> Schedule:
    """The schedule of a sampler. Raises `ValueError` for less than one step."""
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps {num_inference_steps} must be 1 or more")
    if sampler is Sampler.DPMPP_2M:
        levels = _divided_levels(num_inference_steps, shift)
        return Schedule(levels, _multistep_corrections(levels))
    return Schedule(_euler_levels(num_inference_steps, shift), (0.0,) * num_inference_steps)


def _euler_levels(steps: int, shift: float) -> tuple[float, ...]:
    # diffusers shifts twice: first the range of the training levels, then the levels spaced in it.
    high, low = shifted(1.0, shift), shifted(1 / TRAIN_STEPS, shift)
    gaps = max(1, steps - 1)
    spaced = (high + (low - high) * i / gaps for i in range(steps))
    return (*(shifted(s, shift) for s in spaced), 0.0)


def _divided_levels(steps: int, shift: float) -> tuple[float, ...]:
    """Shifted levels of equal distances, of which the first interval is divided in two.

    The first two steps have no correction, so they should be short.
    """
    if steps == 1:
        return 1.0, 0.0
    first, *others = (shifted(1 - i / (steps - 1), shift) for i in range(steps))
    return first, first - (first - others[0]) * FIRST_PART, *others


def _multistep_corrections(levels: tuple[float, ...]) -> tuple[float, ...]:
    """The corrections of DPM-Solver++ 2M for a flow-matching model.

    The first, the second and the last step get no correction: the first has no step before it, and
    in the logarithm of the signal-to-noise ratio the first and the last step are infinitely long.
    """
    ratios = [math.log((1 - level) / level) for level in levels[1:-1]]  # log(signal / noise)
    lengths = [b - a for a, b in pairwise(ratios)]  # of all but the ends
    found = [0.0] * (len(levels) - 1)
    for i, (before, length) in enumerate(pairwise(lengths), 2):
        found[i] = (1 - levels[i + 1] / levels[i]) * length / (2 * before)
    return tuple(found)
