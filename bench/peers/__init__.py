"""Octet beside other ways to serve the same model: `make bench-peers`."""
