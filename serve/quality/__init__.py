"""Image quality: comparisons of images by category, and the calibration of presets."""
