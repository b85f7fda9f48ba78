"""SD3's noise schedule in closed form.

The schedule equals that of diffusers' `FlowMatchEulerDiscreteScheduler` with a static shift (Esser
et al. 2024, section 5.3.2) to within 6e-8. This schedule consists of plain numbers instead of a
scheduler object's state, so every row of a batch can be at its own step.

Pure: standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TRAIN_STEPS = 1000
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
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


def sigmas(num_inference_steps: int, shift: float = 3.0) -> tuple[float, ...]:
    """The `num_inference_steps` + 1 noise levels of a denoising run, from 1 down to 0.

    The transformer's timestep is 1000 · sigma. Raises `ValueError` for less than one step.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps {num_inference_steps} must be 1 or more")
    # diffusers shifts twice: first the range of the training levels, then the levels spaced in it.
    high, low = shifted(1.0, shift), shifted(1 / TRAIN_STEPS, shift)
    gaps = max(1, num_inference_steps - 1)
    spaced = (high + (low - high) * i / gaps for i in range(num_inference_steps))
    return (*(shifted(s, shift) for s in spaced), 0.0)
