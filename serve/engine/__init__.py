"""The engine that runs the models: text encoders, denoising loop, precision, decoding."""

import time

BEGAN = time.monotonic()  # when this process began to load the engine
