"""SD3's noise schedule in closed form.

Equals diffusers' `FlowMatchEulerDiscreteScheduler` with a static shift (Esser et al. 2024,
section 5.3.2) to 6e-8; plain numbers, so that every row of a batch can be at its own step.

Pure: standard library only.
"""

from __future__ import annotations

TRAIN_STEPS = 1000


def shifted(sigma: float, shift: float) -> float:
    """Move a noise level towards 1, as larger images need; 0 and 1 stay."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigmas(num_inference_steps: int, shift: float = 3.0) -> tuple[float, ...]:
    """Noise levels from 1 down to 0, `num_inference_steps` + 1 of them.

    The timestep that the transformer is given is 1000 · sigma.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps {num_inference_steps} must be 1 or more")
    # diffusers shifts twice: once when it lays out the training levels, once over their linspace.
    high, low = shifted(1.0, shift), shifted(1 / TRAIN_STEPS, shift)
    gaps = max(1, num_inference_steps - 1)
    spaced = (high + (low - high) * i / gaps for i in range(num_inference_steps))
    return (*(shifted(s, shift) for s in spaced), 0.0)
