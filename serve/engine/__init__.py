"""The engine that runs the models: text encoders, denoising loop, precision, decoding."""
