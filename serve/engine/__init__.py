"""The model in our hands: text encoders, denoising, precision recipes."""
