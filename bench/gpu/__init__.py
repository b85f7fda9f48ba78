"""Measurements of a card: torch and diffusers, no Ray, no weights to download."""
