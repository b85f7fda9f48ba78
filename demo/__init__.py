"""The embedded default: a small SD3.5-shaped model and how it is made."""
