"""Measurements of one GPU. They need torch and diffusers, no Ray and no downloaded weights."""
