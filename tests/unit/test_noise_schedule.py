"""The noise levels and corrections of an image's steps."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.engine.noise_schedule import schedule, shift_of, shifted
from serve.request import Sampler

EULER, DPMPP_2M = Sampler.EULER, Sampler.DPMPP_2M


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 28, 50])
def test_eulers_levels_equal_the_diffusers_schedule(steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    oracle = FlowMatchEulerDiscreteScheduler(shift=shift)
    oracle.set_timesteps(steps)
    levels, corrections = schedule(EULER, steps, shift)
    assert levels == pytest.approx(oracle.sigmas.tolist(), abs=2e-7)
    assert corrections == (0.0,) * steps


@pytest.mark.parametrize("sampler", Sampler)
@pytest.mark.parametrize("steps", [1, 2, 3, 28])
def test_levels_fall_from_one_to_zero(sampler: Sampler, steps: int) -> None:
    levels, corrections = schedule(sampler, steps)
    assert levels[0] == 1.0
    assert levels[-1] == 0.0
    assert list(levels) == sorted(set(levels), reverse=True)
    assert len(levels) == len(corrections) + 1 == steps + 1


def test_the_table_of_dpm_solver_with_eight_steps() -> None:
    """Worked out by hand: seven equal intervals, shifted by 3, and the first one divided."""
    levels, corrections = schedule(DPMPP_2M, 8)
    expected = [1, 0.9825, 18 / 19, 15 / 17, 4 / 5, 9 / 13, 6 / 11, 1 / 3, 0]
    assert levels == pytest.approx(expected, abs=5e-5)
    assert corrections[:2] == (0, 0)
    assert corrections[-1] == 0
    # From 4/5 to 9/13: the logarithms of signal to noise are those of 2/15, 1/4 and 4/9.
    assert corrections[4] == pytest.approx(0.0616, abs=5e-5)


# The points of this test move by the exact velocity of a mixture of two normal distributions: no
# part of Octet computes it.
MEANS, WIDTH = np.array([-1.0, 1.0]), 1.0


def velocity(x: NDArray[np.float64], level: float) -> NDArray[np.float64]:
    """E(noise − data | (1 − level) · data + level · noise = x), for points x (n,)."""
    variance = ((1 - level) * WIDTH) ** 2 + level**2
    off = x[:, None] - (1 - level) * MEANS
    nearness = np.exp(-(off**2) / (2 * variance))
    data = MEANS + (1 - level) * WIDTH**2 / variance * off
    noise = level / variance * off
    weights = nearness / nearness.sum(axis=1, keepdims=True)
    found: NDArray[np.float64] = (weights * (noise - data)).sum(axis=1)
    return found


def runge_kutta(x: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
    """Integrate by the classical method of fourth order, from level 1 to 0."""
    h = -1 / steps
    for i in range(steps):
        level = 1 + i * h
        k1 = velocity(x, level)
        k2 = velocity(x + h / 2 * k1, level + h / 2)
        k3 = velocity(x + h / 2 * k2, level + h / 2)
        k4 = velocity(x + h * k3, level + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def sampled(x: NDArray[np.float64], sampler: Sampler, steps: int) -> NDArray[np.float64]:
    levels, corrections = schedule(sampler, steps)
    before = np.zeros_like(x)
    for level, following, c in zip(levels, levels[1:], corrections, strict=False):
        v = velocity(x, level)
        data = x - level * v
        x = x + (following - level) * v + c * (data - before)
        before = data
    return x


@pytest.mark.parametrize(("sampler", "least", "most"), [(EULER, 0.95, 1.05), (DPMPP_2M, 1.7, 2.1)])
def test_the_error_falls_with_the_order_of_the_solver(
    sampler: Sampler, least: float, most: float
) -> None:
    """With n steps Euler's error falls like 1/n, and that of DPM-Solver++ 2M like log(n)/n²."""
    points = np.random.default_rng(0).standard_normal(500)
    exact = runge_kutta(points, 4000)
    errors = [np.abs(sampled(points, sampler, n) - exact).mean() for n in (50, 100, 200, 400)]
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert ((orders > least) & (orders < most)).all(), orders


def test_sixteen_steps_of_the_second_order_beat_28_of_the_first() -> None:
    points = np.random.default_rng(1).standard_normal(500)
    exact = runge_kutta(points, 4000)
    second = np.abs(sampled(points, DPMPP_2M, 16) - exact).mean()
    first = np.abs(sampled(points, EULER, 28) - exact).mean()
    assert second < first


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
        schedule(EULER, 0)
