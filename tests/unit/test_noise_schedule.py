"""The noise levels of an image's steps."""

import pytest

from serve.engine.noise_schedule import shift_of, shifted, sigmas


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


SD35 = {  # the scheduler of Stability's repositories
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.29.0.dev0",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}


def test_the_shift_is_that_of_the_checkpoint() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    assert shift_of(SD35) == 3.0
    defaults = dict(FlowMatchEulerDiscreteScheduler(shift=2.0).config)
    assert shift_of(defaults) == 2.0


@pytest.mark.parametrize(
    "changed",
    [
        {"use_dynamic_shifting": True},
        {"use_karras_sigmas": True},
        {"shift_terminal": 0.02},
        {"num_train_timesteps": 500},
        {"a_later_invention": "x"},
        {"_class_name": "EulerDiscreteScheduler"},
    ],
)
def test_another_schedule_is_refused(changed: dict[str, object]) -> None:
    (name,) = changed
    with pytest.raises(ValueError, match=name):
        shift_of({**SD35, **changed})


def test_no_steps_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        sigmas(0)
