"""The time of a denoising step with Generators that only wait (`bench.timed`).

`bench.timed` loads Ray, which must not happen before its environment is set. So this file is
apart from it.
"""

STEP_S = 0.05  # seconds
