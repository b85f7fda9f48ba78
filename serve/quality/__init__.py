"""Image quality: comparisons of pictures by category, and the calibration of presets."""
