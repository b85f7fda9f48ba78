"""Octet compared with other ways to serve the same model: `make bench-peers`."""
