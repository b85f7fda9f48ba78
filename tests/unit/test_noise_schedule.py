"""The noise levels of an image's steps."""

import pytest

from serve.engine.noise_schedule import shifted, sigmas


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 28, 50])
def test_sigmas_equal_the_diffusers_schedule(steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    oracle = FlowMatchEulerDiscreteScheduler(shift=shift)
    oracle.set_timesteps(steps)
    assert sigmas(steps, shift) == pytest.approx(oracle.sigmas.tolist(), abs=2e-7)


def test_sigmas_fall_from_one_to_zero() -> None:
    levels = sigmas(28)
    assert levels[0] == 1.0
    assert levels[-1] == 0.0
    assert list(levels) == sorted(levels, reverse=True)


def test_shift_keeps_the_ends() -> None:
    assert shifted(0.0, 3.0) == 0.0
    assert shifted(1.0, 3.0) == 1.0
    assert shifted(0.5, 3.0) == pytest.approx(0.75)


def test_no_steps_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        sigmas(0)
